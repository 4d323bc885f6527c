"""Replays: worlds, strategies on them, what a table lacks and what is said of it."""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from bench import search_report, search_table
from bench.search_report import Findings, Outcome, block, goals, lead, lines, outcomes
from bench.search_strategies import STRATEGIES, grid, ours, plan_of, random_full, replay
from bench.search_table import BUDGET, RUNGS, SETTINGS, missing, worlds
from bench.search_world import GRID, Law, World, made_up
from bench.selection import Source
from bench.selection_cases import PAIRS, PLAIN
from bench.train_report import Table
from core.run_spec import CandidateSpec
from selection.draws import RECOMMENDED, candidate_at
from selection.quote import quote
from selection.rungs import answer
from selection.space import SearchSpace
from selection.study import Study
from tests.unit.selection.samples import profile

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


def run(pair: str, setting: int, seed: int, **changed: Any) -> dict[str, Any]:
    """A row; the pair's place among the pairs is how good it is, at the other seed a bit less."""
    worth = 0.69 - 0.001 * ([PLAIN, *PAIRS].index(pair) + setting) + 0.0001 * seed
    rungs = {str(step): {"log_loss": worth + 0.01, "accuracy": 0.5, "drift": 0.1} for step in RUNGS}
    return {
        "kind": "run", "data": "made-up", "sha256": "0", "seed": seed, "budget": BUDGET,
        "pair": pair, "setting": setting, "ended_by": "budget", "losses": [worth],
        "log_loss": worth, "accuracy": 0.6 + seed, "drift": 0.2, "rungs": rungs, "seconds": 2.0,
    } | changed  # fmt: skip


def case(seed: int) -> dict[str, Any]:
    about = profile()
    return {
        "kind": "case", "data": "made-up", "sha256": "0", "seed": seed, "budget": BUDGET,
        "metrics": "0", "profile": about.model_dump(mode="json"),
    }  # fmt: skip


def table_of(settings: int) -> list[dict[str, Any]]:
    runs = [
        run(pair, k, seed) for k in range(settings) for seed in (0, 1) for pair in (PLAIN, *PAIRS)
    ]
    return [case(0), case(1), *runs]


def test_a_search_sees_one_seed_and_is_judged_by_the_other() -> None:
    found, told = worlds(table_of(3), budget=BUDGET, rungs=RUNGS)
    assert told == []
    assert [w.name for w in found] == ["made-up, seed 0", "made-up, seed 1"]
    world = found[0]
    assert world.rungs == (*RUNGS, BUDGET["steps"])
    assert world.pool == world.grid == SETTINGS[:3]
    assert world.show(PAIRS[4], SETTINGS[2], 3, 0).log_loss == pytest.approx(0.683)
    assert world.show(PAIRS[4], SETTINGS[2], 0, 0).log_loss == pytest.approx(0.693)
    assert world.worth(PAIRS[4], SETTINGS[2]).log_loss == pytest.approx(0.6831)
    assert world.worth(PAIRS[4], SETTINGS[2]).accuracy == 1.6
    pick = ours(world, 8.0, 0)
    assert pick.setting in world.pool
    assert world.worth(pick.arm, pick.setting).log_loss < world.worth(PLAIN, RECOMMENDED).log_loss


def test_a_run_that_broke_down_is_worth_no_training() -> None:
    rows = [
        row | {"losses": None, "rungs": {}} if row.get("pair") == PAIRS[0] else row
        for row in table_of(1)
    ]
    found, _ = worlds(rows, budget=BUDGET, rungs=RUNGS)
    assert found[0].show(PAIRS[0], RECOMMENDED, 0, 0).log_loss == math.inf
    assert found[0].show(PAIRS[0], RECOMMENDED, 3, 0).log_loss == math.inf
    assert found[0].worth(PAIRS[0], RECOMMENDED).log_loss == math.log(2.0)
    assert ours(found[0], 6.0, 0).arm != PAIRS[0]


def test_tables_that_are_not_whole_are_told_of() -> None:
    rows = table_of(2)
    found, told = worlds(rows[:-1], budget=BUDGET, rungs=RUNGS)
    assert [len(w.grid) for w in found] == [1, 1], "the second setting lacks a run"
    assert told == []
    found, told = worlds(rows[2:40], budget=BUDGET, rungs=RUNGS)
    assert found == []
    assert "not all pairs" in told[0]
    found, told = worlds(rows[2:], budget=BUDGET, rungs=RUNGS)
    assert found == []
    assert "metrics are missing" in told[0]
    assert worlds(rows, budget=BUDGET | {"steps": 61}, rungs=RUNGS) == ([], [])


def test_what_is_kept_is_not_measured_again_and_settings_come_one_by_one(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.jsonl")
    todos = missing(table, [SOURCE])
    assert [(t.setting, t.seed) for t in todos[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert sum(len(t.runs) for t in todos) == 29 * 2 * len(SETTINGS)
    assert [t.profile for t in todos[:3]] == [True, True, False]
    for pair in (PLAIN, *PAIRS[1:]):
        table.append(json.loads(json.dumps(run(pair, 0, 0))))
    left = missing(Table(tmp_path / "table.jsonl"), [SOURCE])
    assert left[0].runs == (PAIRS[0],)


def test_the_settings_of_the_table_are_in_the_search_space() -> None:
    space = SearchSpace(1e-3)
    for objective in search_table.objectives().values():
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
        Findings(tuned=[], single=enough(0.1), told=["x is missing."], made_up={}, replicates=1)
    )
    assert "Nothing is recorded yet" in text
    assert "x is missing." in text
    assert "| ours | 0.10 [0.10, 0.10] |" in text
    assert text.count("not yet") == 2
