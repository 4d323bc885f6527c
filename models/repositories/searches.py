"""Searches while they run: their tasks, who has them, what came of them.

Whoever decides what comes next locks the study first (`lock`), so that "read, decide, write" is one
turn; between two turns any number of workers may train. A task needs no lease of its own: it
belongs to an attempt at a job, and is free again when that attempt has ended.
"""

from typing import Any

from sqlalchemy import ColumnElement, and_, func, select, update
from sqlalchemy.orm import Session

from core.errors import FailureCode, LeaseLost, NotFound
from core.ids import IdPrefix, new_id
from core.lifecycle import (
    AttemptOutcome,
    EndedBy,
    EventType,
    JobKind,
    JobStatus,
    TaskStatus,
    TrialStatus,
)
from models.experiment import RecommendationRow, StudyRow, TaskRow, TrialRow
from models.job import Job, JobAttempt
from models.repositories.events import append_event
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import Fence, JobRepository
from models.repositories.quotas import QuotaRepository
from models.repositories.task_records import TaskEnd as TaskEnd
from models.repositories.task_records import TaskRecord as TaskRecord
from models.repositories.task_records import TrialKey as TrialKey
from models.types import db_now


class SearchRepository:
    """Reads and writes of searches in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._jobs = JobRepository(session)

    # ---------------------------------------------------------------- studies

    def create(
        self,
        fence: Fence,
        *,
        owner_id: str,
        spec: dict[str, Any],
        plan: dict[str, Any],
        shape: str,
    ) -> StudyRow:
        """Return the job's study, made if missing; one that is there keeps its plan."""
        self._jobs.guard(fence)
        row = ExperimentRepository(self._session).study_of(fence.job_id)
        if row is None:
            study_id = new_id(IdPrefix.STUDY)
            row = StudyRow(
                id=study_id, owner_id=owner_id, job_id=fence.job_id, name=study_id, spec=spec,
                plan=plan, shape=shape,
            )  # fmt: skip
            self._session.add(row)
            self._session.flush()
            self._session.refresh(row)
        return row

    def of(self, study_id: str) -> StudyRow:
        """Return a study as it is now."""
        return self._session.get_one(StudyRow, study_id, populate_existing=True)

    def lock(self, study_id: str) -> StudyRow:
        """Return a study that nobody else decides about until this transaction ends.

        Raises:
            NotFound: there is no such study.
        """
        row = self._session.get(StudyRow, study_id, with_for_update=True, populate_existing=True)
        if row is None:
            raise NotFound(f"no study {study_id!r}")
        return row

    def elapsed(self, study: StudyRow) -> float:
        """Wall seconds since the search began."""
        seconds: float = self._session.execute(select(db_now() - study.created_at)).scalar_one()
        return max(seconds, 0.0)

    def is_open(self, study: StudyRow) -> bool:
        """Whether tasks may be started: the search goes on, and its job runs or is due to."""
        if study.ended_at is not None:
            return False
        status = select(Job.status).where(
            Job.id == study.job_id,
            Job.cancel_requested_at.is_(None),
            Job.pause_requested_at.is_(None),
        )
        found = self._session.execute(status).scalar_one_or_none()
        return found in (JobStatus.RUNNING, JobStatus.QUEUED)

    def quote(self, study: StudyRow, quote: dict[str, Any], message: str) -> None:
        """Keep what is promised at this moment, and tell whoever follows the job."""
        study.quotes = [*study.quotes, quote]
        # The job shows it as its estimate, also while it is queued.
        moved = update(Job).where(Job.id == study.job_id).values(version=Job.version + 1)
        self._session.execute(moved.execution_options(synchronize_session=False))
        append_event(
            self._session, study.job_id, EventType.STUDY_QUOTED, message,
            data={"study_id": study.id, **quote},
        )  # fmt: skip

    def end(self, study: StudyRow, *, by: str, reason: str) -> None:
        """Close a search: trials that wait for a longer rung have been pruned, and their tasks."""
        if study.ended_at is not None:
            return
        self._session.execute(
            update(TaskRow)
            .where(TaskRow.study_id == study.id, TaskRow.status == TaskStatus.WAITING)
            .values(status=TaskStatus.ENDED, ended_by=EndedBy.PRUNER, finished_at=db_now())
            .execution_options(synchronize_session=False)
        )
        study.ended_at = self._session.execute(select(db_now())).scalar_one()
        study.stopped_by, study.stop_reason = by, reason[:500]
        pruned = (
            update(TrialRow)
            .where(TrialRow.study_id == study.id, TrialRow.status == TrialStatus.WAITING)
            .values(
                status=TrialStatus.PRUNED,
                ended_by=EndedBy.PRUNER,
                finished_at=db_now(),
            )
            .returning(TrialRow.id)
            .execution_options(synchronize_session=False)
        )
        count = len(self._session.execute(pruned).all())
        append_event(
            self._session, study.job_id, EventType.TRIAL_PRUNED,
            f"The search has ended: {reason}. {count} trials did not go on to full length.",
            data={"study_id": study.id, "pruned": count, "stopped_by": by},
        )  # fmt: skip

    # ------------------------------------------------------------------ tasks

    def records(self, study_id: str) -> list[TaskRecord]:
        """Return all tasks of a study with their trials, oldest first."""
        return self._records(TaskRow.study_id == study_id)

    def _records(self, wanted: ColumnElement[bool]) -> list[TaskRecord]:
        statement = (
            select(TaskRow, TrialRow)
            .join(TrialRow, TrialRow.id == TaskRow.trial_id)
            .where(wanted)
            .order_by(TrialRow.number, TaskRow.rung)
            .execution_options(populate_existing=True)
        )
        return [TaskRecord(task, trial) for task, trial in self._session.execute(statement)]

    def reclaim(self, study: StudyRow, *, max_losses: int) -> list[TaskRow]:
        """Free the running tasks whose attempt has ended without finishing them; return them.

        A task whose worker was lost, or failed, `max_losses` times is given up: it may be what
        kills them.
        """
        left = (
            select(TaskRow, JobAttempt.outcome)
            .outerjoin(
                JobAttempt,
                and_(JobAttempt.job_id == TaskRow.job_id, JobAttempt.number == TaskRow.attempt),
            )
            .where(TaskRow.study_id == study.id, TaskRow.status == TaskStatus.RUNNING)
            .where(~_is_owned())
        )
        freed = []
        for task, outcome in self._session.execute(left).all():
            task.lost_seconds += task.seconds
            task.seconds = 0.0
            task.losses += outcome in (AttemptOutcome.LOST, AttemptOutcome.FAILED)
            task.status, task.job_id, task.attempt = TaskStatus.WAITING, None, None
            trial = self._session.get_one(TrialRow, task.trial_id)
            trial.status = TrialStatus.WAITING
            if task.losses >= max_losses:
                self._give_up(study, task, trial)
            freed.append(task)
        self._session.flush()
        return freed

    def _give_up(self, study: StudyRow, task: TaskRow, trial: TrialRow) -> None:
        task.status, task.ended_by = TaskStatus.ENDED, EndedBy.WORKER_LOST
        trial.status, trial.ended_by = TrialStatus.FAIL, EndedBy.WORKER_LOST
        trial.feasible = False
        task.finished_at, trial.finished_at = db_now(), db_now()
        append_event(
            self._session, study.job_id, EventType.TRIAL_FAILED,
            f"Trial {trial.number} is given up: {task.losses} workers were lost with it.",
            level="warn", data={"trial_id": trial.id, "number": trial.number},
        )  # fmt: skip

    def add(
        self,
        study: StudyRow,
        key: TrialKey,
        *,
        rung: int,
        start: int,
        setting: dict[str, Any],
        origin: str,
        candidate: dict[str, Any],
        reason: str,
    ) -> TaskRecord:
        """Insert a waiting task, and its trial where that is new."""
        trial = self._trial(study.id, key)
        if trial is None:
            count = select(func.count()).where(TrialRow.study_id == study.id)
            trial = TrialRow(
                id=new_id(IdPrefix.TRIAL), owner_id=study.owner_id, study_id=study.id,
                number=self._session.execute(count).scalar_one(), status=TrialStatus.WAITING,
                origin=origin, arm=key.arm, draw=key.draw, repeat=key.repeat, setting=setting,
                candidate=candidate,
            )  # fmt: skip
            self._session.add(trial)
            self._session.flush()
        task = TaskRow(
            id=new_id(IdPrefix.TASK), study_id=study.id, trial_id=trial.id, rung=rung, start=start,
            status=TaskStatus.WAITING, reason=reason[:200],
        )  # fmt: skip
        self._session.add(task)
        self._session.flush()
        return TaskRecord(task, trial)

    def _trial(self, study_id: str, key: TrialKey) -> TrialRow | None:
        statement = select(TrialRow).where(
            TrialRow.study_id == study_id,
            TrialRow.arm == key.arm,
            TrialRow.draw == key.draw,
            TrialRow.repeat == key.repeat,
        )
        return self._session.execute(statement).scalar_one_or_none()

    def take(
        self,
        fence: Fence,
        study: StudyRow,
        record: TaskRecord,
        *,
        limit_seconds: float | None,
        label: str,
    ) -> None:
        """Give a waiting task to an attempt.

        Raises:
            LeaseLost: the attempt does not own its job, or the task is not free.
        """
        self._jobs.guard(fence)
        taken = (
            update(TaskRow)
            .where(TaskRow.id == record.task.id, TaskRow.status == TaskStatus.WAITING)
            .values(
                status=TaskStatus.RUNNING, job_id=fence.job_id, attempt=fence.attempt,
                limit_seconds=limit_seconds, started_at=db_now(), seconds=0.0,
            )
            .returning(TaskRow.id)
        )  # fmt: skip
        if self._session.execute(taken).one_or_none() is None:
            raise LeaseLost(f"task {record.task.id} is not free")
        trial = record.trial
        trial.status = TrialStatus.RUNNING
        append_event(
            self._session, study.job_id, EventType.TRIAL_STARTED,
            f"Trial {trial.number} ({label}) trains from step {record.task.start}: "
            f"{record.task.reason}.",
            data={"trial_id": trial.id, "number": trial.number, "rung": record.task.rung},
        )  # fmt: skip

    def spend(self, fence: Fence, task_id: str, seconds: float) -> None:
        """Note what the present attempt at a task has cost so far.

        Raises:
            LeaseLost: the task is not this attempt's any more.
        """
        self._own(fence, task_id, seconds=seconds)

    def finish(self, fence: Fence, study: StudyRow, record: TaskRecord, end: TaskEnd) -> None:
        """Store what came of a task.

        Raises:
            LeaseLost: the attempt does not own its job, or the task is not its any more.
        """
        self._jobs.guard(fence)
        self._own(
            fence, record.task.id, status=TaskStatus.ENDED, ended_by=end.ended_by,
            seconds=end.seconds, log_loss=end.log_loss, drift=end.drift, metrics=end.metrics,
            finished_at=db_now(),
        )  # fmt: skip
        trial = self._session.get_one(TrialRow, record.trial.id, populate_existing=True)
        measured = end.ended_by is EndedBy.BUDGET
        trial.gpu_seconds += end.seconds
        trial.status = end.trial_status
        if measured:
            trial.rung, trial.log_loss, trial.drift = record.task.rung, end.log_loss, end.drift
            trial.metrics = end.metrics
        else:  # figures are those of the rung before, with why it went no further
            trial.metrics = {**trial.metrics, **end.metrics}
        trial.feasible = end.feasible
        if trial.status is not TrialStatus.WAITING:
            trial.ended_by, trial.finished_at = end.ended_by, db_now()
        self._charge(study, end.seconds)
        self._jobs.progressed(fence)
        says = (
            f"log-loss {end.log_loss:.4f} after step {end.metrics['steps']:.0f}"
            if measured
            else f"ended by {end.ended_by.value}"
        )
        append_event(
            self._session, study.job_id,
            EventType.TRIAL_COMPLETED if measured else EventType.TRIAL_FAILED,
            f"Trial {trial.number}: {says}.", level="info" if measured else "warn",
            data={
                "trial_id": trial.id, "number": trial.number, "rung": record.task.rung,
                "log_loss": end.log_loss,
            },
        )  # fmt: skip

    def _charge(self, study: StudyRow, seconds: float) -> None:
        """Device time of a search is its job's, whoever worked; so is the progress."""
        charged = update(Job).where(Job.id == study.job_id)
        self._session.execute(
            charged.values(
                gpu_seconds=Job.gpu_seconds + seconds, losses=0, version=Job.version + 1
            ).execution_options(synchronize_session=False)
        )
        QuotaRepository(self._session).charge(study.job_id, seconds)

    def _own(self, fence: Fence, task_id: str, **values: Any) -> None:
        owned = (
            update(TaskRow)
            .where(
                TaskRow.id == task_id,
                TaskRow.status == TaskStatus.RUNNING,
                TaskRow.job_id == fence.job_id,
                TaskRow.attempt == fence.attempt,
            )
            .values(**values)
            .returning(TaskRow.id)
        )
        if self._session.execute(owned).one_or_none() is None:
            raise LeaseLost(f"task {task_id} is not of attempt {fence.attempt} at {fence.job_id}")

    # ---------------------------------------------------------------- helpers

    def open_helpers(self, parent_id: str) -> int:
        """Return how many jobs help the search of a job, or are queued to."""
        statement = select(func.count()).where(
            Job.parent_id == parent_id,
            Job.kind == JobKind.SEARCH,
            Job.status.in_((JobStatus.QUEUED, JobStatus.RUNNING)),
        )
        return self._session.execute(statement).scalar_one()

    def failed_helpers(self, parent_id: str) -> int:
        """Return how many jobs could not help the search of a job, dead workers aside."""
        statement = select(Job.error).where(
            Job.parent_id == parent_id, Job.kind == JobKind.SEARCH, Job.status == JobStatus.FAILED
        )
        codes = [(error or {}).get("code") for error in self._session.execute(statement).scalars()]
        return sum(code != FailureCode.WORKER_LOST.value for code in codes)

    # ---------------------------------------------------------------- history

    def finished(
        self, owner_id: str, *, limit: int
    ) -> list[tuple[RecommendationRow, list[TaskRecord]]]:
        """Return the owner's latest ended searches, each with the recommendation it began from."""
        statement = (
            select(StudyRow.id, RecommendationRow)
            .join(RecommendationRow, RecommendationRow.job_id == StudyRow.job_id)
            .where(StudyRow.owner_id == owner_id, StudyRow.ended_at.is_not(None))
            .order_by(StudyRow.created_at.desc(), StudyRow.id.desc())
            .limit(limit)
        )
        found = self._session.execute(statement).all()
        records: dict[str, list[TaskRecord]] = {study_id: [] for study_id, _ in found}
        for record in self._records(TaskRow.study_id.in_(records)):
            records[record.task.study_id].append(record)
        return [(recommendation, records[study_id]) for study_id, recommendation in found]


def _is_owned() -> ColumnElement[bool]:
    """Whether the attempt that has a task still owns its job."""
    return (
        select(Job.id)
        .where(
            Job.id == TaskRow.job_id,
            Job.attempt == TaskRow.attempt,
            Job.status == JobStatus.RUNNING,
        )
        .exists()
    )
