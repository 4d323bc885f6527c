"""Who goes on together: like ones are one chance, and a budget's rest goes into finalists."""

import numpy as np
import pytest

from selection.belief import Belief, Config, Sizes
from selection.quote import fit_shape
from selection.shapes import SHAPES
from selection.study import Budget
from tests.unit.selection.searches import plan

SIZES = Sizes(spread=1.0, split=(0.2, 0.4, 0.4), slope=0.0, noise=0.3)
A, LIKE_A, B, C = (("a", 0), ("a again", 0), ("b", 0), ("c", 0))


def belief(means: dict[Config, float], alike: float, *, sd: float = 1.0) -> Belief:
    """The first two configurations have this correlation, all others none."""
    covariance = np.eye(len(means)) * sd**2
    covariance[0, 1] = covariance[1, 0] = alike * sd**2
    return Belief(tuple(means), np.array(list(means.values())), covariance, SIZES)


def test_one_that_is_like_the_best_comes_late_however_good() -> None:
    found = belief({A: 1.0, LIKE_A: 0.95, B: 0.5, C: 0.0}, 0.99)
    assert found.set_apart([A, LIKE_A, B, C], [], 4)[:2] == [A, B]
    assert found.set_apart([A, LIKE_A, B, C], [], 2) == [A, B]
    assert found.set_apart([LIKE_A, B], [A], 1) == [B]
    assert found.set_apart([A, LIKE_A], [], 0) == []
    assert found.set_apart([], [A], 3) == []


def test_what_has_nothing_in_common_goes_by_its_own_worth() -> None:
    found = belief({A: 1.0, LIKE_A: 0.8, B: 0.6, C: 0.4}, 0.0)
    assert found.set_apart([C, B, LIKE_A, A], [], 4) == [A, LIKE_A, B, C]


def test_certain_ones_go_by_their_worth_too() -> None:
    found = belief({A: 1.0, LIKE_A: 0.9, B: 0.1, C: 0.2}, 0.99, sd=1e-6)
    assert found.set_apart([A, LIKE_A, B, C], [], 3) == [A, LIKE_A, C]


def test_an_uncertain_one_is_worth_a_place_before_a_certain_one() -> None:
    means = {A: 1.0, LIKE_A: 0.9, B: 0.6}
    covariance = np.diag([0.01, 0.01, 4.0])
    found = Belief(tuple(means), np.array(list(means.values())), covariance, SIZES)
    assert found.set_apart([A, LIKE_A, B], [A], 1) == [B]


def test_who_else_is_there_changes_nobodys_lots() -> None:
    one = belief({A: 1.0, LIKE_A: 0.95, B: 0.5, C: 0.0}, 0.5)
    fewer = Belief(one.configs[:3], one.mean[:3], one.covariance[:3, :3], SIZES)
    assert one.set_apart([A, LIKE_A, B], [], 3) == fewer.set_apart([A, LIKE_A, B], [], 3)


def test_what_a_shape_leaves_of_a_budget_goes_into_finalists_first() -> None:
    price = {name: _price(name) for name in ("lean", "narrow")}
    between = price["narrow"] + 0.6 * (price["lean"] - price["narrow"])
    name, made = fit_shape(plan(budget=Budget(gpu_seconds=between)))
    assert name == "narrow"
    narrow, lean = SHAPES["narrow"], SHAPES["lean"]
    assert made.shape.kept[-1] > narrow.kept[-1]
    assert made.shape.screened <= lean.screened
    exact, as_it_is = fit_shape(plan(budget=Budget(gpu_seconds=price["narrow"] + 1.0)))
    assert exact == "narrow"
    assert as_it_is.shape.kept == narrow.kept


def _price(name: str) -> float:
    """The least budget, in steps of a percent, that pays for a shape."""
    for seconds in np.geomspace(500.0, 20_000.0, 370):
        if fit_shape(plan(budget=Budget(gpu_seconds=float(seconds))))[0] == name:
            return float(seconds)
    pytest.fail(f"no budget pays for {name}")
