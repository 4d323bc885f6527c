"""Searches and their trials as lists: filtered, ordered, counted, measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, assert_never

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from core.errors import NotFound
from core.lifecycle import EndedBy, JobStatus, TaskStatus, TrialStatus
from models.experiment import StudyRow, TaskRow, TrialRow
from models.job import Job
from models.repositories.paging import Page, PageQuery, fetch_page


class TrialOrder(StrEnum):
    """What a list of trials is ordered by."""

    CREATED = "created"
    NUMBER = "number"
    LOG_LOSS = "log_loss"
    DRIFT = "drift"
    GPU_SECONDS = "gpu_seconds"


@dataclass
class Tally:
    """How many trials of a study are in which state, and what they have used.

    `gpu_seconds` of all ended tasks, `lost_seconds` of attempts that came to nothing.
    """

    counts: dict[TrialStatus, int] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    lost_seconds: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """A trial at a rung that it has reached; `gpu_seconds` are those of its whole way there.

    `trial_ended_by` is how the trial has ended up to now, perhaps at a longer rung.
    """

    trial_id: str
    number: int
    arm: str
    draw: int
    repeat: int
    rung: int
    log_loss: float
    drift: float | None
    gpu_seconds: float
    metrics: dict[str, Any]
    trial_ended_by: EndedBy | None


class StudyRepository:
    """Reads of studies and trials in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def page(
        self,
        owner_id: str,
        query: PageQuery,
        *,
        status: JobStatus | None = None,
        dataset_id: str | None = None,
        model: str | None = None,
        job_id: str | None = None,
        created_after: int | None = None,
        created_before: int | None = None,
    ) -> Page[StudyRow]:
        """Return one page of the owner's studies, filtered by whatever is given."""
        wanted: list[ColumnElement[bool]] = [StudyRow.owner_id == owner_id]
        if status is not None:
            wanted.append(Job.status == status)
        if dataset_id is not None:
            wanted.append(Job.dataset_id == dataset_id)
        if model is not None:
            wanted.append(Job.model == model)
        if job_id is not None:
            wanted.append(StudyRow.job_id == job_id)
        if created_after is not None:
            wanted.append(StudyRow.created_at > created_after)
        if created_before is not None:
            wanted.append(StudyRow.created_at < created_before)
        statement = select(StudyRow).join(Job, Job.id == StudyRow.job_id).where(*wanted)
        return fetch_page(self._session, statement, StudyRow.id, query)

    def tallies(self, study_ids: Sequence[str]) -> dict[str, Tally]:
        """Return the tally of each study."""
        states = (
            select(TrialRow.study_id, TrialRow.status, func.count())
            .where(TrialRow.study_id.in_(study_ids))
            .group_by(TrialRow.study_id, TrialRow.status)
        )
        tallies = {study_id: Tally() for study_id in study_ids}
        for study_id, status, count in self._session.execute(states):
            tallies[study_id].counts[status] = count
        spent = (
            select(TaskRow.study_id, TaskRow.status, TaskRow.seconds, TaskRow.lost_seconds)
            .where(TaskRow.study_id.in_(study_ids))
            .order_by(TaskRow.id)
        )
        for study_id, task_status, seconds, lost in self._session.execute(spent):
            tallies[study_id].gpu_seconds += seconds if task_status is TaskStatus.ENDED else 0.0
            tallies[study_id].lost_seconds += lost
        return tallies

    def measurements(self, study_ids: Sequence[str]) -> dict[str, list[Measurement]]:
        """Return what was measured in each study, by number of the trial and rung."""
        statement = (
            select(
                TrialRow.study_id, TrialRow.id, TrialRow.number, TrialRow.arm, TrialRow.draw,
                TrialRow.repeat, TaskRow.rung, TaskRow.log_loss, TaskRow.drift, TaskRow.seconds,
                TaskRow.metrics, TrialRow.ended_by,
            )
            .join(TaskRow, TaskRow.trial_id == TrialRow.id)
            .where(
                TrialRow.study_id.in_(study_ids),
                TaskRow.ended_by == EndedBy.BUDGET,
                TaskRow.log_loss.is_not(None),
            )
            .order_by(TrialRow.number, TaskRow.rung)
        )  # fmt: skip
        found: dict[str, list[Measurement]] = {study_id: [] for study_id in study_ids}
        for row in self._session.execute(statement):
            before = found[row.study_id]
            way = before[-1].gpu_seconds if before and before[-1].trial_id == row.id else 0.0
            before.append(
                Measurement(
                    trial_id=row.id, number=row.number, arm=row.arm, draw=row.draw,
                    repeat=row.repeat, rung=row.rung, log_loss=row.log_loss, drift=row.drift,
                    gpu_seconds=way + row.seconds, metrics=row.metrics,
                    trial_ended_by=row.ended_by,
                )
            )  # fmt: skip
        return found

    def trials(self, trial_ids: Sequence[str]) -> dict[str, TrialRow]:
        """Return trials by their ids."""
        statement = select(TrialRow).where(TrialRow.id.in_(trial_ids))
        return {row.id: row for row in self._session.execute(statement).scalars()}

    def tasks(self, trial_id: str) -> list[TaskRow]:
        """Return the tasks of a trial, lowest rung first."""
        statement = select(TaskRow).where(TaskRow.trial_id == trial_id).order_by(TaskRow.rung)
        return list(self._session.execute(statement).scalars())

    def trial(self, study_id: str, number: int) -> TrialRow:
        """Return a trial of a study by its number.

        Raises:
            NotFound: the study has no such trial.
        """
        statement = select(TrialRow).where(TrialRow.study_id == study_id, TrialRow.number == number)
        row = self._session.execute(statement).scalar_one_or_none()
        if row is None:
            raise NotFound(
                f"study {study_id} has no trial {number}",
                hint=f"GET /v1/studies/{study_id}/trials lists them",
            )
        return row

    def trial_page(
        self,
        study_id: str,
        query: PageQuery,
        *,
        order_by: TrialOrder = TrialOrder.CREATED,
        states: Sequence[TrialStatus] = (),
    ) -> Page[TrialRow]:
        """Return one page of the trials of a study; those without the value come last.

        Raises:
            NotFound: a cursor is no trial of the study, and the order needs its value.
        """
        statement = select(TrialRow).where(TrialRow.study_id == study_id)
        if states:
            statement = statement.where(TrialRow.status.in_(states))
        match order_by:
            case TrialOrder.CREATED:
                return fetch_page(self._session, statement, TrialRow.id, query)
            case TrialOrder.NUMBER:
                return self._ordered(study_id, statement, TrialRow.number, query)
            case TrialOrder.LOG_LOSS:
                return self._ordered(study_id, statement, TrialRow.log_loss, query)
            case TrialOrder.DRIFT:
                return self._ordered(study_id, statement, TrialRow.drift, query)
            case TrialOrder.GPU_SECONDS:
                return self._ordered(study_id, statement, TrialRow.gpu_seconds, query)
            case _:
                assert_never(order_by)

    def _ordered(
        self,
        study_id: str,
        statement: Select[TrialRow],
        column: "InstrumentedAttribute[int] | InstrumentedAttribute[float | None]",
        query: PageQuery,
    ) -> Page[TrialRow]:
        descending = query.order == "desc"
        if query.after is not None:
            cursor = self._cursor(study_id, query.after)
            statement = statement.where(_behind(cursor, column, descending=descending))
        if query.before is not None:
            cursor = self._cursor(study_id, query.before)
            statement = statement.where(
                ~_behind(cursor, column, descending=descending), TrialRow.id != cursor.id
            )
        backwards = query.before is not None and query.after is None
        keys = (
            column.is_(None).desc() if backwards else column.is_(None).asc(),
            column.desc() if descending != backwards else column.asc(),
            TrialRow.id.desc() if backwards else TrialRow.id.asc(),
        )
        limited = statement.order_by(*keys).limit(query.limit + 1)
        rows = list(self._session.execute(limited).scalars())
        has_more = len(rows) > query.limit
        rows = rows[: query.limit]
        return Page(rows=rows[::-1] if backwards else rows, has_more=has_more)

    def _cursor(self, study_id: str, trial_id: str) -> TrialRow:
        row = self._session.get(TrialRow, trial_id)
        if row is None or row.study_id != study_id:
            raise NotFound(
                f"study {study_id} has no trial {trial_id!r} to go on from",
                hint="`after` and `before` take the `id` of a trial of this list",
            )
        return row


def _behind(
    cursor: TrialRow,
    column: "InstrumentedAttribute[int] | InstrumentedAttribute[float | None]",
    *,
    descending: bool,
) -> ColumnElement[bool]:
    """Whether a row comes after the cursor's; never NULL, so that it can be negated."""
    value = getattr(cursor, column.key)
    if value is None:
        return and_(column.is_(None), TrialRow.id > cursor.id)
    further = column < value if descending else column > value
    tie = and_(column == value, TrialRow.id > cursor.id)
    return or_(column.is_(None), and_(column.is_not(None), or_(further, tie)))
