"""Jobs: create, claim, heartbeat, finish, requeue. Every move is a compare-and-set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.orm import Session

from core.errors import Conflict, FailureCode, LeaseLost, NotFound
from core.ids import IdPrefix, new_id
from core.lifecycle import (
    JOB_TRANSITIONS,
    AttemptOutcome,
    EventType,
    JobKind,
    JobStatus,
    Phase,
)
from core.queue import QUEUE_OF_KIND, QueueName
from models.job import Job, JobAttempt, Outbox
from models.repositories.events import append_event
from models.repositories.paging import Page, PageQuery, fetch_page
from models.types import db_now

ID_OF_KIND = {
    JobKind.DATASET: IdPrefix.JOB,
    JobKind.RECOMMENDATION: IdPrefix.RECOMMENDATION,
    JobKind.TRAINING: IdPrefix.FINE_TUNING_JOB,
    JobKind.EXPORT: IdPrefix.JOB,
}


@dataclass(frozen=True)
class Fence:
    """Which attempt at which job is writing; a write with an old fence is refused."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class Claim:
    """A job that now belongs to one worker."""

    fence: Fence
    owner_id: str
    kind: JobKind


@dataclass(frozen=True)
class Beat:
    """What the heartbeat brings back."""

    cancel_requested: bool


@dataclass(frozen=True)
class Reaped:
    """A job whose lease ran out, and what became of it."""

    fence: Fence
    status: JobStatus


class JobRepository:
    """All reads and writes of jobs in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    # ------------------------------------------------------------- by the API

    def create(
        self,
        *,
        owner_id: str,
        kind: JobKind,
        spec: dict[str, Any],
        job_id: str | None = None,
        dataset_id: str | None = None,
        model: str | None = None,
        seed: int = 0,
        metadata: dict[str, str] | None = None,
    ) -> Job:
        """Insert a queued job with its first event and the wake-up its queue is owed."""
        job = Job(
            id=job_id or new_id(ID_OF_KIND[kind]),
            owner_id=owner_id,
            kind=kind,
            queue=QUEUE_OF_KIND[kind],
            status=JobStatus.QUEUED,
            spec=spec,
            dataset_id=dataset_id,
            model=model,
            seed=seed,
            labels=metadata or {},
            queued_at=db_now(),
        )
        self._session.add(job)
        self._session.flush()
        self._event_status(job.id, JobStatus.QUEUED, "The job is queued.")
        self._owe_wake(job.queue, job.id)
        self._session.refresh(job)
        return job

    def get(self, owner_id: str, job_id: str, *, kind: JobKind | None = None) -> Job:
        """Return the owner's job.

        Raises:
            NotFound: no such job, another kind, or somebody else's.
        """
        job = self._session.get(Job, job_id)
        if job is None or job.owner_id != owner_id or (kind is not None and job.kind is not kind):
            raise NotFound(f"no job {job_id!r}", hint="list your jobs to see their ids")
        return job

    def page(
        self,
        owner_id: str,
        query: PageQuery,
        *,
        kind: JobKind | None = None,
        status: JobStatus | None = None,
        dataset_id: str | None = None,
        model: str | None = None,
    ) -> Page[Job]:
        """Return one page of the owner's jobs, filtered by whatever is given."""
        statement: Select[Job] = select(Job).where(Job.owner_id == owner_id)
        for column, value in (
            (Job.kind, kind),
            (Job.status, status),
            (Job.dataset_id, dataset_id),
            (Job.model, model),
        ):
            if value is not None:
                statement = statement.where(column == value)
        return fetch_page(self._session, statement, Job.id, query)

    def queue_position(self, job: Job) -> int | None:
        """Return how many due jobs stand before a queued one."""
        if job.status is not JobStatus.QUEUED:
            return None
        ahead = select(func.count()).where(
            Job.status == JobStatus.QUEUED,
            Job.queue == job.queue,
            or_(
                Job.priority > job.priority,
                (Job.priority == job.priority) & (Job.created_at < job.created_at),
            ),
        )
        return self._session.execute(ahead).scalar_one()

    def request_cancel(self, owner_id: str, job_id: str) -> Job:
        """Cancel a queued job at once, ask a running one to stop at its next step.

        Raises:
            NotFound: no such job.
            Conflict: the job has already ended otherwise.
        """
        job = self.get(owner_id, job_id)
        if job.status is JobStatus.CANCELLED:
            return job
        if job.status.is_terminal:
            raise Conflict(
                f"job {job_id} has already {job.status.value}; only a job that has not ended can "
                "be cancelled",
                code="job_not_cancellable",
            )
        waiting = self._move(
            job_id,
            (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.PAUSED),
            JobStatus.CANCELLED,
            cancel_requested_at=db_now(),
            finished_at=db_now(),
        )
        if waiting:
            self._event_status(job_id, JobStatus.CANCELLED, "The job was cancelled.")
            append_event(self._session, job_id, EventType.DONE, "No more events.")
        else:
            asked = update(Job).where(
                Job.id == job_id, Job.status == JobStatus.RUNNING, Job.cancel_requested_at.is_(None)
            )
            self._session.execute(
                asked.values(
                    cancel_requested_at=db_now(), version=Job.version + 1
                ).execution_options(synchronize_session=False)
            )
        self._session.refresh(job)
        return job

    # --------------------------------------------------------- by the workers

    def claim(self, queue: QueueName, *, worker_id: str, lease_s: float) -> Claim | None:
        """Take the next due job of a queue, or None; at most one worker gets each."""
        next_id = (
            select(Job.id)
            .where(Job.status == JobStatus.QUEUED, Job.queue == queue, Job.run_after <= db_now())
            .order_by(Job.priority.desc(), Job.created_at, Job.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        taken = (
            update(Job)
            .where(Job.id == next_id, Job.status == JobStatus.QUEUED)
            .values(
                status=JobStatus.RUNNING,
                attempt=Job.attempt + 1,
                lease_owner=worker_id,
                lease_until=db_now() + lease_s,
                heartbeat_at=db_now(),
                started_at=func.coalesce(Job.started_at, db_now()),
                version=Job.version + 1,
            )
            .returning(Job.id, Job.attempt, Job.owner_id, Job.kind)
            .execution_options(synchronize_session=False)
        )
        row = self._session.execute(taken).one_or_none()
        if row is None:
            return None
        self._session.add(JobAttempt(job_id=row.id, number=row.attempt, worker_id=worker_id))
        self._event_status(row.id, JobStatus.RUNNING, f"Attempt {row.attempt} has started.")
        return Claim(Fence(row.id, row.attempt), row.owner_id, row.kind)

    def guard(self, fence: Fence) -> Beat:
        """Lock the job for this transaction if the attempt still owns it.

        Raises:
            LeaseLost: another attempt owns it, or it has ended.
        """
        owned = self._owned(fence).values(version=Job.version + 1)
        return self._beat(fence, owned)

    def heartbeat(self, fence: Fence, *, lease_s: float) -> Beat:
        """Renew the lease and learn whether the user wants the job cancelled.

        Raises:
            LeaseLost: another attempt owns it, or it has ended; stop at once.
        """
        renewed = self._owned(fence).values(lease_until=db_now() + lease_s, heartbeat_at=db_now())
        return self._beat(fence, renewed)

    def set_phase(self, fence: Fence, phase: Phase) -> None:
        """Record what the job is doing; one event per change."""
        self.guard(fence)
        changed = self._owned(fence).where(or_(Job.phase.is_(None), Job.phase != phase))
        result = self._session.execute(changed.values(phase=phase).returning(Job.id))
        if result.one_or_none() is not None:
            append_event(
                self._session, fence.job_id, EventType.JOB_PHASE, f"Phase: {phase.value}.",
                data={"phase": phase.value},
            )  # fmt: skip

    def set_progress(self, fence: Fence, progress: dict[str, Any]) -> Beat:
        """Replace the job's progress."""
        return self._beat(
            fence, self._owned(fence).values(progress=progress, version=Job.version + 1)
        )

    def add_attention(self, fence: Fence, flag: str) -> None:
        """Raise a flag for people; a flag is raised once."""
        self.guard(fence)
        job = self._session.get_one(Job, fence.job_id, populate_existing=True)
        if flag not in job.attention:
            job.attention = [*job.attention, flag]

    def add_gpu_seconds(self, fence: Fence, seconds: float) -> None:
        """Charge device time to the job."""
        self._beat(fence, self._owned(fence).values(gpu_seconds=Job.gpu_seconds + seconds))

    def progressed(self, fence: Fence) -> None:
        """Forgive earlier losses: the job got further than before."""
        self._beat(fence, self._owned(fence).values(losses=0))

    def finish(
        self,
        fence: Fence,
        status: JobStatus,
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        exit_code: int | None = None,
        message: str,
    ) -> None:
        """End the job; exactly one attempt can.

        Raises:
            LeaseLost: another attempt owns the job; its output counts, ours is discarded.
        """
        self._leave(fence, status, result=result, error=error, finished_at=db_now(), phase=None)
        self._end_attempt(fence, AttemptOutcome(status.value), exit_code, error)
        self._event_status(
            fence.job_id, status, message, level="error" if status is JobStatus.FAILED else "info"
        )
        append_event(self._session, fence.job_id, EventType.DONE, "No more events.")

    def requeue(
        self,
        fence: Fence,
        outcome: AttemptOutcome,
        *,
        delay_s: float,
        failures: int = 0,
        exit_code: int | None = None,
        error: dict[str, Any] | None = None,
        message: str,
    ) -> None:
        """Give the job back to its queue.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        queue = self._leave(
            fence, JobStatus.QUEUED, run_after=db_now() + delay_s, failures=Job.failures + failures
        )
        self._end_attempt(fence, outcome, exit_code, error)
        self._event_status(fence.job_id, JobStatus.QUEUED, message, level="warn")
        self._owe_wake(queue, fence.job_id)

    def reap(self, *, max_losses: int, backoff_s: float, limit: int = 50) -> list[Reaped]:
        """Requeue, fail or cancel running jobs whose lease has run out."""
        expired = (
            select(Job.id, Job.attempt, Job.losses, Job.cancel_requested_at)
            .where(Job.status == JobStatus.RUNNING, Job.lease_until < db_now())
            .order_by(Job.lease_until)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        reaped = []
        for row in self._session.execute(expired).all():
            fence = Fence(row.id, row.attempt)
            error = {
                "code": FailureCode.WORKER_LOST.value,
                "message": f"attempt {row.attempt}: its worker stopped renewing the lease",
                "retryable": True,
            }
            if row.cancel_requested_at is not None:
                self._leave(fence, JobStatus.CANCELLED, finished_at=db_now(), phase=None)
                status, text = JobStatus.CANCELLED, "The job was cancelled; its worker is gone."
            elif row.losses + 1 >= max_losses:
                error["message"] = (
                    f"{row.losses + 1} attempts in a row lost their worker without any progress"
                )
                error["retryable"] = False
                self._leave(
                    fence, JobStatus.FAILED, finished_at=db_now(), phase=None, error=error,
                    losses=Job.losses + 1,
                )  # fmt: skip
                status, text = JobStatus.FAILED, str(error["message"])
            else:
                queue = self._leave(
                    fence,
                    JobStatus.QUEUED,
                    run_after=db_now() + backoff_s * (2**row.losses if row.losses else 0),
                    losses=Job.losses + 1,
                )
                self._owe_wake(queue, row.id)
                status, text = JobStatus.QUEUED, f"Attempt {row.attempt} lost its worker; requeued."
            self._end_attempt(fence, AttemptOutcome.LOST, None, error)
            self._event_status(row.id, status, text, level="warn")
            if status.is_terminal:
                append_event(self._session, row.id, EventType.DONE, "No more events.")
            reaped.append(Reaped(fence, status))
        return reaped

    def overdue_queues(self, *, older_than_s: float) -> list[QueueName]:
        """Return queues with a job that has been due for so long that its hint must be lost."""
        statement = (
            select(Job.queue)
            .where(Job.status == JobStatus.QUEUED, Job.run_after < db_now() - older_than_s)
            .distinct()
        )
        return list(self._session.execute(statement).scalars())

    # ------------------------------------------------------------------ inside

    def _owned(self, fence: Fence) -> Any:
        return (
            update(Job)
            .where(
                Job.id == fence.job_id,
                Job.attempt == fence.attempt,
                Job.status == JobStatus.RUNNING,
            )
            .execution_options(synchronize_session=False)
        )

    def _beat(self, fence: Fence, statement: Any) -> Beat:
        row = self._session.execute(statement.returning(Job.cancel_requested_at)).one_or_none()
        if row is None:
            raise LeaseLost(f"attempt {fence.attempt} no longer owns job {fence.job_id}")
        return Beat(cancel_requested=row[0] is not None)

    def _leave(self, fence: Fence, status: JobStatus, **values: Any) -> QueueName:
        if status not in JOB_TRANSITIONS[JobStatus.RUNNING]:
            raise ValueError(f"a running job cannot become {status.value}")
        moved = self._owned(fence).values(
            status=status,
            lease_owner=None,
            lease_until=None,
            version=Job.version + 1,
            **values,
        )
        row = self._session.execute(moved.returning(Job.queue)).one_or_none()
        if row is None:
            raise LeaseLost(f"attempt {fence.attempt} no longer owns job {fence.job_id}")
        queue: QueueName = row[0]
        return queue

    def _move(
        self, job_id: str, sources: Sequence[JobStatus], target: JobStatus, **values: Any
    ) -> bool:
        for source in sources:
            if target not in JOB_TRANSITIONS[source]:
                raise ValueError(f"a {source.value} job cannot become {target.value}")
        moved = (
            update(Job)
            .where(Job.id == job_id, Job.status.in_(sources))
            .values(status=target, version=Job.version + 1, **values)
            .returning(Job.id)
            .execution_options(synchronize_session=False)
        )
        return self._session.execute(moved).one_or_none() is not None

    def _end_attempt(
        self,
        fence: Fence,
        outcome: AttemptOutcome,
        exit_code: int | None,
        error: dict[str, Any] | None,
    ) -> None:
        self._session.execute(
            update(JobAttempt)
            .where(JobAttempt.job_id == fence.job_id, JobAttempt.number == fence.attempt)
            .values(ended_at=db_now(), outcome=outcome, exit_code=exit_code, error=error)
            .execution_options(synchronize_session=False)
        )

    def _event_status(
        self, job_id: str, status: JobStatus, message: str, *, level: str = "info"
    ) -> None:
        append_event(
            self._session, job_id, EventType.JOB_STATUS, message, level=level,
            data={"status": status.value},
        )  # fmt: skip

    def _owe_wake(self, queue: QueueName, job_id: str) -> None:
        self._session.add(Outbox(queue=queue, job_id=job_id))
