"""The Pareto front: what nothing else beats in every objective at once."""

from bisect import bisect_right
from collections.abc import Sequence

Point = tuple[float, float, float]


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point dominates, in ascending order.

    All three objectives are minimised; p dominates q when p <= q in each and p < q in one, so
    equal points stand or fall together. Sweep over the first objective with the staircase of the
    other two (Kung, Luccio and Preparata 1975): O(n log n) comparisons. Points must be finite.
    """
    seconds: list[float] = []  # ascending
    thirds: list[float] = []  # descending: the least third objective up to each second one
    front: list[int] = []
    kept: Point | None = None
    for index in sorted(range(len(points)), key=points.__getitem__):
        point = points[index]
        _, second, third = point
        if point == kept:
            front.append(index)
            continue
        behind = bisect_right(seconds, second)
        if behind > 0 and thirds[behind - 1] <= third:
            continue
        first = behind - 1 if behind > 0 and seconds[behind - 1] == second else behind
        last = behind
        while last < len(thirds) and thirds[last] >= third:
            last += 1
        seconds[first:last] = [second]
        thirds[first:last] = [third]
        front.append(index)
        kept = point
    return sorted(front)
