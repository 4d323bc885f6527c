"""Moves of a running or waiting job: compare-and-set, with the attempt, events and wake-ups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.errors import Category, FailureCode, LeaseLost
from core.lifecycle import (
    JOB_TRANSITIONS,
    AttemptOutcome,
    DatasetStatus,
    EventType,
    JobKind,
    JobStatus,
)
from core.queue import QueueName
from models.dataset import Dataset
from models.experiment import Checkpoint
from models.job import Job, JobAttempt, Outbox
from models.repositories.events import append_event
from models.types import db_now


@dataclass(frozen=True)
class Fence:
    """Which attempt at which job is writing; a write with an old fence is refused."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class Beat:
    """What the heartbeat brings back."""

    cancel_requested: bool
    cancel_forced: bool = False
    pause_requested: bool = False


class JobMoves:
    """What the repository's public methods are made of; each call needs a transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

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
        asked = (Job.cancel_requested_at, Job.cancel_options, Job.pause_requested_at)
        row = self._session.execute(statement.returning(*asked)).one_or_none()
        if row is None:
            raise _lost(fence)
        return Beat(
            cancel_requested=row[0] is not None,
            cancel_forced=row[0] is not None and (row[1] or {}).get("mode") == "force",
            pause_requested=row[2] is not None,
        )

    def _lock(self, fence: Fence) -> Any:
        """Lock an owned job and return what decides where it goes next."""
        owned = (
            select(
                Job.kind,
                Job.queue,
                Job.failures,
                Job.losses,
                Job.cancel_requested_at,
                Job.pause_requested_at,
            )
            .where(
                Job.id == fence.job_id,
                Job.attempt == fence.attempt,
                Job.status == JobStatus.RUNNING,
            )
            .with_for_update()
        )
        row = self._session.execute(owned).one_or_none()
        if row is None:
            raise _lost(fence)
        return row

    def _end(
        self,
        fence: Fence,
        status: JobStatus,
        outcome: AttemptOutcome,
        *,
        message: str,
        result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        exit_code: int | None = None,
        **values: Any,
    ) -> None:
        """Bring a running job to a terminal state."""
        ended = {"result": result, "error": error, "finished_at": db_now(), "phase": None}
        self._leave(fence, status, **ended, **values)
        self._end_attempt(fence, outcome, exit_code, error)
        self._ended(fence.job_id, status, message, error=error)

    def _give_back(
        self,
        fence: Fence,
        outcome: AttemptOutcome,
        *,
        message: str,
        delay_s: float,
        error: dict[str, Any] | None = None,
        exit_code: int | None = None,
        **values: Any,
    ) -> JobStatus:
        """Return a running job to its queue, unless it was to be cancelled or paused."""
        row = self._lock(fence)
        if row.cancel_requested_at is not None:
            lost = outcome is AttemptOutcome.LOST
            self._end(
                fence, JobStatus.CANCELLED, outcome if lost else AttemptOutcome.CANCELLED,
                exit_code=exit_code, message="The job was cancelled.",
            )  # fmt: skip
            return JobStatus.CANCELLED
        if row.pause_requested_at is not None:
            self._leave(fence, JobStatus.PAUSED, pause_requested_at=None, phase=None, **values)
            preempted = outcome is AttemptOutcome.PREEMPTED
            self._end_attempt(
                fence, AttemptOutcome.PAUSED if preempted else outcome, exit_code, error
            )
            self._event_status(fence.job_id, JobStatus.PAUSED, "The job was paused.")
            return JobStatus.PAUSED
        self._leave(fence, JobStatus.QUEUED, run_after=db_now() + delay_s, **values)
        self._end_attempt(fence, outcome, exit_code, error)
        self._event_status(
            fence.job_id, JobStatus.QUEUED, message, level="warn", outcome=outcome.value
        )
        self._owe_wake(row.queue, fence.job_id)
        return JobStatus.QUEUED

    def _lose(
        self,
        fence: Fence,
        *,
        error: dict[str, Any],
        max_losses: int,
        backoff_s: float,
        exit_code: int | None = None,
    ) -> JobStatus:
        """Count a loss: back to the queue, or `worker_lost` when it happens again and again.

        A job that helps a search ends: whoever goes on with the search asks for help again, and a
        machine that loses one after the other is soon given none.
        """
        row = self._lock(fence)
        losses = row.losses + 1
        if row.kind is JobKind.SEARCH and row.cancel_requested_at is None:
            self._end(
                fence, JobStatus.FAILED, AttemptOutcome.LOST, exit_code=exit_code, losses=losses,
                error={**error, "retryable": False},
                message="The helper lost its worker; the search goes on without it.",
            )  # fmt: skip
            return JobStatus.FAILED
        if row.cancel_requested_at is None and losses >= max_losses:
            message = f"{losses} attempts in a row lost their worker without any progress"
            error = {**error, "message": f"{message}; the last one: {error['message']}"}
            self._end(
                fence, JobStatus.FAILED, AttemptOutcome.LOST, message=message,
                error={**error, "retryable": False}, exit_code=exit_code, losses=losses,
            )  # fmt: skip
            return JobStatus.FAILED
        return self._give_back(
            fence, AttemptOutcome.LOST, error=error, exit_code=exit_code, losses=losses,
            message=f"Attempt {fence.attempt} lost its worker; the job is queued again.",
            delay_s=backoff_s * 2**row.losses if row.losses else 0.0,
        )  # fmt: skip

    def _leave(self, fence: Fence, status: JobStatus, **values: Any) -> None:
        if status not in JOB_TRANSITIONS[JobStatus.RUNNING]:
            raise ValueError(f"a running job cannot become {status.value}")
        moved = self._owned(fence).values(
            status=status,
            lease_owner=None,
            lease_until=None,
            version=Job.version + 1,
            **values,
        )
        if self._session.execute(moved.returning(Job.id)).one_or_none() is None:
            raise _lost(fence)
        if status is JobStatus.PAUSED:
            self._stop_helpers(fence.job_id)

    def _stop_helpers(self, job_id: str) -> None:
        """End the jobs that help one: those that wait at once, others at their next step."""
        for status in (JobStatus.QUEUED, JobStatus.RUNNING):
            helpers = (
                update(Job)
                .where(Job.parent_id == job_id, Job.kind == JobKind.SEARCH, Job.status == status)
                .values(cancel_requested_at=db_now(), version=Job.version + 1)
                .returning(Job.id)
                .execution_options(synchronize_session=False)
            )
            for helper_id in self._session.execute(helpers).scalars().all():
                if self._move(
                    helper_id, (JobStatus.QUEUED,), JobStatus.CANCELLED, finished_at=db_now()
                ):
                    self._ended(helper_id, JobStatus.CANCELLED, "The search needs no help.")

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

    def _ended(
        self, job_id: str, status: JobStatus, message: str, *, error: dict[str, Any] | None = None
    ) -> None:
        """Tell whoever waits for the job; the dataset of a job that never judged it is invalid."""
        level = "error" if status is JobStatus.FAILED else "info"
        self._event_status(job_id, status, message, level=level)
        append_event(self._session, job_id, EventType.DONE, "No more events.")
        self._stop_helpers(job_id)
        if status is JobStatus.CANCELLED:
            self._drop_unwanted(job_id)
        if status is not JobStatus.SUCCEEDED:
            self._give_up_dataset(job_id, status, message, error=error)
        self._release_waiting(job_id)

    def _drop_unwanted(self, job_id: str) -> None:
        """Delete the checkpoints of a job whose cancel was to keep none."""
        options = select(Job.cancel_options).where(Job.id == job_id)
        if (self._session.execute(options).scalar_one() or {}).get("keep_checkpoints", True):
            return
        self._session.execute(
            update(Checkpoint)
            .where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
            .values(deleted_at=db_now(), files=[], bytes=0)
            .execution_options(synchronize_session=False)
        )

    def _give_up_dataset(
        self, job_id: str, status: JobStatus, message: str, *, error: dict[str, Any] | None
    ) -> None:
        reason = error or {"code": status.value, "message": message, "hint": "upload it again"}
        failure: dict[str, Any] = {
            "category": Category.RUN_ABORTED.value,
            **{name: reason.get(name) for name in ("code", "message", "hint")},
            "errors": [],
        }
        self._session.execute(
            update(Dataset)
            .where(
                Dataset.job_id == job_id,
                Dataset.status == DatasetStatus.VALIDATING,
                select(Job.id).where(Job.id == job_id, Job.kind == JobKind.DATASET).exists(),
            )
            .values(status=DatasetStatus.INVALID, failure=failure)
            .execution_options(synchronize_session=False)
        )

    def _release_waiting(self, validation_id: str) -> None:
        """Queue the jobs that waited for the dataset of a validation, or fail them with it."""
        settled = (
            select(
                Job.id, Job.queue, Dataset.id.label("dataset_id"), Dataset.status, Dataset.failure
            )
            .join(Dataset, Dataset.id == Job.dataset_id)
            .where(
                Dataset.job_id == validation_id,
                Dataset.status != DatasetStatus.VALIDATING,
                Job.status == JobStatus.VALIDATING_FILES,
            )
        )
        for row in self._session.execute(settled).all():
            waits = (JobStatus.VALIDATING_FILES,)
            if row.status.is_usable:
                moved = self._move(
                    row.id, waits, JobStatus.QUEUED, queued_at=db_now(), run_after=db_now()
                )
                if moved:
                    self._event_status(row.id, JobStatus.QUEUED, "The data are valid: queued.")
                    self._owe_wake(row.queue, row.id)
                continue
            error = _unusable(row.dataset_id, row.status, row.failure or {})
            if self._move(row.id, waits, JobStatus.FAILED, error=error, finished_at=db_now()):
                self._ended(row.id, JobStatus.FAILED, error["message"], error=error)

    def _event_status(
        self, job_id: str, status: JobStatus, message: str, *, level: str = "info", **more: str
    ) -> None:
        append_event(
            self._session, job_id, EventType.JOB_STATUS, message, level=level,
            data={"status": status.value, **more},
        )  # fmt: skip

    def _owe_wake(self, queue: QueueName, job_id: str) -> None:
        self._session.add(Outbox(queue=queue, job_id=job_id))


def _lost(fence: Fence) -> LeaseLost:
    return LeaseLost(f"attempt {fence.attempt} no longer owns job {fence.job_id}")


def _unusable(dataset_id: str, status: DatasetStatus, failure: dict[str, Any]) -> dict[str, Any]:
    """Return the error of a job whose dataset turned out to be of no use."""
    return {
        "code": failure.get("code") or "dataset_not_ready",
        "message": failure.get("message") or f"dataset {dataset_id} is {status.value}",
        "hint": f"read GET /v1/datasets/{dataset_id}/report",
        "param": failure.get("param"),
        "retryable": False,
        "errors": failure.get("errors") or [],
    }


def worker_lost(fence: Fence, message: str) -> dict[str, Any]:
    """Return the error of a job whose attempt died without a word."""
    return {
        "code": FailureCode.WORKER_LOST.value,
        "message": f"attempt {fence.attempt}: {message}",
        "hint": "the log of the attempt may say why; a machine out of memory is the usual cause",
        "retryable": True,
        "phase": None,
        "attempt": fence.attempt,
        "errors": [],
    }
