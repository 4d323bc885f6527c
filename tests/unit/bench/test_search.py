"""Replays: worlds, strategies on them, what a table lacks and what is said of it."""

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from bench import search_report, selection_cases
from bench.search import comparable
from bench.search_fit import (
    Looks,
    ShortRuns,
    fit,
    fitted_table,
    looks_of_case,
    looks_of_runs,
    looks_of_seeds,
    repeated,
)
from bench.search_parts import parts_of, parts_table
from bench.search_record import (
    BUDGET,
    RUNGS,
    SETTINGS,
    VALIDATION_PAIRS,
    append,
    missing,
)
from bench.search_report import Findings, Outcome, block, goals, lead, lines, outcomes
from bench.search_strategies import STRATEGIES, grid, ours, plan_of, random_full, replay
from bench.search_table import NO_TRAINING, Judge, cases, halved, worlds
from bench.search_ties import goal, named, names_table
from bench.search_world import GRID, Law, World, made_up
from bench.selection import Source
from bench.selection_cases import PAIRS, PLAIN
from bench.train_report import Table
from core.run_spec import CandidateSpec
from selection.draws import RECOMMENDED, Setting, candidate_at
from selection.quote import quote
from selection.rungs import answer
from selection.space import SearchSpace
from selection.study import Study
from tests.unit.selection.samples import profile
from worker.training.evaluate import Measured, TrialScore, trial_score

SOURCE = Source("made-up", Path("made-up.jsonl"), "0")


@pytest.fixture(autouse=True)
def _quiet_optuna() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
    optuna.logging.set_verbosity(level)


@pytest.fixture
def world() -> World:
    return made_up(Law(), 3)


# -------------------------------------------------------------------- worlds


def test_a_made_up_world_is_one_and_the_same(world: World) -> None:
    again, other = made_up(Law(), 3), made_up(Law(), 4)
    arm = world.arms[7].name
    assert again.show(arm, GRID[1], 1, 0) == world.show(arm, GRID[1], 1, 0)
    assert again.worth(arm, GRID[1]) == world.worth(arm, GRID[1])
    assert other.worth(arm, GRID[1]) != world.worth(arm, GRID[1])
    assert world.show(arm, GRID[1], 3, 1) != world.show(arm, GRID[1], 3, 0)


def test_longer_rungs_of_made_up_worlds_tell_more() -> None:
    found = []
    for rung in range(4):
        tau = []
        for seed in range(30):
            world = made_up(Law(), seed)
            shown = [world.show(arm.name, RECOMMENDED, rung, 0).log_loss for arm in world.arms]
            worth = [world.worth(arm.name, RECOMMENDED).log_loss for arm in world.arms]
            tau.append(np.corrcoef(shown, worth)[0, 1])
        found.append(float(np.mean(tau)))
    assert found == sorted(found)
    assert 0.3 < found[0] < 0.8 < found[3]


def test_grids_cost_what_they_cost(world: World) -> None:
    assert grid(world, settings=1).cost == 29.0
    assert grid(world, settings=4).cost == world.grid_cost() == 116.0
    best = grid(world, settings=4)
    shown = world.show(best.arm, best.setting, 3, 0).log_loss
    assert shown <= min(world.show(arm.name, RECOMMENDED, 3, 0).log_loss for arm in world.arms)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_no_strategy_passes_its_budget_and_each_repeats_itself(name: str, world: World) -> None:
    pick = STRATEGIES[name](world, 4.0, 5)
    assert pick.cost <= 4.0 + 1e-9
    assert pick.arm in {arm.name for arm in world.arms}
    assert STRATEGIES[name](world, 4.0, 5) == pick


def test_many_workers_do_the_same_work_sooner(world: World) -> None:
    plan = plan_of(world, budget=None, seed=0, shape="usual")
    one, eight = replay(world, plan), replay(world, plan, workers=8)
    assert one.wall == pytest.approx(one.study.spent_seconds)
    assert eight.wall < 0.7 * eight.study.spent_seconds
    assert eight.study.spent_seconds <= quote(plan, Study()).high
    assert answer(plan, eight.study).rung == 3


# -------------------------------------------------- the search as it should be


def test_the_search_is_as_good_as_it_was_in_made_up_worlds() -> None:
    """A guard, not evidence: mean regret over worlds against random search of the same budget.

    Over 40 worlds it is what docs/search.md says; the bounds leave room for 10 of them.
    """
    regret: dict[str, list[float]] = {"ours": [], "random": []}
    for seed in range(10):
        world = made_up(Law(), seed)
        best = grid(world, settings=4)
        reference = world.worth(best.arm, best.setting).accuracy
        for name, strategy in (("ours", ours), ("random", random_full)):
            pick = strategy(world, 5.8, seed)
            assert pick.cost <= 0.05 * world.grid_cost() + 1e-9
            regret[name].append(100 * (reference - world.worth(pick.arm, pick.setting).accuracy))
    assert np.mean(regret["ours"]) < 1.0
    assert np.mean(regret["ours"]) < np.mean(regret["random"]) - 0.5


# -------------------------------------------------------------------- tables

GROUP = np.arange(VALIDATION_PAIRS) // 2


def about(kind: str, seed: int, budget: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "data": "made-up", "sha256": "0", "seed": seed, "budget": budget}


def case_row(seed: int, budget: dict[str, Any]) -> dict[str, Any]:
    measured = {"metrics": "0", "group": GROUP.tolist()}
    return about("case", seed, budget) | measured | {"profile": profile().model_dump(mode="json")}


def one_setting(pair: str, seed: int) -> dict[str, Any]:
    """A row; the pair's place among the pairs is how good it is, at the other seed a bit less."""
    worth = 0.69 - 0.001 * [PLAIN, *PAIRS].index(pair) + 0.0001 * seed
    rungs = {
        str(step): {"log_loss": worth + 0.01, "accuracy": 0.5, "drift": 0.1}
        for step in selection_cases.RUNGS
    }
    return about("run", seed, selection_cases.BUDGET) | {
        "pair": pair, "ended_by": "budget", "losses": [worth], "log_loss": worth,
        "accuracy": 0.6 + 0.1 * seed, "drift": 0.2, "rungs": rungs, "seconds": 2.0,
    }  # fmt: skip


def table_of_one() -> list[dict[str, Any]]:
    budget = selection_cases.BUDGET
    runs = [one_setting(pair, seed) for seed in (0, 1) for pair in (PLAIN, *PAIRS)]
    return [case_row(0, budget), case_row(1, budget), *runs]


def of_seeds(rows: list[dict[str, Any]]) -> tuple[list[World], list[str]]:
    return worlds(rows, budget=selection_cases.BUDGET, rungs=selection_cases.RUNGS)


def margins(good: float, seed: int) -> list[float]:
    """Margins of mean `good`; prompts of the first half of quarters have wider ones."""
    rng = np.random.default_rng(seed)
    wide = np.where(GROUP // 2 % 2 == 0, 2.0, 1.0)
    return list(np.round(good + wide * rng.normal(size=VALIDATION_PAIRS), 4))


def several(pair: str, setting: int, seed: int) -> dict[str, Any]:
    """A row with margins; later pairs and settings are better, and more so at the end."""
    place = [PLAIN, *PAIRS].index(pair)
    good = 0.02 * place + 0.05 * setting
    noise = 1000 * seed + 10 * setting + 100_000 * place
    rungs = {
        str(step): {
            "log_loss": 0.69,
            "drift": 0.1,
            "margins": margins(good / 2, noise),
        }
        for step in RUNGS
    }
    return about("run", seed, BUDGET) | {
        "pair": pair, "setting": setting, "ended_by": "budget", "log_loss": 0.68, "drift": 0.2,
        "margins": margins(good, noise), "rungs": rungs, "seconds": 2.0,
    }  # fmt: skip


def table_of(settings: int) -> list[dict[str, Any]]:
    runs = [
        several(pair, k, seed)
        for k in range(settings)
        for seed in (0, 1)
        for pair in (PLAIN, *PAIRS)
    ]
    return [case_row(0, BUDGET), *runs]


def test_with_one_setting_a_search_sees_one_seed_and_is_judged_by_the_other() -> None:
    found, told = of_seeds(table_of_one())
    assert told == []
    assert [w.name for w in found] == ["made-up, seed 0", "made-up, seed 1"]
    world = found[0]
    assert world.rungs == (*selection_cases.RUNGS, selection_cases.BUDGET["steps"])
    assert world.pool == world.grid == (RECOMMENDED,)
    assert world.show(PAIRS[4], RECOMMENDED, 2, 0).log_loss == pytest.approx(0.685)
    assert world.show(PAIRS[4], RECOMMENDED, 0, 0).log_loss == pytest.approx(0.695)
    assert world.worth(PAIRS[4], RECOMMENDED).log_loss == pytest.approx(0.6851)
    assert world.worth(PAIRS[4], RECOMMENDED).accuracy == pytest.approx(0.7)
    pick = ours(world, 8.0, 0)
    assert world.worth(pick.arm, pick.setting).log_loss < world.worth(PLAIN, RECOMMENDED).log_loss


def test_with_settings_a_search_sees_half_of_the_prompts_at_one_seed() -> None:
    found, told = cases(table_of(2))
    assert told == []
    made = halved(found, judge=Judge.OTHER_SEEDS)
    assert [w.name for w in made] == [
        f"made-up, seed {seed}, half {half}" for seed in (0, 1) for half in (0, 1)
    ]
    world = made[1]
    assert world.pool == world.grid == SETTINGS[:2]
    assert world.rungs == (*RUNGS, BUDGET["steps"])
    place = (PAIRS[4], SETTINGS[1])
    row = several(PAIRS[4], 1, 0)
    for rung, kept in ((0, row["rungs"][str(RUNGS[0])]), (2, row)):
        size = len(kept["margins"])
        seen = GROUP[:size] // 2 % 2 == 1
        alone = _score(np.array(kept["margins"])[seen], GROUP[:size][seen])
        assert world.show(*place, rung, 0).log_loss == pytest.approx(alone.log_loss)
        assert world.losses is not None
        assert world.losses(*place, rung) == pytest.approx(alone.losses)
    assert world.group is not None
    assert world.group.size == int((GROUP // 2 % 2 == 1).sum())
    hidden = GROUP // 2 % 2 == 0
    other = _score(np.array(several(PAIRS[4], 1, 1)["margins"])[hidden], GROUP[hidden])
    assert world.worth(*place).log_loss == pytest.approx(other.log_loss)
    assert world.worth(*place).accuracy == pytest.approx(other.accuracy)
    itself = halved(found, judge=Judge.CHECKPOINT)[1]
    assert itself.name == world.name
    assert itself.show(*place, 2, 0) == world.show(*place, 2, 0)
    own = _score(np.array(row["margins"])[hidden], GROUP[hidden])
    assert itself.worth(*place).log_loss == pytest.approx(own.log_loss)


def test_seeds_may_have_different_numbers_of_settings() -> None:
    """The checkpoint is judged with all settings of one seed, other seeds with those of both."""
    rows = [row for row in table_of(3) if row.get("setting", 0) == 0 or row["seed"] == 0]
    (case,), told = cases(rows)
    assert told == []
    assert (case.settings, case.twice, case.whole) == (3, 1, {0: 3, 1: 1})
    itself = halved([case], judge=Judge.CHECKPOINT)
    assert [w.name for w in itself] == ["made-up, seed 0, half 0", "made-up, seed 0, half 1"]
    assert itself[0].pool == SETTINGS[:3]
    others = halved([case], judge=Judge.OTHER_SEEDS)
    assert len(others) == 4
    assert others[0].pool == SETTINGS[:1]
    assert named(case).same == 29
    (alone,), _ = cases([row for row in rows if row["seed"] == 0])
    assert halved([alone], judge=Judge.OTHER_SEEDS) == []
    assert looks_of_case(alone) == []
    assert named(alone).same == 0


def _score(values: Any, group: Any) -> TrialScore:
    ones = np.ones(values.size)
    return trial_score(Measured(values, 0 * ones, ones, ones, 0 * ones, group))


def test_the_job_s_rule_chooses_among_those_that_came_furthest() -> None:
    """Of trials within a standard error the one with the least drift wins, in replays too."""
    rows = table_of(1)
    for row in rows[1:]:  # far apart, so that drift decides nothing
        good = 0.3 * [PLAIN, *PAIRS].index(row["pair"])
        row["margins"] = margins(good, 7)
        row["rungs"] = {
            step: kept | {"margins": margins(good, 7)} for step, kept in row["rungs"].items()
        }
    world = halved(cases(rows)[0], judge=Judge.CHECKPOINT)[0]
    plan = plan_of(world, budget=None, seed=0, shape="wide")
    found = answer(plan, replay(world, plan).study)
    others = {ended.task.trial.arm for ended in found.compared} - {found.trial.arm}
    rows = [row | {"drift": 0.01} if row.get("pair") in others else row for row in rows]
    drifts = halved(cases(rows)[0], judge=Judge.CHECKPOINT)[0]
    assert drifts.group is not None
    size = drifts.group.size

    def alike(arm: str, setting: Setting, rung: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        noise = np.random.default_rng([*arm.encode()]).normal(size=size)
        return 0.6 + 0.1 * (noise - noise.mean())

    assert ours(world, 100.0, 0).arm == ours(drifts, 100.0, 0).arm == found.trial.arm
    assert ours(replace(drifts, losses=alike), 100.0, 0).arm in others


def test_a_run_that_broke_down_is_worth_no_training() -> None:
    broken = {"losses": None, "log_loss": None, "rungs": {}}
    for rows, read in (
        (table_of_one(), of_seeds),
        (table_of(1), lambda rows: (halved(cases(rows)[0], judge=Judge.OTHER_SEEDS), [])),
        (table_of(1), lambda rows: (halved(cases(rows)[0], judge=Judge.CHECKPOINT), [])),
    ):
        found, _ = read([row | broken if row.get("pair") == PAIRS[0] else row for row in rows])
        last = len(found[0].rungs) - 1
        assert found[0].show(PAIRS[0], RECOMMENDED, 0, 0).log_loss == math.inf
        assert found[0].show(PAIRS[0], RECOMMENDED, last, 0).log_loss == math.inf
        assert found[0].worth(PAIRS[0], RECOMMENDED) == NO_TRAINING
        assert ours(found[0], 6.0, 0).arm != PAIRS[0]


def test_tables_that_are_not_whole_are_told_of() -> None:
    rows = table_of(2)
    found, told = cases(rows[:-1])
    assert [case.whole for case in found] == [{0: 2, 1: 1}], "the second setting lacks a run"
    assert told == []
    assert len(found[0].runs) == 3 * 29
    found, told = cases(rows[:20])
    assert found == []
    assert "not all pairs" in told[0]
    found, told = cases(rows[1:])
    assert found == []
    assert "metrics are missing" in told[0]
    single, told = of_seeds(table_of_one()[:-1])
    assert single == []
    assert "not all pairs" in told[0]
    single, told = of_seeds(table_of_one()[2:])
    assert single == []
    assert "metrics are missing" in told[0]
    assert cases([row | {"budget": BUDGET | {"steps": 61}} for row in rows]) == ([], [])


def test_cases_are_compared_at_the_settings_that_four_of_them_have() -> None:
    (case,), _ = cases(table_of(3))
    some = [case, case.first(2), case.first(2), case.first(2), case.first(1)]
    assert [found.settings for found in comparable(some)] == [2, 2, 2, 2]
    assert [found.settings for found in comparable(some[:1])] == [3]
    assert [found.settings for found in comparable(some[3:])] == [1, 1]
    assert {setting for _, setting, _ in case.first(2).runs} == {0, 1}
    assert comparable([]) == []


def test_what_is_kept_is_not_measured_again_and_settings_come_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "tables" / "table.jsonl"
    todos = missing(Table(path), [SOURCE], (0, 1))
    assert [(t.setting, t.seed) for t in todos[:2]] == [(0, 0), (1, 0)]
    assert [t.seed for t in todos] == [0] * len(SETTINGS) + [1] * len(SETTINGS)
    assert sum(len(t.runs) for t in todos) == 29 * 2 * len(SETTINGS)
    assert [t.profile for t in todos[:3]] == [True, False, False]
    for pair in (PLAIN, *PAIRS[1:]):
        append(path, several(pair, 0, 0))
    left = missing(Table(path), [SOURCE], (0,))
    assert left[0].runs == (PAIRS[0],)
    assert {todo.seed for todo in left} == {0}


def test_two_processes_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    row = {"text": "x" * 30_000}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: append(path, row), range(40)))
    assert Table(path).rows == [row] * 40


# ---------------------------------------------------------- two names, constants


def test_one_configuration_under_two_names_and_pairs_that_differ() -> None:
    """Seeds of equal margins never differ; a pair far from plain DPO does, as do unlike seeds."""
    rows = table_of(1)
    for row in rows[1:]:
        steady = margins(0.3 if row["pair"] == PLAIN else 1.5, 0)
        row["margins"] = steady
        if row["pair"] == PAIRS[3] and row["seed"] == 1:
            row["margins"] = [-margin for margin in steady]
    (case,), _ = cases(rows)
    found = named(case)
    assert (found.same, found.false, found.pairs) == (29, 1, 28)
    assert found.told == 27, "two seeds that contradict each other tell nothing"
    assert found.own > 0.05
    assert (found.single, found.turned) == (28, 1)
    assert goal([found])["measured"] == pytest.approx(1 / 29, abs=1e-3)
    assert goal([found])["met"]
    assert goal([])["measured"] is None
    assert not goal([])["met"]
    assert "| made-up | 29 | 1 (3%) |" in names_table([found])


def made_looks(*, signal: float, correlation: float, noise: float, data: int) -> list[Looks]:
    """Two looks at 400 configurations: 3 % of effects at the end, shrunk and in part wrong before.

    A rung shows signal (z + u), Var u = (1 / correlation^2 - 1) Var z.
    """
    found = []
    for number in range(data):
        rng = np.random.default_rng(number)
        z = 3.0 * rng.normal(size=400)
        u = 3.0 * math.sqrt(1.0 / correlation**2 - 1.0) * rng.normal(size=400)
        true = np.stack([signal * (z + u) + 5.0, z])
        one, other = (true + noise * rng.normal(size=true.shape) for _ in range(2))
        found.append(Looks(f"data {number}", one, other))
    return found


def test_constants_of_a_rung_are_found_again_through_noise() -> None:
    looks = made_looks(signal=0.5, correlation=0.8, noise=2.0, data=6)
    (rung,) = fit(looks, (8, 80))
    assert rung.signal is not None
    assert rung.correlation is not None
    assert rung.signal.value == pytest.approx(0.5, abs=0.05)
    assert rung.correlation.value == pytest.approx(0.8, abs=0.05)
    assert rung.signal.low < 0.5 < rung.signal.high
    assert rung.assumed_signal == pytest.approx(0.656 * 0.27, abs=0.001), ".55 to .8, .25 to .3"
    (nothing,) = fit([Looks("a", np.zeros((2, 5)), np.zeros((2, 5)))] * 2, (8, 80))
    assert nothing.signal is None
    assert nothing.correlation is None
    assert "not to be had" in fitted_table([nothing])


def test_what_lasts_is_told_from_what_a_look_shows() -> None:
    looks = made_looks(signal=0.5, correlation=0.8, noise=2.0, data=1)
    (found,) = repeated(looks)
    assert found.configurations == 400
    assert found.seen == pytest.approx(math.hypot(3.0, 2.0), rel=0.1)
    assert found.lasting == pytest.approx(3.0, rel=0.1)
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(2, 50))
    (against,) = repeated([Looks("data", ends, -ends)])
    assert against.lasting == 0.0
    two = made_looks(signal=0.5, correlation=0.8, noise=2.0, data=2)
    short = ShortRuns.of("`table`", two, (8, 80))
    assert "| data 0 | 400 |" in short.text
    assert "| 10% | 0.5" in short.text
    assert ShortRuns.of("`none`", [], (8, 80)).fitted == []


def test_looks_of_a_table_share_neither_seed_nor_pairs() -> None:
    (case,), _ = cases(table_of(1))
    looks = looks_of_case(case)
    assert [look.one.shape for look in looks] == [(3, 29), (3, 29)]
    seen = case.scored((PLAIN, 0, 0), 2, half=0)
    assert seen is not None
    arms = sorted((PLAIN, *PAIRS))
    assert looks[0].one[2, arms.index(PLAIN)] == pytest.approx(-100 * math.log(seen.log_loss))
    other = case.scored((PLAIN, 0, 1), 2, half=1)
    assert other is not None
    assert looks[0].other[2, arms.index(PLAIN)] == pytest.approx(-100 * math.log(other.log_loss))
    runs = looks_of_runs(case)
    assert [look.one.shape for look in runs] == [(3, 29), (3, 29)]
    assert runs[0].one[2, arms.index(PLAIN)] == looks[0].one[2, arms.index(PLAIN)]
    own = case.scored((PLAIN, 0, 0), 2, half=1)
    assert own is not None
    assert runs[0].other[2, arms.index(PLAIN)] == pytest.approx(-100 * math.log(own.log_loss))
    both = looks_of_seeds(
        table_of_one(), budget=selection_cases.BUDGET, rungs=selection_cases.RUNGS
    )
    assert both[0].one.shape == both[0].other.shape == (3, 29)


def test_what_decides_is_found_again() -> None:
    """Divergences decide, more with every setting, and half of the run shows it; kernels do not."""
    divergences = sorted({pair.split(" × ")[1] for pair in PAIRS})
    rows = table_of(3)
    for row in rows[1:]:
        place = 0 if row["pair"] == PLAIN else divergences.index(row["pair"].split(" × ")[1])
        row["margins"] = margins(0.2 * place + row["setting"], 3)
        early = {str(RUNGS[0]): 1.0 - 0.1 * place, str(RUNGS[1]): 0.1 * place}
        row["rungs"] = {
            step: kept | {"margins": margins(early[step], 3)} for step, kept in row["rungs"].items()
        }
    (case,), _ = cases(rows)
    found = parts_of(case)
    assert (found.settings, found.data) == (3, "made-up")
    assert found.divergence == pytest.approx(1.0)
    assert found.kernel == pytest.approx(0.0, abs=1e-9)
    assert found.of_pairs[0] < -0.9
    assert found.of_pairs[1] > 0.9
    assert found.settings_sd > found.pairs_sd > 0.0
    assert "| made-up | 3 |" in parts_table([found])
    assert parts_of(case.first(2)).of_settings is None


def test_the_settings_of_the_table_are_in_the_search_space() -> None:
    space = SearchSpace(1e-3)
    for objective in selection_cases.objectives().values():
        centre = CandidateSpec(objective=objective, learning_rate=1e-3)
        for setting in SETTINGS:
            candidate = candidate_at(centre, setting)
            assert space.candidate_of(space.params_of(candidate)) == candidate


# -------------------------------------------------------------------- report


def made(strategy: str, points: float, *, data: int, cost: float = 5.0) -> Outcome:
    return Outcome(strategy, f"data {data}", points, points, cost, cost / 116.0)


def enough(mine: float) -> list[Outcome]:
    found = []
    for data in range(4):
        found += [
            made("ours", mine, data=data),
            made(search_report.PLAIN_GRID, 0.1, data=data, cost=29.0),
        ]
        found += [made(name, 2.0, data=data) for name in STRATEGIES if name != "ours"]
    return found


def test_goals_are_met_only_on_enough_recorded_data() -> None:
    assert all(goal["measured"] is None and not goal["met"] for goal in goals([], []))
    assert all(goal["measured"] is None for goal in goals(enough(0.1)[:6], []))
    assert all(goal["met"] for goal in goals(enough(0.1), []))
    bad = goals(enough(2.5), [])
    assert not any(goal["met"] for goal in bad)
    assert bad[-1]["measured"] == -0.5
    dear = [made(o.strategy, o.points, data=int(o.data[-1]), cost=9.0) for o in enough(0.1)]
    assert [goal["met"] for goal in goals(dear, [])] == [False, False, False, True]
    single = goals([], enough(0.1))
    assert [goal["measured"] is None for goal in single] == [True, True, False, False]


def test_leads_and_lines() -> None:
    found = enough(0.5)
    assert lead(found, "random").value == pytest.approx(1.5)
    by_name = {line.strategy: line for line in lines(found)}
    assert by_name["ours"].points.value == pytest.approx(0.5)
    assert by_name["ours"].within == 1.0
    assert by_name["random"].cost == 5.0


def test_a_world_is_played_by_all(world: World) -> None:
    found = outcomes(world, seeds=(0,), budget=3.0)
    names = [search_report.PLAIN_GRID, search_report.TUNED_GRID, *STRATEGIES]
    assert [o.strategy for o in found] == names
    tuned = next(o for o in found if o.strategy == search_report.TUNED_GRID)
    assert (tuned.points, tuned.percent, tuned.grid_share) == (0.0, 0.0, 1.0)


def test_the_block_says_what_is_missing() -> None:
    text = block(
        Findings(
            tuned=[], again=[], single=enough(0.1), told=["x is missing."], made_up={}, replicates=1
        )
    )
    assert "Nothing is whole yet" in text
    assert "x is missing." in text
    assert "| ours | 0.10 [0.10, 0.10] |" in text
    assert text.count("not yet") == 3
