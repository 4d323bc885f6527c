"""Pauses: a job that a person must help first is laid aside whole, and resumed where it was."""

from typing import Any

from sqlalchemy import func, select, update

from core.errors import Category, Conflict
from core.lifecycle import (
    AttemptOutcome,
    Attention,
    DatasetStatus,
    EventType,
    JobKind,
    JobStatus,
)
from models.dataset import Dataset
from models.job import Job
from models.repositories.events import append_event
from models.repositories.job_moves import Fence, JobMoves
from models.repositories.quotas import QuotaRepository
from models.types import db_now


class JobPauses(JobMoves):
    """The two moves around `paused`; each call needs a transaction."""

    def pause(
        self,
        fence: Fence,
        error: dict[str, Any],
        *,
        data: dict[str, Any],
        exit_code: int | None = None,
    ) -> JobStatus:
        """Lay a running job aside for want of disk space; return its status.

        It counts neither as a failure nor as a loss, and steps and resume points stay. `error` is
        shown by the job until it is resumed, `data` by the event. A job that was to be cancelled
        is cancelled instead.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        row = self._lock(fence)
        if row.cancel_requested_at is not None:
            self._end(
                fence, JobStatus.CANCELLED, AttemptOutcome.CANCELLED, exit_code=exit_code,
                message="The job was cancelled.",
            )  # fmt: skip
            return JobStatus.CANCELLED
        job = self._session.get_one(Job, fence.job_id, populate_existing=True)
        self._leave(
            fence, JobStatus.PAUSED, error=error, phase=None,
            attention=[*_without_low_disk(job), Attention.LOW_DISK.value],
        )  # fmt: skip
        self._end_attempt(fence, AttemptOutcome.PAUSED, exit_code, error)
        self._tell_dataset(fence.job_id, _failure(error))
        append_event(
            self._session, fence.job_id, EventType.JOB_STATUS,
            f"The job is paused: {error['message']}. {error['hint']}.", level="error",
            data={"status": JobStatus.PAUSED.value, "code": error["code"], **data},
        )  # fmt: skip
        return JobStatus.PAUSED

    def resume(self, job: Job) -> Job:
        """Queue a paused job again, or a draft; one that is queued or runs already goes on.

        Raises:
            Conflict: the job has ended.
            QuotaExceeded: the owner has too many waiting jobs, or no device time left.
        """
        # Locked, or a cancel at the same moment would be undone.
        self._session.get(Job, job.id, with_for_update=True, populate_existing=True)
        if job.status.is_terminal:
            raise Conflict(
                f"job {job.id} has already {job.status.value}; only a paused job can be resumed",
                code="job_not_resumable",
            )
        if job.status in (JobStatus.DRAFT, JobStatus.PAUSED):
            QuotaRepository(self._session).admit_job(job.owner_id, job.kind)
        resumed = self._move(
            job.id, (JobStatus.DRAFT, JobStatus.PAUSED), JobStatus.QUEUED, error=None,
            run_after=db_now(), attention=_without_low_disk(job),
            queued_at=func.coalesce(Job.queued_at, db_now()),
        )  # fmt: skip
        if resumed:
            self._tell_dataset(job.id, None)
            self._event_status(job.id, JobStatus.QUEUED, "The job was resumed and is queued again.")
            self._owe_wake(job.queue, job.id)
        elif job.pause_requested_at is not None:
            # The attempt may have been told to stop already: then another one goes on.
            asked = update(Job).where(Job.id == job.id, Job.status == JobStatus.RUNNING)
            self._session.execute(
                asked.values(pause_requested_at=None, version=Job.version + 1).execution_options(
                    synchronize_session=False
                )
            )
        self._session.refresh(job)
        return job

    def _tell_dataset(self, job_id: str, failure: dict[str, Any] | None) -> None:
        """Let the dataset of a validation say what it waits for."""
        validates = select(Job.id).where(Job.id == job_id, Job.kind == JobKind.DATASET).exists()
        self._session.execute(
            update(Dataset)
            .where(Dataset.job_id == job_id, Dataset.status == DatasetStatus.VALIDATING, validates)
            .values(failure=failure)
            .execution_options(synchronize_session=False)
        )


def _without_low_disk(job: Job) -> list[str]:
    return [flag for flag in job.attention if flag != Attention.LOW_DISK.value]


def _failure(error: dict[str, Any]) -> dict[str, Any]:
    named = {name: error[name] for name in ("code", "message", "hint")}
    return {"category": Category.STORAGE_FULL.value, **named, "errors": []}
