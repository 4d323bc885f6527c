"""What a clone of a search begins with: settings that did better than the recommended ones."""

from dataclasses import replace

from core.lifecycle import EndedBy
from selection.carry import best_settings, has_room
from selection.draws import RECOMMENDED, Setting
from selection.study import Budget, Ended, Origin, Study, Task, Trial
from tests.unit.selection.searches import plan

MADE = plan(number=4, drift_budget=0.1)
FIRST, SECOND, THIRD = (arm.name for arm in MADE.arms[1:4])
FAST, SLOW = Setting(learning_rate=2.0), Setting(learning_rate=0.5)


def ended(
    arm: str, log_loss: float, *, draw: int = 0, setting: Setting = RECOMMENDED, drift: float = 0.01
) -> Ended:
    trial = Trial(arm, draw, 0, setting, Origin.PRIOR if draw else Origin.SCREEN)
    task = Task(trial, 0, 0)
    return Ended(task, EndedBy.BUDGET, 1.0, log_loss=log_loss, drift=drift)


def test_each_leading_pair_and_plain_dpo_bring_their_best_drawn_setting() -> None:
    study = Study(
        ended=(
            ended("dpo", 0.70), ended("dpo", 0.60, draw=1, setting=FAST),
            ended(FIRST, 0.62), ended(FIRST, 0.40, draw=1, setting=FAST),
            ended(FIRST, 0.55, draw=2, setting=SLOW),
            ended(SECOND, 0.66), ended(SECOND, 0.50, draw=1, setting=SLOW),
            ended(THIRD, 0.69), ended(THIRD, 0.68, draw=1, setting=FAST),
        )
    )  # fmt: skip
    assert best_settings(MADE, study, leading=2) == {"dpo": FAST, FIRST: FAST, SECOND: SLOW}
    assert best_settings(MADE, study, leading=1) == {"dpo": FAST, FIRST: FAST}


def test_what_did_best_as_recommended_brings_nothing() -> None:
    study = Study(
        ended=(
            ended("dpo", 0.60), ended("dpo", 0.66, draw=1, setting=FAST),
            ended(FIRST, 0.55), ended(FIRST, 0.61, draw=1, setting=FAST),
        )
    )  # fmt: skip
    assert best_settings(MADE, study, leading=4) == {}
    assert best_settings(MADE, Study(), leading=4) == {}


def test_what_drifts_too_far_brings_nothing() -> None:
    far = ended(FIRST, 0.50, draw=1, setting=FAST, drift=0.2)
    study = Study(ended=(ended("dpo", 0.60), ended(FIRST, 0.55), far))
    assert best_settings(MADE, study, leading=4) == {}
    near = ended(FIRST, 0.50, draw=1, setting=FAST)
    study = Study(ended=(ended("dpo", 0.60), ended(FIRST, 0.55), near))
    assert best_settings(MADE, study, leading=4) == {FIRST: FAST}


def test_a_small_budget_of_trials_has_no_room_for_more_than_its_arms() -> None:
    shape = MADE.shape
    needed = 1 + shape.screened + (1 + shape.leading) * shape.draws
    assert has_room(MADE, 2)
    assert has_room(replace(MADE, budget=Budget(trials=needed)), 2)
    assert not has_room(replace(MADE, budget=Budget(trials=needed - 1)), 2)
