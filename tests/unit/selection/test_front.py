"""The Pareto front is exactly what nothing dominates, ties included."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selection.front import Point, non_dominated

SMALL = st.integers(0, 4).map(float)


def by_definition(points: list[Point]) -> list[int]:
    def dominates(p: Point, q: Point) -> bool:
        return all(a <= b for a, b in zip(p, q, strict=True)) and p != q

    return [i for i, q in enumerate(points) if not any(dominates(p, q) for p in points)]


@given(st.lists(st.tuples(SMALL, SMALL, SMALL), max_size=40))
def test_front_is_what_the_definition_says(points: list[Point]) -> None:
    assert non_dominated(points) == by_definition(points)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 1.0, 1.0)], [0]),
        ([(1.0, 1.0, 1.0), (1.0, 1.0, 1.0)], [0, 1]),
        ([(1.0, 1.0, 1.0), (1.0, 1.0, 2.0)], [0]),
        ([(0.5, 0.2, 9.0), (0.6, 0.1, 8.0), (0.6, 0.2, 9.0)], [0, 1]),
    ],
)
def test_small_fronts(points: list[Point], front: list[int]) -> None:
    assert non_dominated(points) == front


def test_a_large_front_is_found_at_once() -> None:
    x, y, _ = np.random.default_rng(0).random((3, 20_000))
    points = [(float(a), float(b), float(2.0 - a - b)) for a, b in zip(x, y, strict=True)]
    started = time.perf_counter()
    assert len(non_dominated(points)) == len(points)  # a plane: nobody dominates
    assert time.perf_counter() - started < 5.0  # every pair would take minutes
