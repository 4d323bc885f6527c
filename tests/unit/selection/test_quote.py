"""What a search costs: prices, limits, shapes that a budget pays, and beliefs about who is best."""

import math
from dataclasses import replace

import numpy as np
import pytest

from core.errors import InvalidInput
from core.lifecycle import EndedBy
from selection.belief import believe, misleading, signal
from selection.draws import RECOMMENDED, Setting
from selection.quote import costs_of, fit_shape, plan_search, quote
from selection.shapes import SHAPES
from selection.study import Budget, Ended, Origin, Plan, StoppedBy, Study, Task, Trial
from tests.unit.selection.searches import arms, finished, plan, run_alone


def screened(made: Plan, losses: dict[str, float], *, seconds: float = 22.0) -> Study:
    """Results of the first rung."""
    ended = [
        Ended(
            Task(Trial(name, 0, 0, RECOMMENDED, Origin.SCREEN), 0, 0),
            EndedBy.BUDGET,
            seconds,
            log_loss=loss,
        )
        for name, loss in losses.items()
    ]
    return Study(ended=tuple(ended))


def once(made: Plan) -> Plan:
    """One finalist and no second seed: nothing that a search may save at its end."""
    return replace(made, shape=replace(made.shape, kept=(*made.shape.kept[:-1], 1), repeats=0))


# -------------------------------------------------------------------- prices


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_quote_before_the_first_task_is_what_it_then_costs(name: str) -> None:
    made = plan(shape=name)
    before = quote(made, Study())
    study, _, stop = run_alone(made)
    assert before.low * 0.8 <= study.spent_seconds <= before.high * 1.1
    assert before.p50 < before.p90 <= before.high
    if stop.by is StoppedBy.FINISHED:
        assert study.spent_seconds == pytest.approx(before.p50, rel=0.25)


def test_a_quote_after_the_first_rung_knows_the_machine() -> None:
    """Everything takes three times as long as planned: the price follows, and gets narrower."""
    made = once(plan())
    study, _, _ = run_alone(made)
    slow = tuple(replace(e, seconds=3.0 * e.seconds) for e in study.ended)
    first = Study(ended=tuple(e for e in slow if e.task.rung == 0))
    before, after = quote(made, Study()), quote(made, first)
    truth = math.fsum(e.seconds for e in slow)
    assert truth == pytest.approx(after.p50, rel=0.25)
    assert after.p90 / after.p50 < before.p90 / before.p50
    assert after.spent == pytest.approx(math.fsum(e.seconds for e in first.ended))


def test_quotes_respect_budget_deadline_and_workers() -> None:
    made = plan(budget=Budget(gpu_seconds=2000.0))
    assert quote(made, Study()).high <= 2000.0
    free = plan()
    one, four = quote(free, Study()), quote(free, Study(), workers=4)
    assert four.p50 == one.p50
    assert one.eta / 4 <= four.eta < one.eta
    many = quote(free, Study(), workers=1000)
    assert many.eta >= 900.0, "a finalist has to go through all rungs, one after another"
    late = plan(budget=Budget(deadline_seconds=100.0))
    assert quote(late, Study(elapsed_seconds=30.0)).eta_p90 <= 70.0


def test_nothing_is_left_of_a_finished_search() -> None:
    made = once(plan(number=6))
    study, _, stop = run_alone(made)
    assert stop.by is StoppedBy.FINISHED
    end = quote(made, study)
    assert (end.tasks, end.eta) == (0, 0.0)
    assert end.p50 == pytest.approx(study.spent_seconds)


def test_costs_follow_an_arm_that_is_dearer_than_thought() -> None:
    made = plan(number=6)
    names = [arm.name for arm in made.screened]
    study = screened(made, dict.fromkeys(names, 0.69))
    dear = names[3]
    study = Study(
        ended=tuple(
            replace(e, seconds=66.0) if e.task.trial.arm == dear else e for e in study.ended
        )
    )
    costs = costs_of(made, study)
    assert costs.seconds(dear, start=20, stop=60) > 1.2 * costs.seconds(names[1], start=20, stop=60)
    assert costs.limit(100.0) > 100.0
    steady = costs_of(made, screened(made, dict.fromkeys(names, 0.69)))
    assert steady.spread < costs.spread


def test_tasks_that_were_cut_say_that_they_cost_as_much_as_that_and_no_less() -> None:
    made = plan(number=4)
    task = Task(Trial(made.arms[1].name, 0, 0, RECOMMENDED, Origin.SCREEN), 0, 0)
    early = Study(ended=(Ended(task, EndedBy.PRUNER, 11.0),))
    assert costs_of(made, early) == costs_of(made, Study())
    late = Study(ended=(Ended(task, EndedBy.PRUNER, 220.0),))
    assert costs_of(made, late).task(task) == pytest.approx(220.0)
    assert late.spent_seconds == 220.0
    others = screened(made, {arm.name: 0.69 for arm in made.screened if arm is not made.arms[1]})
    both = Study(ended=(*others.ended, *late.ended))
    assert costs_of(made, both).task(task) > costs_of(made, others).task(task)


# -------------------------------------------------------------------- shapes


def test_a_budget_picks_the_shape() -> None:
    found = [
        fit_shape(plan(budget=Budget(gpu_seconds=1000.0 * runs), shape="lean"))[0]
        for runs in (1.0, 2.4, 3.0, 4.0, 5.0, 6.5, 20.0)
    ]
    order = list(SHAPES)
    places = [order.index(name) for name in found]
    assert places == sorted(places, reverse=True)
    assert (found[0], found[-1]) == ("least", "wide")
    assert fit_shape(plan(shape="lean"))[0] == "usual"
    assert fit_shape(plan(budget=Budget(trials=12)))[1].shape.screened < 12


@pytest.mark.parametrize("runs", [2.5, 3.5, 5.0, 7.0, 12.0])
def test_the_shape_that_is_picked_is_paid(runs: float) -> None:
    made = plan(budget=Budget(gpu_seconds=1000.0 * runs), shape=None)
    study, _, stop = run_alone(made)
    assert study.spent_seconds <= 1000.0 * runs
    at_end = {e.task.trial.arm for e in study.ended if e.task.rung == 3}
    assert len(at_end) >= 2, stop


def test_a_pool_limits_the_draws() -> None:
    for pool, draws in (((RECOMMENDED,), 0), ((RECOMMENDED, Setting(beta=2.0)), 1)):
        _, made = plan_search(
            arms=arms(6), rungs=(20, 60, 200, 1000), budget=Budget(), seed=0, step_seconds=1.0,
            score_seconds=0.0, pool=pool,
        )  # fmt: skip
        assert made.shape.draws == draws
        study, _, _ = run_alone(made)
        settings = {ended.task.trial.setting for ended in study.ended}
        assert settings == set(pool)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(InvalidInput, match="unknown"):
        plan_search(
            arms=arms(3), rungs=(1,), budget=Budget(), seed=0, step_seconds=1.0,
            score_seconds=0.0, shape="round",
        )  # fmt: skip


# ------------------------------------------------------------------- beliefs


def test_without_results_the_recommendation_decides() -> None:
    made = plan()
    belief = believe(made, Study())
    values = [belief.value((arm.name, 0)) for arm in made.arms[1:]]
    assert values == sorted(values, reverse=True)


def test_scores_that_the_first_rung_contradicts_count_for_nothing() -> None:
    """Arms come out in the reverse order of their scores, by far more than noise."""
    made = plan()
    made = replace(made, arms=tuple(replace(arm, score=10.0 * arm.score) for arm in made.arms))
    names = [arm.name for arm in made.arms]
    against = {name: 0.6 * math.exp(-0.002 * i) for i, name in enumerate(names)}
    belief = believe(made, screened(made, against))
    values = [belief.value((name, 0)) for name in names]
    assert np.corrcoef(values, range(len(names)))[0, 1] > 0.6
    assert belief.sizes.slope < 0.5


@pytest.mark.parametrize(("part", "sure"), [("renyi", 0.7), ("rbf", 0.5)])
def test_pairs_that_share_a_part_inform_one_another(part: str, sure: float) -> None:
    """Divergences more than kernels, which decide little of what lasts."""
    made = plan()
    alike = [arm.name for arm in made.arms if part in arm.name]
    losses = {arm.name: 0.55 if arm.name in alike else 0.6 for arm in made.arms}
    unseen, other = "rbf × renyi", "spectral × kl"
    losses.pop(unseen)
    losses.pop(other)
    belief = believe(made, screened(made, losses))
    assert belief.beats((unseen, 0), (other, 0), by=0.0) > sure


def test_a_result_at_a_longer_rung_weighs_more() -> None:
    made = plan(number=6)
    names = [arm.name for arm in made.screened]
    base = screened(made, dict.fromkeys(names, 0.65))
    ahead = Trial(names[1], 0, 0, RECOMMENDED, Origin.SCREEN)
    found = []
    for rung, start in ((1, 20), (2, 60)):
        rows = [
            Ended(Task(replace(ahead, arm=name), rung, start), EndedBy.BUDGET, 1.0, log_loss=loss)
            for name, loss in ((names[1], 0.62), (names[2], 0.65), (names[3], 0.65))
        ]
        belief = believe(made, Study(ended=(*base.ended, *rows)))
        found.append(belief.beats((names[1], 0), (names[2], 0), by=0.0))
    assert 0.5 < found[0] < found[1]


def test_levels_of_rungs_are_not_compared() -> None:
    """A better log-loss of a longer rung is that of the rung: all arms shift, none is ahead."""
    made = plan(number=6)
    names = [arm.name for arm in made.screened]
    low = believe(made, screened(made, dict.fromkeys(names, 0.69)))
    high = believe(made, screened(made, dict.fromkeys(names, 0.4)))
    assert np.allclose(low.mean, high.mean, atol=1e-6)


def test_improvement_is_larger_where_less_is_known() -> None:
    made = plan(number=6)
    study = screened(made, {arm.name: 0.6 for arm in made.screened})
    name = made.arms[1].name
    near, far = Setting(beta=1.01), Setting(beta=3.0)
    belief = believe(made, study, proposed={(name, -1): near, (name, -2): far})
    best = belief.value((name, 0))
    assert belief.improvement((name, -2), best) > belief.improvement((name, -1), best) >= 0.0


def test_what_short_runs_show() -> None:
    assert [signal(k, 5000) for k in (100, 300, 1000, 5000)] == [0.35, 0.55, 0.8, 1.0]
    assert signal(16, 80) == pytest.approx(0.8 * 0.3)
    assert misleading(80, 80) == 0.0
    assert misleading(5, 250) > misleading(5, 80) > misleading(16, 80) > misleading(40, 80) > 0.0
    assert finished(Task(Trial("dpo", 0, 0, RECOMMENDED, Origin.BASELINE), 0, 0)).is_measured
