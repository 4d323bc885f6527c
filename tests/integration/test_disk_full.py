"""Writes that really fail in a real runner: the job is paused, says why, and loses nothing."""

import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.errors import FailureCode
from core.lifecycle import AttemptOutcome, Attention, DatasetStatus, EventType, JobStatus
from core.queue import QueueName
from core.results import TrainingResult
from models.job import Job
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from tests.integration.training_world import TrainingWorld, micro_llama, running_world
from tests.integration.workers import Stack, pairs, run_stack, wait_for
from worker.jobs import fine_tune
from worker.supervisor import Supervisor

MIB = 1024**2


@pytest.fixture
def stack(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    with run_stack(tmp_path, database=sqlite_url, broker=None) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse files of this process and its children beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of its own; only root may."""
    folder.mkdir(parents=True)
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("cannot mount a small disk: there is no mount here")
    command = [mount, "-t", "tmpfs", "-o", f"size={size}", "kdpo-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run([umount, str(folder)], check=True)


def drain(stack: Stack) -> None:
    Supervisor(stack.settings, stack.database, worker_id="wrk_test").drain(QueueName.CPU)


def resume(stack: Stack, job_id: str) -> None:
    with stack.database.transaction() as session:
        jobs = JobRepository(session)
        jobs.resume(jobs.get(stack.job(job_id).owner_id, job_id))


def assert_paused(job: Job, outcomes: list[AttemptOutcome | None]) -> None:
    assert job.status is JobStatus.PAUSED
    assert (job.failures, job.losses, job.finished_at, job.lease_until) == (0, 0, None, None)
    assert outcomes == [AttemptOutcome.PAUSED]
    assert job.attention == [Attention.LOW_DISK]
    assert job.error is not None
    assert job.error["code"] == FailureCode.DISK_FULL
    assert "bytes are free under" in job.error["message"]
    assert job.error["hint"].endswith(f"POST /v1/jobs/{job.id}/resume")


def test_validation_goes_on_where_there_is_room_again(stack: Stack) -> None:
    job_id = stack.submit(pairs(12_000))
    with largest_file(MIB):
        drain(stack)
    assert_paused(stack.job(job_id), stack.outcomes(job_id))
    dataset = stack.dataset(job_id)
    assert dataset.status is DatasetStatus.VALIDATING
    assert dataset.failure is not None
    assert dataset.failure["code"] == "disk_full"
    assert (stack.settings.upload_dir / dataset.id).is_file(), "the upload is kept"
    last = stack.events(job_id)[-1]
    assert (last.type, last.level) == (EventType.JOB_STATUS, "error")
    assert last.data["status"] == "paused"
    assert last.data["folder"] == str(stack.settings.root)
    assert last.data["free_bytes"] > 0
    drain(stack)
    assert stack.job(job_id).attempt == 1, "nobody takes a paused job"

    resume(stack, job_id)
    drain(stack)
    job = stack.job(job_id)
    assert job.status is JobStatus.SUCCEEDED, stack.logs()
    assert (job.error, job.attention, job.attempt) == (None, [], 2)
    dataset = stack.dataset(job_id)
    assert dataset.failure is None
    assert dataset.counts is not None
    assert dataset.counts["pairs"] == 12_000
    stack.assert_one_story(job_id)


def test_a_disk_without_a_single_byte_is_told_by_the_exit_code(stack: Stack) -> None:
    with small_disk(stack.settings.artifact_dir, MIB):
        filler = stack.settings.artifact_dir / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2 * MIB))
        assert os.statvfs(filler).f_bavail == 0
        job_id = stack.submit(pairs(200))
        drain(stack)
        assert_paused(stack.job(job_id), stack.outcomes(job_id))
        assert "how the attempt ended could not be written" in str(stack.job(job_id).error)
        filler.unlink()
        resume(stack, job_id)
        drain(stack)
        assert stack.job(job_id).status is JobStatus.SUCCEEDED, stack.logs()
        stack.assert_one_story(job_id)


def test_a_database_on_the_same_disk_is_written_as_soon_as_it_has_room(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    disk = tmp_path / "disk"
    with small_disk(disk, 16 * MIB):
        database = disk / "kdpo.db"
        shutil.copy(sqlite_url.removeprefix("sqlite:///"), database)
        with run_stack(disk, database=f"sqlite:///{database}", broker=None) as stack:
            for name, value in stack.environment.items():
                monkeypatch.setenv(name, value)
            job_id = stack.submit(pairs(12_000))
            filler = disk / "filler"
            room = os.statvfs(disk)
            filler.write_bytes(bytes(room.f_bavail * room.f_bsize - 90_000))
            working = threading.Thread(target=drain, args=(stack,))
            working.start()
            wait_for("a database without room", lambda: "its end waits" in caplog.text)
            assert stack.job(job_id).status is JobStatus.RUNNING
            filler.unlink()
            working.join()
            assert_paused(stack.job(job_id), stack.outcomes(job_id))
            assert stack.events(job_id)[-1].data["free_bytes"] < MIB, "as it was, not as it is"
            resume(stack, job_id)
            drain(stack)
            assert stack.job(job_id).status is JobStatus.SUCCEEDED, stack.logs()
            stack.assert_one_story(job_id)


# ------------------------------------------------------------------ training

LARGEST_FILE = 3_000_000  # a resume point of rank 256 is larger, its adapter and the database not
STEPS = 80
METHOD = {
    "type": "dpo",
    "dpo": {
        "hyperparameters": {"n_epochs": 50, "max_steps": STEPS, "lora_r": 256, "batch_size": 2}
    },
}


@pytest.fixture
def world(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrainingWorld]:
    for name, value in (
        ("KDPO_DATA_DIR", str(tmp_path)),
        ("KDPO_DB__URL", sqlite_url),
        ("KDPO_TRAINING__DEVICE", "cpu"),
        ("KDPO_TRAINING__NUM_THREADS", "1"),
        ("KDPO_TRAINING__CHECKPOINT_EVERY_S", "0"),
        ("OMP_NUM_THREADS", "1"),
    ):
        monkeypatch.setenv(name, value)
    model = micro_llama(tmp_path / "model")
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=80) as made:
        yield made


def points(world: TrainingWorld, job_id: str) -> list[int]:
    with world.database.reading() as session:
        found = ExperimentRepository(session).resume_points(job_id, "train")
    return [point.step for point in found]


def adapter_of(world: TrainingWorld, result: TrainingResult) -> str:
    with world.database.reading() as session:
        row = ExperimentRepository(session).checkpoint(world.owner_id, result.run.checkpoint_id)
    return next(str(f["sha256"]) for f in row.files if f["path"] == "adapter_model.safetensors")


def test_training_ends_with_the_weights_of_an_undisturbed_run(world: TrainingWorld) -> None:
    world.fine_tune(METHOD)
    undisturbed = TrainingResult.model_validate(world.attempt(fine_tune.run))
    job_id = world.fine_tune(METHOD)
    supervisor = Supervisor(world.settings, world.database, worker_id="wrk_test")
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")

    ended = threading.Event()

    def limit_the_runner() -> None:
        while not points(world, job_id):
            if ended.wait(0.01):
                return
        for child in map(int, children.read_text().split()):
            # The test's database servers are children, too.
            if b"worker.runner" in Path(f"/proc/{child}/cmdline").read_bytes():
                resource.prlimit(child, resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))

    limiting = threading.Thread(target=limit_the_runner)
    limiting.start()
    supervisor.drain(QueueName.GPU)
    ended.set()
    limiting.join()
    with world.database.reading() as session:
        jobs = JobRepository(session)
        job = jobs.get(world.owner_id, job_id)
        log = next(world.settings.artifact_dir.glob(f"jobs/{job_id}/a1/log.txt")).read_text()
    assert job.status is JobStatus.PAUSED, log
    assert job.error is not None
    assert "File too large" in job.error["message"]
    kept = points(world, job_id)
    assert kept, "the points before the full disk stay"
    assert max(kept) < STEPS
    folder = world.settings.artifact_dir / "jobs" / job_id / "a1"
    assert not list(folder.rglob(".tmp-*")), "half a resume point is not left behind"

    with world.database.transaction() as session:
        jobs = JobRepository(session)
        jobs.resume(jobs.get(world.owner_id, job_id))
    supervisor.drain(QueueName.GPU)
    with world.database.reading() as session:
        job = JobRepository(session).get(world.owner_id, job_id)
        told = [event.message for event in events_after(session, job_id, 0, 1000)]
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert not any("is not used" in message for message in told), "it went on from its point"
    result = TrainingResult.model_validate(job.result)
    assert adapter_of(world, result) == adapter_of(world, undisturbed)
    assert result.run.evaluation == undisturbed.run.evaluation
    assert (job.failures, job.losses, job.attention) == (0, 0, [])
