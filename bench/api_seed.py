"""A database with many jobs of one owner, written through the models: what an API is asked about.

Most jobs have ended, one in a hundred waits and one in five hundred runs; training jobs have steps,
every job its first and last events. The paused ones are the oldest: a list of them that is filtered
row by row has to read all the others first.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Engine, insert, text

from app.keys import Scope, make_key
from core.ids import IdPrefix, ulid
from core.lifecycle import (
    DatasetStatus,
    EventType,
    JobKind,
    JobStatus,
    Phase,
    StepStatus,
)
from core.profile import Estimate
from core.queue import QUEUE_OF_KIND
from core.results import Comparison, Evaluation, RunSummary, TrainingResult
from core.spec import KernelTerm, ObjectiveSpec
from models.base import Base
from models.dataset import Dataset
from models.job import Event, Job, JobStep
from models.repositories.jobs import ID_OF_KIND
from models.repositories.owners import OwnerRepository
from models.session import Database

RUNNING_EACH, QUEUED_EACH, PAUSED = 500, 100, 20
"""One job in so many runs, one in so many waits; how many are paused."""
_APART_S = 30.0
_DATASETS = 20
_STEPS = ("recommend", "search", "train", "compare")
_AT_ONCE = 2_000
_LEASE_S = 86_400.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Seeded:
    """What was written: a key that may do everything, and ids of training jobs by their state."""

    secret: str
    owner_id: str
    running: list[str]
    queued: list[str]
    ended: list[str]
    middle: str


def seed(url: str, num_jobs: int) -> Seeded:
    """Fill a migrated database; what follows many writes is over when this ends."""
    database = Database(url, pool_size=1)
    try:
        with database.transaction() as session:
            owners = OwnerRepository(session)
            owner_id, key = owners.ensure("bench").id, make_key("bench")
            owners.add_key(
                owner_id=owner_id, name="bench", prefix=key.prefix, secret_sha256=key.sha256,
                scopes=[Scope.ADMIN.value],
            )  # fmt: skip
            now = time.time()
            datasets = [_dataset(owner_id, now - num_jobs * _APART_S) for _ in range(_DATASETS)]
            session.execute(insert(Dataset), datasets)
        made = Jobs(owner_id, [row["id"] for row in datasets], num_jobs, now)
        rows = iter(made)
        while some := list(islice(rows, _AT_ONCE)):
            for table in (Job, JobStep, Event):
                copy(database.engine, table, [row for job in some for row in job[table]])
        with database.engine.connect() as connection:
            settled = connection.execution_options(isolation_level="AUTOCOMMIT")
            for order in ("VACUUM (ANALYZE)", "CHECKPOINT"):
                settled.execute(text(order))
    finally:
        database.dispose()
    return Seeded(
        key.secret, owner_id, made.training[JobStatus.RUNNING], made.training[JobStatus.QUEUED],
        made.training[JobStatus.SUCCEEDED], made.middle,
    )  # fmt: skip


def copy(engine: Engine, model: type[Base], rows: list[Row]) -> None:
    """Write rows by COPY, each value as the model's column would bind it.

    What a row leaves out is NULL. It takes a fraction of the time of INSERT.
    """
    columns = model.__table__.columns
    binds = [
        (c.key, c.type.dialect_impl(engine.dialect).bind_processor(engine.dialect)) for c in columns
    ]
    names = ", ".join(f'"{c.name}"' for c in columns)
    connection = engine.raw_connection()
    try:
        copying = f"COPY {model.__tablename__} ({names}) FROM STDIN"
        with connection.cursor() as cursor, cursor.copy(copying) as target:
            for row in rows:
                values = ((row.get(key), bind) for key, bind in binds)
                target.write_row(
                    [v if v is None or bind is None else bind(v) for v, bind in values]
                )
        connection.commit()
    finally:
        connection.close()


class Jobs:
    """Rows of the jobs, oldest first, and what belongs to each."""

    def __init__(self, owner_id: str, datasets: list[str], num_jobs: int, now: float) -> None:
        self._owner_id = owner_id
        self._datasets = datasets
        self._num_jobs = num_jobs
        self._now = now
        self._result = training_result()
        self.middle = ""
        self.training: dict[JobStatus, list[str]] = {status: [] for status in JobStatus}

    def __iter__(self) -> Iterator[dict[type[Base], list[Row]]]:
        for number in range(self._num_jobs):
            job = self._job(number)
            if number == self._num_jobs // 2:
                self.middle = job["id"]
            if job["kind"] is JobKind.TRAINING:
                self.training[job["status"]].append(job["id"])
            yield {Job: [job], JobStep: list(_steps(job)), Event: list(_events(job))}

    def _job(self, number: int) -> Row:
        status, kind = self._status(number), self._kind(number)
        created_at = self._now - (self._num_jobs - number) * _APART_S
        has_begun = status not in (JobStatus.QUEUED, JobStatus.PAUSED)
        succeeded = status is JobStatus.SUCCEEDED and kind is JobKind.TRAINING
        return {
            "id": f"{ID_OF_KIND[kind].value}{ulid(int(created_at * 1000))}",
            "created_at": created_at,
            "owner_id": self._owner_id,
            "kind": kind,
            "queue": QUEUE_OF_KIND[kind],
            "priority": 0,
            "status": status,
            "phase": Phase.TRAINING if has_begun else None,
            "attention": [],
            "spec": {
                "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}},
                "model": "tiny-lm",
            },
            "dataset_id": self._datasets[number % len(self._datasets)],
            "model": "tiny-lm",
            "seed": number,
            "metadata": {"team": f"t{number % 50}"},
            "attempt": int(has_begun),
            "failures": 0,
            "losses": 0,
            "run_after": created_at,
            "lease_owner": "wrk_bench" if status is JobStatus.RUNNING else None,
            "lease_until": self._now + _LEASE_S if status is JobStatus.RUNNING else None,
            "heartbeat_at": self._now if status is JobStatus.RUNNING else None,
            "progress": _progress(number) if has_begun else None,
            "result": self._result if succeeded else None,
            "gpu_seconds": 120.0 if has_begun else 0.0,
            "event_seq": 3,
            "version": 12,
            "queued_at": created_at,
            "started_at": created_at + 5.0 if has_begun else None,
            "finished_at": created_at + 600.0 if status.is_terminal else None,
        }

    def _status(self, number: int) -> JobStatus:
        if number < PAUSED:
            return JobStatus.PAUSED
        from_newest = self._num_jobs - number
        if from_newest <= self._num_jobs // QUEUED_EACH:
            return JobStatus.QUEUED
        if from_newest <= self._num_jobs // QUEUED_EACH + self._num_jobs // RUNNING_EACH:
            return JobStatus.RUNNING
        return JobStatus.FAILED if number % 12 == 0 else JobStatus.SUCCEEDED

    def _kind(self, number: int) -> JobKind:
        return JobKind.RECOMMENDATION if number % 4 == 3 else JobKind.TRAINING


def training_result() -> Row:
    """A result as a training job leaves it."""
    run = RunSummary(
        objective=ObjectiveSpec(kernel_term=KernelTerm.model_validate({"kernel": "rbf"})),
        learning_rate=1e-4, steps=120, pairs_seen=1920, seconds=118.0, checkpoint_id="ckpt_bench",
        evaluation=Evaluation(
            log_loss=0.61, temperature=1.2, accuracy=0.66, accuracy_length_normalized=0.64,
            calibration_error=0.04, drift=0.12, chosen_displacement=-0.4, pairs=230, prompts=228,
        ),
    )  # fmt: skip
    gap = Estimate(value=-0.01, low=-0.03, high=0.01)
    return TrainingResult(
        run=run, baseline=run,
        comparison=Comparison(
            log_loss=gap, accuracy=gap, drift=0.01, verdict="no significant difference",
            sentence="The interval of the difference holds 0.",
        ),
        samples=(), bundle={"seed": "0", "torch": "2"},
    ).model_dump(mode="json")  # fmt: skip


def _dataset(owner_id: str, created_at: float) -> Row:
    dataset_id = f"{IdPrefix.DATASET.value}{ulid(int(created_at * 1000))}"
    return {
        "id": dataset_id, "created_at": created_at, "owner_id": owner_id, "name": "bench",
        "status": DatasetStatus.READY, "job_id": "job_bench", "policy": {}, "files": [],
        "upload_id": dataset_id, "version": 1, "ready_at": created_at,
    }  # fmt: skip


def _progress(number: int) -> Row:
    done = number % 100
    return {
        "fraction": done / 100, "unit": "step", "done": done, "total": 100, "rate": 1.5,
        "eta_seconds": 60.0, "eta_low": 54.0, "eta_high": 75.0, "basis": "measured",
    }  # fmt: skip


def _steps(job: Row) -> Iterator[Row]:
    if job["kind"] is not JobKind.TRAINING or job["started_at"] is None:
        return
    for position, name in enumerate(_STEPS):
        is_done = job["status"] is JobStatus.SUCCEEDED or position < 2
        yield {
            "job_id": job["id"], "position": position, "name": name,
            "status": StepStatus.SUCCEEDED if is_done else StepStatus.PENDING,
            "result": {}, "started_at": job["started_at"], "finished_at": job["finished_at"],
        }  # fmt: skip


def _events(job: Row) -> Iterator[Row]:
    for seq, message in enumerate(("The job is queued.", "Attempt 1 has started.", "News."), 1):
        at = job["created_at"] + seq
        yield {
            "id": f"{IdPrefix.EVENT.value}{ulid(int(at * 1000))}", "created_at": at,
            "owner_id": job["owner_id"], "job_id": job["id"], "seq": seq, "attempt": 1,
            "type": EventType.JOB_STATUS, "level": "info", "message": message, "data": {},
        }  # fmt: skip
