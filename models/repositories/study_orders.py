"""What a person asks of a search while it runs: other limits, a trial by hand, a second chance.

Every order holds the lock of the study, as those do who decide what comes next: an order is before
or after a decision, never in the middle of one.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.errors import Conflict
from core.lifecycle import EndedBy, EventType, TaskStatus, TrialStatus
from models.experiment import StudyRow, TaskRow, TrialRow
from models.job import Job
from models.repositories.events import append_event
from models.repositories.experiments import ExperimentRepository
from models.repositories.searches import SearchRepository, TrialKey
from models.repositories.studies import StudyRepository

HAND = "hand"


@dataclass(frozen=True)
class AskedTrial:
    """What a trial by hand trains, and the rung that drawn trials go to first.

    `recommended`: the setting is the one that arms are screened at.
    """

    setting: dict[str, Any]
    candidate: dict[str, Any]
    rung: int
    recommended: bool


class StudyOrders:
    """Writes of people to searches that go on, in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._searches = SearchRepository(session)

    def lock(self, owner_id: str, study_id: str) -> StudyRow:
        """Return the owner's study; nobody decides about it until this transaction ends.

        Raises:
            NotFound: no such study, or somebody else's.
        """
        ExperimentRepository(self._session).study(owner_id, study_id)
        return self._searches.lock(study_id)

    def refuse_ended(self, study: StudyRow) -> None:
        """Refuse orders to a search that takes no more tasks.

        Raises:
            Conflict: it has ended, or its job has, or is to be cancelled.
        """
        job = self._session.get_one(Job, study.job_id, populate_existing=True)
        if study.ended_at is not None:
            why = f"its search has ended ({study.stopped_by}: {study.stop_reason})"
        elif job.status.is_terminal:
            why = f"its job has {job.status.value}"
        elif job.cancel_requested_at is not None:
            why = "its job is being cancelled"
        else:
            return
        raise Conflict(
            f"study {study.id} takes no more orders: {why}",
            code="study_ended",
            hint=f"POST /v1/studies/{study.id}/clone begins a new search with what this one knows",
        )

    def change(
        self, study: StudyRow, *, spec: dict[str, Any], plan: dict[str, Any], shape: str
    ) -> None:
        """Let a search go on with another budget, shape or number of workers."""
        changed = sorted(name for name in spec if spec[name] != study.spec.get(name))
        if not changed and plan == study.plan:
            return
        study.spec, study.plan, study.shape = spec, plan, shape
        said = ", ".join(f"{name} {spec[name]}" for name in changed)
        append_event(
            self._session, study.job_id, EventType.STUDY_CHANGED,
            f"The search goes on with other limits: {said}; shape {shape}.",
            data={"study_id": study.id, "shape": shape, **{name: spec[name] for name in changed}},
        )  # fmt: skip

    def enqueue(self, study: StudyRow, arm: str, asked: AskedTrial) -> TrialRow:
        """Add a trial of an arm as a waiting task, which the next free worker takes first.

        It is the arm's next draw, or its screening where that has not begun and nothing else is
        asked for.

        Raises:
            Conflict: a trial of the arm has this very setting, or the limit of trials is reached.
        """
        same = self._with_setting(study.id, arm, asked.setting)
        if same is not None:
            raise Conflict(
                f"trial {same.number} of study {study.id} has this setting of {arm!r} already",
                code="trial_exists",
                hint=f"GET /v1/studies/{study.id}/trials/{same.number} shows how it does",
            )
        self._refuse_full(study)
        last = select(func.max(TrialRow.draw)).where(
            TrialRow.study_id == study.id, TrialRow.arm == arm
        )
        draw = 0 if asked.recommended else 1 + (self._session.execute(last).scalar_one() or 0)
        record = self._searches.add(
            study, TrialKey(arm, draw, 0), rung=0 if asked.recommended else asked.rung, start=0,
            setting=asked.setting, origin=HAND, candidate=asked.candidate,
            reason="a person asked for it",
        )  # fmt: skip
        self._session.refresh(record.trial)
        self._say(study, record.trial, f"Trial {record.trial.number} ({arm}) was asked for.")
        return record.trial

    def _refuse_full(self, study: StudyRow) -> None:
        limit = study.plan["budget"]["trials"]
        if limit is None:
            return
        count = select(func.count()).where(TrialRow.study_id == study.id)
        there = self._session.execute(count).scalar_one()
        if there >= limit:
            raise Conflict(
                f"study {study.id} has {there} trials, and its max_trials is {limit}",
                code="budget_reached",
                hint=f"PATCH /v1/studies/{study.id} with a larger max_trials, or null",
            )

    def _with_setting(self, study_id: str, arm: str, setting: dict[str, Any]) -> TrialRow | None:
        statement = select(TrialRow).where(TrialRow.study_id == study_id, TrialRow.arm == arm)
        rows = self._session.execute(statement.order_by(TrialRow.number)).scalars()
        return next((row for row in rows if row.setting == setting), None)

    def retry(self, study: StudyRow, number: int) -> TrialRow:
        """Let the failed task of a trial wait again, with all its chances; what it cost is lost.

        Raises:
            NotFound: the study has no such trial.
            Conflict: the trial has not failed, and was not cut by its limit of time.
        """
        trial = StudyRepository(self._session).trial(study.id, number)
        failed = select(TaskRow).where(
            TaskRow.trial_id == trial.id,
            TaskRow.status == TaskStatus.ENDED,
            TaskRow.ended_by != EndedBy.BUDGET,
        )
        task = self._session.execute(failed).scalar_one_or_none()
        if task is None:
            raise Conflict(
                f"trial {number} of study {study.id} is {trial.status.value}; only one that has "
                "failed or was cut by its limit of time can be tried again",
                code="trial_not_failed",
            )
        ended_by = trial.ended_by
        task.lost_seconds += task.seconds
        task.seconds, task.losses = 0.0, 0
        task.status, task.ended_by, task.reason = TaskStatus.WAITING, None, "tried again by hand"
        task.job_id, task.attempt, task.limit_seconds = None, None, None
        task.started_at, task.finished_at, task.metrics = None, None, {}
        trial.status, trial.ended_by, trial.finished_at = TrialStatus.WAITING, None, None
        trial.feasible = None if trial.rung is None else _was_feasible(study, trial)
        trial.metrics = {name: value for name, value in trial.metrics.items() if name != "message"}
        self._session.flush()
        was = "failed" if ended_by is None else ended_by.value
        self._say(study, trial, f"Trial {number}, ended by {was}, is tried again.")
        return trial

    def _say(self, study: StudyRow, trial: TrialRow, message: str) -> None:
        append_event(
            self._session, study.job_id, EventType.TRIAL_QUEUED, message,
            data={"study_id": study.id, "trial_id": trial.id, "number": trial.number},
        )  # fmt: skip


def _was_feasible(study: StudyRow, trial: TrialRow) -> bool:
    """What the trial was at the rung that it has reached."""
    limit = study.plan.get("drift_budget")
    return limit is None or (trial.drift is not None and trial.drift <= limit)
