"""Live workers, and which of them should get no job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from core.errors import NotFound
from core.lifecycle import AttemptOutcome, JobStatus
from core.queue import QueueName
from models.job import Job, JobAttempt, Worker
from models.types import db_now

# So many losses in a row, at two jobs or more, are the machine's fault rather than a job's.
LOSSES = 3
_NO_VERDICT = (AttemptOutcome.CANCELLED, AttemptOutcome.PREEMPTED, AttemptOutcome.PAUSED)


@dataclass(frozen=True)
class Quarantine:
    """Why a worker gets no job, and for how long."""

    until: float
    seconds_left: float
    losses: int
    job_ids: tuple[str, ...]


class WorkerRepository:
    """Reads and writes of worker rows in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def beat(
        self,
        worker_id: str,
        *,
        host: str,
        pid: int,
        version: str,
        queues: list[QueueName],
        draining: bool,
    ) -> None:
        """Note that a worker lives."""
        row = self._session.get(Worker, worker_id)
        if row is None:
            row = Worker(
                id=worker_id, host=host, pid=pid, version=version, queues=[q.value for q in queues]
            )
            self._session.add(row)
        row.seen_at = db_now()
        row.draining = draining
        self._session.flush()

    def live(self, *, within_s: float) -> list[Worker]:
        """Return workers seen lately."""
        statement = select(Worker).where(Worker.seen_at > db_now() - within_s).order_by(Worker.id)
        return list(self._session.execute(statement).scalars())

    def ready(self, queue: QueueName, *, within_s: float) -> int:
        """Return how many workers seen lately take jobs of a queue."""
        live = self.live(within_s=within_s)
        return sum(queue.value in row.queues and not row.draining for row in live)

    def live_with_jobs(self, *, within_s: float) -> list[tuple[Worker, str | None]]:
        """Return workers seen lately, each with the job it works on."""
        statement = (
            select(Worker, Job.id)
            .outerjoin(Job, (Job.lease_owner == Worker.id) & (Job.status == JobStatus.RUNNING))
            .where(Worker.seen_at > db_now() - within_s)
            .order_by(Worker.id)
        )
        return [(row[0], row[1]) for row in self._session.execute(statement).all()]

    def request_drain(self, worker_id: str) -> Worker:
        """Let a worker take no further job; it goes on with the present one.

        Raises:
            NotFound: no such worker.
        """
        self._session.execute(
            update(Worker)
            .where(Worker.id == worker_id, Worker.drain_requested_at.is_(None))
            .values(drain_requested_at=db_now())
            .execution_options(synchronize_session=False)
        )
        worker = self._session.get(Worker, worker_id, populate_existing=True)
        if worker is None:
            raise NotFound(f"no worker {worker_id!r}", hint="GET /v1/workers lists them")
        return worker

    def job_of(self, worker_id: str) -> str | None:
        """Return the job that a worker works on."""
        held = select(Job.id).where(Job.lease_owner == worker_id, Job.status == JobStatus.RUNNING)
        return self._session.execute(held.limit(1)).scalar_one_or_none()

    def quarantine(self, worker_id: str, *, quarantine_s: float) -> Quarantine | None:
        """Return why the worker should get no job, None when it may.

        Its last `LOSSES` attempts that ended by themselves were all lost, at two jobs or more, the
        last one less than `quarantine_s` ago.
        """
        last = (
            select(
                JobAttempt.job_id,
                JobAttempt.outcome,
                JobAttempt.ended_at,
                db_now().label("now"),
            )
            .where(
                JobAttempt.worker_id == worker_id,
                JobAttempt.ended_at.is_not(None),
                JobAttempt.outcome.not_in(_NO_VERDICT),
            )
            .order_by(JobAttempt.ended_at.desc())
            .limit(LOSSES)
        )
        rows: Sequence[Any] = self._session.execute(last).all()
        jobs = tuple(dict.fromkeys(row.job_id for row in rows))
        lost = [row for row in rows if row.outcome is AttemptOutcome.LOST]
        if len(lost) < LOSSES or len(jobs) < 2:
            return None
        until = float(rows[0].ended_at) + quarantine_s
        left = until - float(rows[0].now)
        return Quarantine(until, left, len(lost), jobs) if left > 0 else None

    def remove(self, worker_id: str) -> None:
        """Forget a worker that has stopped."""
        self._session.execute(delete(Worker).where(Worker.id == worker_id))

    def sweep(self, *, older_than_s: float) -> None:
        """Forget workers that died without a word."""
        self._session.execute(delete(Worker).where(Worker.seen_at < db_now() - older_than_s))
