"""Plans, settings and studies as JSON and as rows of tables, and back.

Shared by those who run a search and those who answer questions about it; torch-free.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from core.lifecycle import EndedBy, TaskStatus
from selection.draws import Setting
from selection.study import Ended, Origin, Plan, Running, Study, Task, Trial

_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)
_SETTING: TypeAdapter[Setting] = TypeAdapter(Setting)


@dataclass(frozen=True)
class TaskFacts:
    """A row of the table of tasks with what its trial says; see `models.experiment.TaskRow`."""

    arm: str
    draw: int
    repeat: int
    setting: dict[str, Any]
    origin: str
    rung: int
    start: int
    status: TaskStatus
    limit_seconds: float | None
    seconds: float
    lost_seconds: float
    ended_by: EndedBy | None
    log_loss: float | None
    drift: float | None


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values."""
    found: dict[str, Any] = _PLAN.dump_python(plan, mode="json")
    return found


def plan_from_json(value: dict[str, Any]) -> Plan:
    """Return the plan that was written.

    Raises:
        pydantic.ValidationError: this is no plan.
        InvalidInput: it is none that could be searched by (see `Plan`).
    """
    return _PLAN.validate_python(value)


def setting_to_json(setting: Setting) -> dict[str, Any]:
    """Return a setting as JSON values."""
    found: dict[str, Any] = _SETTING.dump_python(setting, mode="json")
    return found


def setting_from_json(value: dict[str, Any]) -> Setting:
    """Return the setting that was written.

    Raises:
        pydantic.ValidationError: this is no setting.
    """
    return _SETTING.validate_python(value)


def study_of(facts: Iterable[TaskFacts], *, elapsed_seconds: float) -> Study:
    """Return all that is known of a search, from the rows of its tasks."""
    ended, running, waiting, lost = [], [], [], 0.0
    for fact in facts:
        lost += fact.lost_seconds
        task = Task(
            trial=Trial(
                arm=fact.arm,
                draw=fact.draw,
                repeat=fact.repeat,
                setting=setting_from_json(fact.setting),
                origin=Origin(fact.origin),
            ),
            rung=fact.rung,
            start=fact.start,
        )
        match fact.status:
            case TaskStatus.WAITING:
                waiting.append(task)
            case TaskStatus.RUNNING:
                limit = math.inf if fact.limit_seconds is None else fact.limit_seconds
                running.append(Running(task, limit))
            case TaskStatus.ENDED:
                assert fact.ended_by is not None
                ended.append(Ended(task, fact.ended_by, fact.seconds, fact.log_loss, fact.drift))
    return Study(
        ended=tuple(ended),
        running=tuple(running),
        waiting=tuple(waiting),
        lost_seconds=lost,
        elapsed_seconds=elapsed_seconds,
    )
