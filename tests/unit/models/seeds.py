"""Rows that tests begin with, and the clock of leases turned by hand."""

from sqlalchemy import select, update

from core.ids import IdPrefix, new_id
from core.lifecycle import AttemptOutcome, EventType, JobKind
from core.queue import QueueName
from models.job import Event, Job, JobAttempt, Outbox
from models.repositories.datasets import DatasetRepository
from models.repositories.events import events_after
from models.repositories.jobs import Claim, JobRepository
from models.repositories.owners import OwnerRepository
from models.session import Database
from models.types import db_now

LEASE_S = 60.0


class Seeds:
    def __init__(self, database: Database) -> None:
        self.database = database
        with database.transaction() as session:
            self.owner_id = OwnerRepository(session).ensure("owner").id

    def job(self, *, kind: JobKind = JobKind.TRAINING, priority: int = 0) -> str:
        with self.database.transaction() as session:
            job = JobRepository(session).create(
                owner_id=self.owner_id, kind=kind, spec={"n": 1}, model="tiny"
            )
            job.priority = priority
            return job.id

    def dataset_job(self) -> tuple[str, str]:
        """Return the ids of a dataset and of the job that validates it."""
        dataset_id, job_id = new_id(IdPrefix.DATASET), new_id(IdPrefix.JOB)
        with self.database.transaction() as session:
            DatasetRepository(session).create(
                dataset_id=dataset_id, owner_id=self.owner_id, job_id=job_id, name="d",
                size_bytes=1, sha256="0" * 64, policy={},
            )  # fmt: skip
            JobRepository(session).create(
                owner_id=self.owner_id, kind=JobKind.DATASET, spec={}, job_id=job_id,
                dataset_id=dataset_id,
            )  # fmt: skip
        return dataset_id, job_id

    def claim(self, queue: QueueName = QueueName.GPU, *, worker_id: str = "w") -> Claim | None:
        with self.database.transaction() as session:
            return JobRepository(session).claim(queue, worker_id=worker_id, lease_s=LEASE_S)

    def claimed(self, queue: QueueName = QueueName.GPU) -> Claim:
        claim = self.claim(queue)
        assert claim is not None
        return claim

    def get(self, job_id: str) -> Job:
        with self.database.reading() as session:
            return session.get_one(Job, job_id)

    def attempts(self, job_id: str) -> list[tuple[int, AttemptOutcome | None]]:
        with self.database.reading() as session:
            rows = session.execute(
                select(JobAttempt.number, JobAttempt.outcome)
                .where(JobAttempt.job_id == job_id)
                .order_by(JobAttempt.number)
            )
            return [(row.number, row.outcome) for row in rows]

    def events(self, job_id: str) -> list[Event]:
        with self.database.reading() as session:
            return events_after(session, job_id, 0, 100_000)

    def owed(self) -> list[str]:
        """Return the jobs whose queue is owed a wake-up."""
        with self.database.reading() as session:
            return list(session.execute(select(Outbox.job_id).order_by(Outbox.id)).scalars())

    def expire(self, job_id: str) -> None:
        """Let the lease of a running job run out."""
        with self.database.transaction() as session:
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=db_now() - 1.0))

    def pause(self, job_id: str, seconds: float) -> None:
        """Let a queued job wait."""
        with self.database.transaction() as session:
            later = db_now() + seconds
            session.execute(update(Job).where(Job.id == job_id).values(run_after=later))

    def make_due(self) -> None:
        """Let every pause of a queued job be over."""
        with self.database.transaction() as session:
            session.execute(update(Job).values(run_after=db_now() - 1.0))


def is_gapless(events: list[Event]) -> bool:
    return [event.seq for event in events] == list(range(1, len(events) + 1))


def done_events(events: list[Event]) -> int:
    return [event.type for event in events].count(EventType.DONE)
