"""Trials that go wrong, budgets of time and of trials: who takes over, and what is then said."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from core.errors import InvalidInput
from core.lifecycle import EndedBy
from selection.draws import Setting
from selection.quote import fit_shape, quote
from selection.rungs import answer, decide
from selection.study import (
    Budget,
    Ended,
    Origin,
    Plan,
    Start,
    Stop,
    StoppedBy,
    Study,
    Task,
    Trial,
)
from tests.unit.selection.searches import PLAIN, finished, plan, quality, run_alone

Fault = Callable[[Task], EndedBy | None]


def run_with(
    made: Plan, fault: Fault, *, drift: Callable[[Task], float] = lambda _task: 0.01
) -> Study:
    """One worker to the end of a search in which tasks end as `fault` says."""
    study = Study()
    while not isinstance(action := decide(made, study), Stop):
        assert isinstance(action, Start)
        assert len(study.ended) < 500
        wrong = fault(action.task)
        ended = replace(finished(action.task), drift=drift(action.task))
        if wrong is not None:
            ended = Ended(action.task, wrong, 1.0)
        study = replace(study, ended=(*study.ended, ended))
    return study


def at(study: Study, rung: int, *, arm: str | None = None) -> list[Ended]:
    return [
        ended
        for ended in study.ended
        if ended.task.rung == rung and arm in (None, ended.task.trial.arm)
    ]


# ------------------------------------------------------------ who takes over


@pytest.mark.parametrize("rung", [1, 2, 3])
def test_plain_dpo_stays_in_the_race_when_its_best_setting_diverges(rung: int) -> None:
    def first_plain_at_the_rung(task: Task) -> EndedBy | None:
        seen = [] if task.trial.arm != PLAIN.name or task.rung != rung or not task.start else [task]
        hit.extend(seen[: 1 - len(hit)])
        return EndedBy.NAN if task in hit else None

    hit: list[Task] = []
    made = plan(number=8)
    study = run_with(made, first_plain_at_the_rung)
    assert len(hit) == 1
    (last,) = [e for e in at(study, 3, arm=PLAIN.name) if e.is_measured]
    assert last.task.trial.key != hit[0].trial.key
    assert any(e.task.trial.arm == PLAIN.name for e in answer(made, study).compared)


def test_a_finalist_that_diverges_gives_its_place_to_the_next() -> None:
    made = plan(number=14, shape="narrow")
    assert made.shape.kept[-1] == 1

    def first_finalist(task: Task) -> EndedBy | None:
        if task.rung == 3 and task.trial.arm != PLAIN.name and not hit:
            hit.append(task)
        return EndedBy.OOM if task in hit else None

    hit: list[Task] = []
    study = run_with(made, first_finalist)
    pairs = [e for e in at(study, 3) if e.task.trial.arm != PLAIN.name]
    assert [e.is_measured for e in pairs] == [False, True]
    assert answer(made, study).rung == 3


def test_places_that_nobody_can_keep_are_given_away_as_often_again_and_no_more() -> None:
    """All pairs drift too far at full length: that is not found out one by one with all of them."""
    made = plan(number=14, drift_budget=0.05)
    study = run_with(
        made, lambda _task: None,
        drift=lambda task: 0.01 + 0.1 * (task.rung == 3 and task.trial.arm != PLAIN.name),
    )  # fmt: skip
    pairs = [e for e in at(study, 3) if e.task.trial.arm != PLAIN.name]
    assert len(pairs) == 2 * made.shape.kept[-1]


def test_who_diverged_later_does_not_win_by_what_it_showed_before() -> None:
    """Every pair diverges on its way to the end: the answer is one that has not been tried there.

    The final run of another would diverge as its trial did.
    """
    made = plan(number=8)
    study = run_with(
        made,
        lambda task: EndedBy.NAN if task.rung == 3 and task.trial.arm != PLAIN.name else None,
    )
    gone = {e.task.trial.key for e in at(study, 3) if not e.is_measured}
    assert gone
    found = answer(made, study)
    assert found.rung == 2
    assert found.trial.key not in gone
    assert not {e.task.trial.key for e in found.compared} & gone


def test_who_drifts_too_far_later_does_not_win_by_what_it_showed_before() -> None:
    made = plan(number=8, drift_budget=0.05)
    study = run_with(
        made, lambda _task: None,
        drift=lambda task: 0.01 + 0.1 * (task.rung == 3 and task.trial.arm != PLAIN.name),
    )  # fmt: skip
    gone = {e.task.trial.key for e in at(study, 3) if e.task.trial.arm != PLAIN.name}
    assert answer(made, study).trial.key not in gone


def test_who_was_cut_for_want_of_money_keeps_what_it_showed_before() -> None:
    made = plan(number=8)
    study = run_with(made, lambda task: EndedBy.PRUNER if task.rung == 3 else None)
    best = min(at(study, 2), key=lambda e: quality(e.task))
    assert answer(made, study).trial.key == best.task.trial.key


def test_a_lost_task_that_is_too_dear_does_not_hide_a_cheap_one() -> None:
    made = plan(number=6, budget=Budget(gpu_seconds=400.0), shape="usual")
    arms = tuple(
        replace(arm, cost=30.0) if arm.name == made.arms[1].name else arm for arm in made.arms
    )
    made = replace(made, arms=arms)
    asked = [
        Task(Trial(name, 90, 0, Setting(beta=2.0), Origin.HAND), 0, 0)
        for name in sorted(arm.name for arm in arms if not arm.is_plain)
    ]
    dear = [task for task in asked if task.trial.arm == made.arms[1].name]
    cheap = next(task for task in asked if task.key > dear[0].key)
    action = decide(made, Study(waiting=(*dear, cheap)))
    assert isinstance(action, Start)
    assert action.task == cheap


# ------------------------------------------------------- budgets of wall time


def run_on_the_clock(made: Plan) -> tuple[Study, Stop]:
    """One worker to the end; time passes as it works."""
    study = Study()
    while not isinstance(action := decide(made, study), Stop):
        assert isinstance(action, Start)
        ended = finished(action.task, seconds=action.expected_seconds)
        study = replace(
            study, ended=(*study.ended, ended),
            elapsed_seconds=study.elapsed_seconds + ended.seconds,
        )  # fmt: skip
    return study, action


@pytest.mark.parametrize("runs", [2.5, 3.5, 5.0, 7.0])
def test_a_deadline_leaves_one_worker_time_for_the_end_of_the_ladder(runs: float) -> None:
    made = plan(budget=Budget(deadline_seconds=1000.0 * runs), shape=None)
    study, stop = run_on_the_clock(made)
    assert study.elapsed_seconds <= 1000.0 * runs
    ends = {e.task.trial.arm for e in at(study, 3)}
    assert PLAIN.name in ends
    assert len(ends) >= 2, stop


def test_a_deadline_in_a_shape_that_it_cannot_pay_still_ends_with_finalists() -> None:
    made = plan(budget=Budget(deadline_seconds=3500.0), shape="wide")
    study, stop = run_on_the_clock(made)
    assert stop.by is StoppedBy.BUDGET
    assert {PLAIN.name} < {e.task.trial.arm for e in at(study, 3)}


def test_more_workers_do_more_until_a_deadline() -> None:
    made = plan(budget=Budget(deadline_seconds=2500.0))
    names = [fit_shape(made, workers=workers)[0] for workers in (1, 3, 8)]
    assert names == ["least", "usual", "wide"]


# ------------------------------------------------------------------- quotes


def test_a_quote_knows_that_a_deadline_ends_it() -> None:
    made = plan(budget=Budget(deadline_seconds=600.0), shape="wide")
    study = Study(elapsed_seconds=100.0)
    assert quote(made, study, workers=1).high <= 500.0
    assert quote(made, study, workers=4).high <= 2000.0


def test_a_quote_knows_that_trials_are_counted() -> None:
    made = plan(number=28, budget=Budget(trials=6), shape="narrow")
    before = quote(made, Study())
    study, _, stop = run_alone(made)
    assert stop.by is not StoppedBy.FINISHED
    assert len({e.task.trial.key for e in study.ended}) == 6
    assert before.tasks <= 6 + 3 * 6
    assert study.spent_seconds == pytest.approx(before.p50, rel=0.3)
    assert quote(made, study).tasks == 0


def test_a_quote_without_workers_is_refused() -> None:
    with pytest.raises(InvalidInput, match="workers"):
        quote(plan(), Study(), workers=0)


def test_a_quote_does_not_count_on_who_has_failed() -> None:
    """All pairs diverge at the first rung: nothing is left to pay for."""
    made = plan(number=8)
    study = run_with(made, lambda _task: EndedBy.NAN)
    end = quote(made, study)
    assert end.tasks == 0
    assert math.isclose(end.p50, study.spent_seconds)
