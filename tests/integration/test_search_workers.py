"""One search, several workers and `kill -9`: nothing is lost or done twice, and the same one wins.

`SEARCH_KILLS=50` (make soak) kills that often.
"""

import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import select

from core.lifecycle import EndedBy, JobKind, JobStatus, TaskStatus
from core.modelref import ModelRef
from core.results import TrainingResult
from models.experiment import StudyRow
from models.job import Job, JobAttempt
from models.repositories.jobs import JobRepository
from models.repositories.owners import OwnerRepository
from models.repositories.searches import SearchRepository, TaskRecord
from models.repositories.workers import WorkerRepository
from tests.integration.training_world import micro_llama
from tests.integration.workers import Stack, pairs, run_stack, wait_for
from worker.jobs.search_tasks import MAX_TASK_LOSSES

KILLS = int(os.environ.get("SEARCH_KILLS", "3"))
WORKERS = 2
TIMEOUT_S = 120.0 + 30.0 * KILLS
# One finalist: of several, the one that is spared depends on who is faster.
SHAPE = "narrow" if KILLS > 10 else "least"

pytestmark = [pytest.mark.timeout(4 * TIMEOUT_S)]


@pytest.fixture
def stack(tmp_path: Path, postgres_url: str, redis_url: str) -> Iterator[Stack]:
    with run_stack(tmp_path, database=postgres_url, broker=redis_url) as running:
        yield running


@dataclass
class Searched:
    """A job that searches, and what its tables say."""

    stack: Stack
    job_id: str

    def records(self) -> list[TaskRecord]:
        with self.stack.database.reading() as session:
            found = session.execute(select(StudyRow).where(StudyRow.job_id == self.job_id))
            study = found.scalar_one_or_none()
            return [] if study is None else SearchRepository(session).records(study.id)

    def progress(self) -> int:
        """Grows whenever a task is taken or ended."""
        return sum(
            {TaskStatus.WAITING: 0, TaskStatus.RUNNING: 1, TaskStatus.ENDED: 2}[r.task.status]
            for r in self.records()
        )

    def is_over(self) -> bool:
        """Whether no task is left: the search has ended, or its job has failed."""
        if self.stack.job(self.job_id).status.is_terminal:
            return True
        with self.stack.database.reading() as session:
            study = session.execute(select(StudyRow).where(StudyRow.job_id == self.job_id))
            row = study.scalar_one_or_none()
            return row is not None and row.ended_at is not None

    def result(self) -> TrainingResult:
        job = self.stack.ended(self.job_id, timeout_s=TIMEOUT_S)
        assert job.status is JobStatus.SUCCEEDED, f"{job.error}\n{self.stack.logs()}"
        assert job.result is not None
        return TrainingResult.model_validate(job.result)


def start(stack: Stack, dataset_id: str, model: Path, *, shape: str = SHAPE) -> Searched:
    params = {"n_epochs": 4, "batch_size": 8, "lora_r": 2}
    method = {"type": "auto", "auto": {"search": {"shape": shape}, "hyperparameters": params}}
    ref = ModelRef(name=model.name, source="local", path=model).model_dump(mode="json")
    with stack.database.transaction() as session:
        owner = OwnerRepository(session).ensure("tester")
        job = JobRepository(session).create(
            owner_id=owner.id, kind=JobKind.TRAINING, dataset_id=dataset_id, model=str(model),
            seed=3, spec={"model": ref, "method": method, "encoder": None},
        )  # fmt: skip
    return Searched(stack, job.id)


def kill_one(stack: Stack, workers: list[subprocess.Popen[bytes]], lot: random.Random) -> None:
    """Kill a worker with all its processes, or only the process of its job."""
    number = lot.randrange(len(workers))
    worker = workers[number]
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    if children and lot.random() < 0.5:
        os.kill(int(lot.choice(children)), signal.SIGKILL)
        return
    worker.kill()
    worker.wait()
    workers[number] = stack.start("gpu")


def winner_of(searched: Searched) -> tuple[str, int]:
    summary = searched.result().search
    assert summary is not None
    trial = next(r.trial for r in searched.records() if r.trial.number == summary.winner_trial)
    return trial.arm, trial.draw


def test_kills_lose_nothing_and_change_nothing(stack: Stack, tmp_path: Path) -> None:
    model = micro_llama(tmp_path / "micro")
    stack.start("cpu")
    validation = stack.submit(pairs(120))
    workers = [stack.start("gpu")]
    dataset_id = str(stack.ended(validation).dataset_id)

    calm = start(stack, dataset_id, model)
    winner = winner_of(calm)

    workers += [stack.start("gpu") for _ in range(WORKERS - 1)]
    lot, killed = random.Random(0), 0
    while killed < KILLS:
        hurt = start(stack, dataset_id, model)
        times = hurt_it(hurt, workers, lot, at_most=KILLS - killed)
        assert times, "the search was over before it was hurt"
        killed += times
        assert_as_undisturbed(hurt, calm)
        assert winner_of(hurt) == winner


def hurt_it(
    hurt: Searched, workers: list[subprocess.Popen[bytes]], lot: random.Random, *, at_most: int
) -> int:
    """Kill somebody whenever the search has gone on; return how often, until it is over."""
    killed = seen = 0
    while killed < at_most:

        def moved(seen: int = seen) -> bool:
            return hurt.is_over() or hurt.progress() > seen

        wait_for("the search to go on", moved, timeout_s=TIMEOUT_S)
        if hurt.is_over():
            break
        kill_one(hurt.stack, workers, lot)
        killed, seen = killed + 1, hurt.progress()
    hurt.result()
    return killed


def assert_as_undisturbed(hurt: Searched, calm: Searched) -> None:
    """The very same tasks, each once, with the very same losses."""
    records = hurt.records()
    keys = Counter((r.trial.arm, r.trial.draw, r.trial.repeat, r.task.rung) for r in records)
    losses = {
        (r.trial.arm, r.trial.draw, r.trial.repeat, r.task.rung): r.task.log_loss
        for r in calm.records()
    }
    assert max(keys.values()) == 1, "a task was made twice"
    assert set(keys) == set(losses), "trials are lost, or others were made"
    assert {r.task.status for r in records} == {TaskStatus.ENDED}
    assert {r.task.ended_by for r in records} == {EndedBy.BUDGET}
    for record in records:
        key = (record.trial.arm, record.trial.draw, record.trial.repeat, record.task.rung)
        assert record.task.log_loss == losses[key], f"{key} is another run"
    assert all(r.task.losses < MAX_TASK_LOSSES for r in records)
    hurt.stack.assert_one_story(hurt.job_id)


def test_a_second_worker_helps_and_leaves(stack: Stack, tmp_path: Path) -> None:
    model = micro_llama(tmp_path / "micro")
    stack.start("cpu")
    validation = stack.submit(pairs(120))
    for _ in range(2):
        stack.start("gpu")
    dataset_id = str(stack.ended(validation).dataset_id)
    wait_for("both workers to be known", lambda: _live(stack) >= 3, timeout_s=60.0)
    # Long enough for the second one to load its model while the first one works.
    searched = start(stack, dataset_id, model, shape="lean")
    searched.result()
    with stack.database.reading() as session:
        helpers = session.execute(select(Job).where(Job.parent_id == searched.job_id))
        jobs = list(helpers.scalars())
        attempts = list(session.execute(select(JobAttempt)).scalars())
    assert jobs, "nobody was asked to help"
    assert {job.kind for job in jobs} == {JobKind.SEARCH}
    assert all(job.status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED) for job in jobs)
    done_by = Counter(r.task.job_id for r in searched.records())
    assert len(done_by) > 1, f"one job did all tasks: {done_by}"
    assert set(done_by) <= {searched.job_id, *(job.id for job in jobs)}
    workers = {a.worker_id for a in attempts if a.job_id in done_by}
    assert len(workers) == 2


def _live(stack: Stack) -> int:
    with stack.database.reading() as session:
        return len(WorkerRepository(session).live(within_s=10.0))
