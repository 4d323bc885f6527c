"""Plans, settings and rows of tasks: what is written is what is read."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from core.errors import InvalidInput
from core.lifecycle import EndedBy, TaskStatus
from selection.draws import Setting
from selection.rungs import decide
from selection.study import Budget, Start, Study
from selection.wire import TaskFacts, plan_from_json, plan_to_json, setting_to_json, study_of
from tests.unit.selection.searches import PLAIN, plan, run_alone

FACTS: dict[str, Any] = {
    "arm": "dpo", "draw": 1, "repeat": 0, "setting": setting_to_json(Setting(beta=2.0)),
    "origin": "prior", "rung": 1, "start": 20, "status": TaskStatus.ENDED, "limit_seconds": 9.0,
    "seconds": 5.0, "lost_seconds": 2.0, "ended_by": EndedBy.BUDGET, "log_loss": 0.6, "drift": 0.1,
}  # fmt: skip


def test_a_plan_comes_back() -> None:
    made = plan(budget=Budget(gpu_seconds=900.0), drift_budget=0.05)
    text = json.dumps(plan_to_json(made))
    assert plan_from_json(json.loads(text)) == made
    assert plan_from_json(json.loads(text)).plain == PLAIN


def test_what_is_no_plan_is_refused() -> None:
    broken = plan_to_json(plan())
    broken["rungs"] = [20, 20]
    with pytest.raises(InvalidInput, match="rising"):
        plan_from_json(broken)
    with pytest.raises(ValidationError, match="arms"):
        plan_from_json({})


@pytest.mark.parametrize("setting", [Setting(), Setting(0.5, 2.0, 4.0, 0.25, (0.1, 0.5, 0.9))])
def test_a_setting_comes_back(setting: Setting) -> None:
    written = json.loads(json.dumps(setting_to_json(setting)))
    found = study_of([TaskFacts(**{**FACTS, "setting": written})], elapsed_seconds=1.0)
    assert found.tasks[0].trial.setting == setting


def test_rows_are_a_study() -> None:
    rows = [
        FACTS,
        {**FACTS, "draw": 2, "status": TaskStatus.RUNNING, "ended_by": None, "lost_seconds": 0.5},
        {**FACTS, "draw": 3, "status": TaskStatus.RUNNING, "limit_seconds": None},
        {**FACTS, "draw": 4, "status": TaskStatus.WAITING, "limit_seconds": None},
    ]
    found = study_of([TaskFacts(**row) for row in rows], elapsed_seconds=30.0)
    assert [task.trial.draw for task in found.tasks] == [1, 2, 3, 4]
    assert found.spent_seconds == 5.0 + 2.0 + 0.5 + 2.0 + 2.0
    assert [running.limit_seconds for running in found.running] == [9.0, math.inf]
    assert found.elapsed_seconds == 30.0
    assert found.ended[0].is_measured


def test_a_search_from_rows_decides_the_same() -> None:
    made = plan(number=6, shape="few")
    study, starts, _ = run_alone(made)
    half = replace(study, ended=study.ended[: len(study.ended) // 2])
    rows = [
        TaskFacts(
            arm=e.task.trial.arm, draw=e.task.trial.draw, repeat=e.task.trial.repeat,
            setting=setting_to_json(e.task.trial.setting), origin=e.task.trial.origin.value,
            rung=e.task.rung, start=e.task.start, status=TaskStatus.ENDED, limit_seconds=None,
            seconds=e.seconds, lost_seconds=0.0, ended_by=e.ended_by, log_loss=e.log_loss,
            drift=e.drift,
        )
        for e in half.ended
    ]  # fmt: skip
    read = study_of(rows, elapsed_seconds=0.0)
    assert read == half
    action = decide(plan_from_json(plan_to_json(made)), read)
    assert isinstance(action, Start)
    assert action == starts[len(half.ended)]
    assert Study() == study_of([], elapsed_seconds=0.0)
