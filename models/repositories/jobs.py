"""Jobs: create, claim, heartbeat, finish, requeue. Every move is a compare-and-set."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, or_, select

from core.errors import Conflict, LeaseLost
from core.ids import IdPrefix, new_id
from core.lifecycle import AttemptOutcome, EventType, JobKind, JobStatus, Phase
from core.queue import QUEUE_OF_KIND, QueueName
from models.job import Job, JobAttempt
from models.repositories.events import append_event
from models.repositories.job_claims import Claim as Claim
from models.repositories.job_claims import JobClaims
from models.repositories.job_moves import Beat as Beat
from models.repositories.job_moves import Fence as Fence
from models.repositories.job_moves import worker_lost
from models.repositories.job_pages import JobFilter
from models.repositories.job_pauses import JobPauses
from models.repositories.job_requests import JobRequests
from models.repositories.paging import Page, PageQuery, fetch_page, fetch_page_by_age
from models.repositories.quotas import QuotaRepository
from models.repositories.replays import note_made
from models.types import db_now

ID_OF_KIND = {
    JobKind.DATASET: IdPrefix.JOB,
    JobKind.RECOMMENDATION: IdPrefix.RECOMMENDATION,
    JobKind.TRAINING: IdPrefix.FINE_TUNING_JOB,
    JobKind.EXPORT: IdPrefix.JOB,
    JobKind.EVALUATION: IdPrefix.EVALUATION,
    JobKind.SEARCH: IdPrefix.JOB,
}
_BEGINNINGS = {
    JobStatus.DRAFT: "The job is a draft; resume it to queue it.",
    JobStatus.VALIDATING_FILES: "The job waits for its data to be validated.",
    JobStatus.QUEUED: "The job is queued.",
}
# All that they need is in their spec.
REPEATABLE = frozenset(
    {JobKind.RECOMMENDATION, JobKind.TRAINING, JobKind.EXPORT, JobKind.EVALUATION}
)


@dataclass(frozen=True)
class Reaped:
    """A job whose lease ran out, and what became of it."""

    fence: Fence
    status: JobStatus


class JobRepository(JobClaims, JobPauses, JobRequests):
    """All reads and writes of jobs in one transaction."""

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
        after_validation: bool = False,
        draft: bool = False,
        parent_id: str | None = None,
        priority: int = 0,
    ) -> Job:
        """Insert a queued job with its first event and the wake-up its queue is owed.

        With `after_validation` it waits until its dataset is validated: it is queued when that can
        be used, else it fails. A draft waits until it is resumed.

        Raises:
            QuotaExceeded: the owner has too many waiting jobs, or no device time left.
        """
        if parent_id is None:
            QuotaRepository(self._session).admit_job(owner_id, kind)
        status = JobStatus.VALIDATING_FILES if after_validation else JobStatus.QUEUED
        if draft:
            status = JobStatus.DRAFT
        job = Job(
            id=job_id or new_id(ID_OF_KIND[kind]),
            owner_id=owner_id,
            kind=kind,
            queue=QUEUE_OF_KIND[kind],
            status=status,
            spec=spec,
            dataset_id=dataset_id,
            model=model,
            seed=seed,
            labels=metadata or {},
            parent_id=parent_id,
            priority=priority,
            queued_at=db_now() if status is JobStatus.QUEUED else None,
        )
        self._session.add(job)
        self._session.flush()
        if parent_id is None:
            note_made(self._session, job)
        self._event_status(job.id, status, _BEGINNINGS[status])
        if status is JobStatus.QUEUED:
            self._owe_wake(job.queue, job.id)
        self._session.refresh(job)
        return job

    def page(self, owner_id: str, query: PageQuery, where: JobFilter | None = None) -> Page[Job]:
        """Return one page of the owner's jobs; ids of one kind sort by age, those of all do not."""
        statement: Select[Job] = select(Job).where(Job.owner_id == owner_id)
        if where is not None:
            statement = statement.where(*where.conditions())
        if where is None or where.kind is None:
            return fetch_page_by_age(self._session, statement, Job.created_at, Job.id, query)
        return fetch_page(self._session, statement, Job.id, query)

    def retry(self, job: Job) -> Job:
        """Queue a new job that does what one that has failed or was cancelled should have done.

        A job that has ended stays as it is; the new one names it in `retry_of`.

        Raises:
            Conflict: the job can go on itself, has succeeded, or cannot be repeated on its own.
            QuotaExceeded: the owner has too many waiting jobs, or no device time left.
        """
        if job.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            raise Conflict(
                f"job {job.id} is {job.status.value}; only one that has failed or was cancelled "
                "can be retried",
                code="job_not_retryable",
                hint="a paused job is resumed, a failed attempt of a running one repeats itself",
            )
        if job.kind not in REPEATABLE:
            raise Conflict(
                f"job {job.id} is of kind {job.kind.value}, which is not repeated on its own",
                code="job_not_retryable",
                hint="make again what it was for, e.g. by a new version of the dataset",
            )
        return self.create(
            owner_id=job.owner_id,
            kind=job.kind,
            spec={**job.spec, "retry_of": job.id},
            dataset_id=job.dataset_id,
            model=job.model,
            seed=job.seed,
            metadata=job.labels,
            priority=job.priority,
        )

    # --------------------------------------------------------- by the workers

    def guard(self, fence: Fence) -> Beat:
        """Lock the job for this transaction if the attempt still owns it.

        The job that it helps, if there is one, is locked first: whoever ends that one locks it
        and then its helpers, and two orders would be a deadlock.

        Raises:
            LeaseLost: another attempt owns it, or it has ended.
        """
        helps = select(Job.parent_id).where(Job.id == fence.job_id).scalar_subquery()
        self._session.execute(select(Job.id).where(Job.id == helps).with_for_update(key_share=True))
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
        QuotaRepository(self._session).charge(fence.job_id, seconds)

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
        self._end(
            fence, status, AttemptOutcome(status.value), result=result, error=error,
            exit_code=exit_code, message=message,
        )  # fmt: skip

    def requeue(
        self,
        fence: Fence,
        outcome: AttemptOutcome,
        *,
        delay_s: float,
        exit_code: int | None = None,
        error: dict[str, Any] | None = None,
        message: str,
    ) -> JobStatus:
        """Give the job back to its queue, or cancel it if that was asked; return its status.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        return self._give_back(
            fence, outcome, delay_s=delay_s, exit_code=exit_code, error=error, message=message
        )

    def fail(
        self,
        fence: Fence,
        error: dict[str, Any],
        *,
        max_retries: int,
        backoff_s: float,
        exit_code: int | None = None,
    ) -> JobStatus:
        """Try the job again after a growing pause if its error may pass by, else end it.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        row = self._lock(fence)
        text = str(error["message"])
        if error["retryable"] and row.failures < max_retries:
            return self._give_back(
                fence, AttemptOutcome.RETRY, error=error, exit_code=exit_code,
                failures=row.failures + 1, delay_s=backoff_s * 2**row.failures,
                message=f"Attempt {fence.attempt} failed and will be repeated: {text}",
            )  # fmt: skip
        self.finish(fence, JobStatus.FAILED, error=error, exit_code=exit_code, message=text)
        return JobStatus.FAILED

    def lose(
        self,
        fence: Fence,
        *,
        message: str,
        log_tail: list[str],
        max_losses: int,
        backoff_s: float,
        exit_code: int | None = None,
    ) -> JobStatus:
        """Note that the attempt's process died without a word; return the job's status.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        return self._lose(
            fence, error={**worker_lost(fence, message), "log_tail": log_tail},
            max_losses=max_losses, backoff_s=backoff_s, exit_code=exit_code,
        )  # fmt: skip

    def reap(self, *, max_losses: int, backoff_s: float, limit: int = 50) -> list[Reaped]:
        """Requeue, fail or cancel running jobs whose lease has run out."""
        expired = (
            select(Job.id, Job.attempt)
            .where(Job.status == JobStatus.RUNNING, Job.lease_until < db_now())
            .order_by(Job.lease_until)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        reaped = []
        for row in self._session.execute(expired).all():
            fence = Fence(row.id, row.attempt)
            error = worker_lost(fence, "its worker stopped renewing the lease")
            status = self._lose(fence, error=error, max_losses=max_losses, backoff_s=backoff_s)
            reaped.append(Reaped(fence, status))
        return reaped

    def load(self, fence: Fence) -> Job:
        """Return the job for the attempt that owns it.

        Raises:
            LeaseLost: another attempt owns it, or it has ended.
        """
        owned = select(Job).where(
            Job.id == fence.job_id,
            Job.attempt == fence.attempt,
            Job.status == JobStatus.RUNNING,
        )
        job = self._session.execute(owned).scalar_one_or_none()
        if job is None:
            raise LeaseLost(f"attempt {fence.attempt} does not own job {fence.job_id}")
        return job

    def attempt_outcome(self, fence: Fence) -> AttemptOutcome | None:
        """Return how an attempt ended, None while it has not."""
        ended = select(JobAttempt.outcome).where(
            JobAttempt.job_id == fence.job_id, JobAttempt.number == fence.attempt
        )
        return self._session.execute(ended).scalar_one_or_none()

    def overdue_queues(self, *, older_than_s: float) -> list[QueueName]:
        """Return queues with a job that has been due for so long that its hint must be lost."""
        statement = (
            select(Job.queue)
            .where(Job.status == JobStatus.QUEUED, Job.run_after < db_now() - older_than_s)
            .distinct()
        )
        return list(self._session.execute(statement).scalars())
