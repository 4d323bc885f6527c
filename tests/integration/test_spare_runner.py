"""A process that is ready before its job: who uses it, who must not, and that it is never left."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from core.lifecycle import AttemptOutcome, JobKind, JobStatus
from core.queue import QueueName
from core.settings import WorkerSettings
from models.repositories.jobs import Fence, JobRepository
from tests.integration.training_world import TrainingWorld, micro_llama, running_world
from tests.integration.workers import Stack, is_alive, run_stack, wait_for
from worker.outcome import LOG_NAME, OUTCOME_NAME
from worker.parent import TAKEN, Assignment
from worker.process import RunnerProcess, make_folder
from worker.spare import SpareRunner
from worker.supervisor import Supervisor

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="needs /proc to see children"
)
# Enough for a machine that does something else as well.
ANSWER_S = 20.0
FENCE = Fence("job_that_nobody_has", 1)


def runners(pid: int) -> list[int]:
    """Return the runners that a process has started, dead ones that it has not buried left out."""
    found: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found |= {int(child) for child in (thread / "children").read_text().split()}
    return sorted(
        child
        for child in found
        if is_alive(child) and b"worker.runner" in Path(f"/proc/{child}/cmdline").read_bytes()
    )


def the_runner(pid: int) -> int:
    """Return the one runner of a process.

    For an instant after `exec` a new process has no command line yet, so it is waited for.
    """
    (child,) = wait_for("a runner", lambda: runners(pid))
    return child


# ------------------------------------------------------------------ jobs


@pytest.fixture
def world(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrainingWorld]:
    model = micro_llama(tmp_path / "model")
    monkeypatch.setenv("KDPO_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("KDPO_DB__URL", sqlite_url)
    monkeypatch.setenv("KDPO_TRAINING__NUM_THREADS", "1")
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=40) as made:
        yield made


@pytest.fixture
def supervisor(world: TrainingWorld) -> Iterator[Supervisor]:
    settings = world.settings.model_copy(update={"worker": WorkerSettings()})
    made = Supervisor(settings, world.database, worker_id="wrk_test")
    with closing(made):
        yield made
    assert runners(os.getpid()) == []


def recommendation(world: TrainingWorld) -> str:
    return world.job(JobKind.RECOMMENDATION, spec={"model": world.model_ref()})


def ended(world: TrainingWorld, job_id: str) -> tuple[JobStatus, AttemptOutcome | None]:
    with world.database.reading() as session:
        jobs = JobRepository(session)
        return jobs.get(world.owner_id, job_id).status, jobs.attempt_outcome(Fence(job_id, 1))


def test_a_job_runs_in_the_spare_and_another_spare_follows(
    world: TrainingWorld, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.drain(QueueName.GPU)
    spare = the_runner(os.getpid())
    job_id = recommendation(world)
    with caplog.at_level(logging.INFO, "kdpo.spare"):
        supervisor.drain(QueueName.GPU)
    folder = world.settings.artifact_dir / "jobs" / job_id / "a1"
    log = (folder / LOG_NAME).read_text()
    assert ended(world, job_id) == (JobStatus.SUCCEEDED, AttemptOutcome.SUCCEEDED), log
    assert f"job {job_id} is given to the spare runner, process {spare}" in caplog.text
    assert (folder / OUTCOME_NAME).is_file()
    assert not is_alive(spare)
    assert the_runner(os.getpid()) != spare


def test_a_spare_with_a_job_is_preempted_as_any_process_is(
    world: TrainingWorld, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.drain(QueueName.GPU)
    job_id = recommendation(world)
    log = world.settings.artifact_dir / "jobs" / job_id / "a1" / LOG_NAME

    def stop_at_once() -> None:
        wait_for("the job's folder", log.exists)
        supervisor.stop()

    stopping = threading.Thread(target=stop_at_once)
    stopping.start()
    with caplog.at_level(logging.INFO, "kdpo.spare"):
        supervisor.drain(QueueName.GPU)
    stopping.join()
    assert f"job {job_id} is given to the spare runner" in caplog.text
    assert ended(world, job_id) == (JobStatus.QUEUED, AttemptOutcome.PREEMPTED)
    assert runners(os.getpid()) == [], "a worker that stops makes no other spare"


def test_a_job_outlives_the_spare_that_was_to_have_it(
    world: TrainingWorld, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.drain(QueueName.GPU)
    os.kill(the_runner(os.getpid()), signal.SIGKILL)
    job_id = recommendation(world)
    supervisor.drain(QueueName.GPU)
    assert "the spare runner has ended with code -9" in caplog.text
    assert ended(world, job_id) == (JobStatus.SUCCEEDED, AttemptOutcome.SUCCEEDED)


@pytest.mark.parametrize(("queue", "kept"), [(QueueName.CPU, True), (QueueName.GPU, False)])
def test_who_runs_no_models_or_must_not_keeps_no_spare(
    world: TrainingWorld, queue: QueueName, kept: bool
) -> None:
    settings = world.settings.model_copy(update={"worker": WorkerSettings(spare_runner=kept)})
    Supervisor(settings, world.database, worker_id="wrk_test").drain(queue)
    assert runners(os.getpid()) == []


# ------------------------------------------------------------------ spares without a job


@pytest.fixture
def spare() -> Iterator[SpareRunner]:
    with closing(SpareRunner(answer_s=ANSWER_S)) as made:
        yield made
    assert runners(os.getpid()) == []


def test_one_spare_is_kept_and_given_once(spare: SpareRunner, tmp_path: Path) -> None:
    assert spare.hand_over(FENCE, tmp_path) is None
    spare.prepare()
    kept = the_runner(os.getpid())
    spare.prepare()
    assert the_runner(os.getpid()) == kept
    process = spare.hand_over(FENCE, tmp_path)
    assert process is not None
    assert process.pid == kept
    assert spare.hand_over(FENCE, tmp_path) is None
    spare.close()
    assert is_alive(kept), "it is the attempt's now"
    process.close()


def test_what_a_spare_writes_after_it_was_given_is_in_the_log(
    spare: SpareRunner, tmp_path: Path
) -> None:
    spare.prepare()
    process = spare.hand_over(FENCE, tmp_path)
    assert process is not None
    outputs = [Path(f"/proc/{process.pid}/fd/{number}").resolve() for number in (1, 2)]
    assert outputs == [(tmp_path / LOG_NAME).resolve()] * 2
    process.close()


def test_a_spare_that_does_not_answer_is_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(SpareRunner(answer_s=0.2)) as spare:
        spare.prepare()
        silent = the_runner(os.getpid())
        os.kill(silent, signal.SIGSTOP)
        assert spare.hand_over(FENCE, tmp_path) is None
        assert not is_alive(silent)
    assert "does not answer: timed out" in caplog.text
    assert (tmp_path / LOG_NAME).read_bytes() == b""


def test_a_spare_of_other_variables_is_not_used(
    spare: SpareRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare.prepare()
    first = the_runner(os.getpid())
    monkeypatch.setenv("KDPO_TRAINING__NUM_THREADS", "3")
    spare.prepare()
    second = the_runner(os.getpid())
    assert first != second
    monkeypatch.setenv("KDPO_TRAINING__NUM_THREADS", "2")
    assert spare.hand_over(FENCE, tmp_path) is None
    assert not is_alive(second)


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_a_spare_of_other_code_is_not_used(
    change: str, spare: SpareRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code" / "worker" / "jobs" / "some.py"
    code.parent.mkdir(parents=True)
    code.touch()
    monkeypatch.setattr("worker.spare.__file__", str(tmp_path / "code" / "worker" / "spare.py"))
    spare.prepare()
    match change:
        case "edited":
            os.utime(code, (1.0, 1.0))
        case "added":
            code.with_name("another.py").touch()
        case _:
            code.unlink()
    assert spare.hand_over(FENCE, tmp_path) is None


def test_a_full_disk_leaves_the_spare_for_the_next_job(spare: SpareRunner, tmp_path: Path) -> None:
    spare.prepare()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        spare.hand_over(FENCE, tmp_path / "file" / "a1")
    assert the_runner(os.getpid())


# ------------------------------------------------------------------ the runner's side


@pytest.fixture
def process() -> Iterator[RunnerProcess]:
    with closing(RunnerProcess("--spare")) as made:
        made.channel.settimeout(ANSWER_S)
        yield made


def give(process: RunnerProcess, folder: Path) -> None:
    """Send an assignment."""
    line = Assignment(job_id=FENCE.job_id, attempt=1, log=folder / LOG_NAME).line()
    process.channel.sendall(line)


@pytest.mark.parametrize("after", [b"", b"no\n"])
def test_without_go_it_does_nothing_and_ends(
    after: bytes, process: RunnerProcess, tmp_path: Path
) -> None:
    make_folder(tmp_path)
    give(process, tmp_path)
    assert process.channel.recv(64) == TAKEN
    process.channel.sendall(after)
    if not after:
        process.channel.close()
    assert process.wait(ANSWER_S) == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == [LOG_NAME]


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"job_id": "a"}\n'])
def test_what_it_does_not_understand_ends_it(line: bytes, process: RunnerProcess) -> None:
    process.channel.sendall(line)
    assert process.wait(ANSWER_S) == -signal.SIGKILL


def test_a_log_that_cannot_be_written_is_not_taken(process: RunnerProcess, tmp_path: Path) -> None:
    give(process, tmp_path / "nowhere")
    assert process.wait(ANSWER_S) == -signal.SIGKILL


# ------------------------------------------------------------------ workers


@pytest.fixture
def stack(sqlite_url: str, tmp_path: Path) -> Iterator[Stack]:
    with run_stack(tmp_path, database=sqlite_url, broker=None) as running:
        yield running


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_leaves_no_spare(stack: Stack, number: signal.Signals) -> None:
    worker = stack.start("gpu", extra={"KDPO_WORKER__SPARE_RUNNER": "true"})
    (spare,) = wait_for("a spare", lambda: runners(worker.pid))
    worker.send_signal(number)
    assert worker.wait(20) == (0 if number is signal.SIGTERM else -number)
    wait_for("the spare to die", lambda: not is_alive(spare), timeout_s=ANSWER_S)
