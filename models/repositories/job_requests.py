"""What people ask of a job that is there: to be cancelled, to be paused."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sqlalchemy import bindparam, select, update

from core.errors import Conflict, NotFound
from core.lifecycle import JobKind, JobStatus
from core.queue import QueueName
from models.job import Job
from models.repositories.job_moves import JobMoves
from models.types import db_now


@dataclass(frozen=True)
class JobPulse:
    """What changes with everything that a job's view shows, except for its place in the queue."""

    id: str
    owner_id: str
    kind: JobKind
    status: JobStatus
    queue: QueueName
    run_after: float
    version: int
    event_seq: int
    heartbeat_at: float | None
    lease_until: float | None
    gpu_seconds: float


T = TypeVar("T", Job, JobPulse)
# Asked with every poll of a job: it is put together once, and makes no object of the ORM.
_PULSE = select(*(getattr(Job, field.name) for field in fields(JobPulse))).where(
    Job.id == bindparam("job_id")
)


class JobRequests(JobMoves):
    """Reads of one job, and requests about it; each call needs a transaction."""

    def get(self, owner_id: str, job_id: str, *, kind: JobKind | None = None) -> Job:
        """Return the owner's job.

        Raises:
            NotFound: no such job, another kind, or somebody else's.
        """
        return _seen(self._session.get(Job, job_id), owner_id, job_id, kind)

    def pulse(self, owner_id: str, job_id: str, *, kind: JobKind | None = None) -> JobPulse:
        """Return what tells whether the owner's job has changed.

        Raises:
            NotFound: no such job, another kind, or somebody else's.
        """
        row = self._session.execute(_PULSE, {"job_id": job_id}).one_or_none()
        return _seen(None if row is None else JobPulse(*row), owner_id, job_id, kind)

    def lock(self, owner_id: str, job_id: str, *, kind: JobKind | None = None) -> Job:
        """Return the owner's job as it is now; nobody moves it until this transaction ends.

        Raises:
            NotFound: no such job, another kind, or somebody else's.
        """
        self._session.get(Job, job_id, with_for_update=True, populate_existing=True)
        return self.get(owner_id, job_id, kind=kind)

    def request_cancel(
        self, owner_id: str, job_id: str, *, options: dict[str, Any] | None = None
    ) -> Job:
        """Cancel a waiting job at once, ask a running one to stop at its next step.

        `options` are `mode` and `keep_checkpoints`; those of the last request count.

        Raises:
            NotFound: no such job.
            Conflict: the job has already ended otherwise.
        """
        # Locked, or a job that is just being given back to its queue is neither one that waits
        # nor one that runs for the two updates below.
        job = self.lock(owner_id, job_id)
        if job.status is JobStatus.CANCELLED:
            return job
        if job.status.is_terminal:
            raise Conflict(
                f"job {job_id} has already {job.status.value}; only a job that has not ended can "
                "be cancelled",
                code="job_not_cancellable",
            )
        if options is not None:
            self._write(job_id, cancel_options=options)
        waiting = self._move(
            job_id,
            (JobStatus.DRAFT, JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.PAUSED),
            JobStatus.CANCELLED,
            cancel_requested_at=db_now(),
            finished_at=db_now(),
        )
        if waiting:
            self._ended(job_id, JobStatus.CANCELLED, "The job was cancelled.")
        elif job.cancel_requested_at is None:
            self._write(job_id, cancel_requested_at=db_now())
        self._session.refresh(job)
        return job

    def request_pause(self, job: Job) -> Job:
        """Lay a queued job aside, ask a running one to save and stop; `job` must be locked.

        Raises:
            Conflict: the job has ended, is to be cancelled, or waits for its data.
        """
        if job.status is JobStatus.PAUSED:
            return job
        if job.status not in (JobStatus.QUEUED, JobStatus.RUNNING) or job.cancel_requested_at:
            state = "to be cancelled" if job.cancel_requested_at else job.status.value
            raise Conflict(
                f"job {job.id} is {state}; only a queued or running job can be paused",
                code="job_not_pausable",
            )
        if self._move(job.id, (JobStatus.QUEUED,), JobStatus.PAUSED):
            self._event_status(job.id, JobStatus.PAUSED, "The job was paused.")
            self._stop_helpers(job.id)
        elif job.pause_requested_at is None:
            self._write(job.id, pause_requested_at=db_now())
        self._session.refresh(job)
        return job

    def _write(self, job_id: str, **values: Any) -> None:
        self._session.execute(
            update(Job)
            .where(Job.id == job_id)
            .values(version=Job.version + 1, **values)
            .execution_options(synchronize_session=False)
        )


def _seen(found: T | None, owner_id: str, job_id: str, kind: JobKind | None) -> T:
    """Return what was found of a job where the owner may see it."""
    if found is None or found.owner_id != owner_id or (kind and found.kind is not kind):
        raise NotFound(f"no job {job_id!r}", hint="list your jobs to see their ids")
    return found
