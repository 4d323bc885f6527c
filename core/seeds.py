"""What a seed does to every trial alike, taken off: trials of different seeds on one level.

Trials with the same seed share the order of data, the adapter's first weights and all other lots.
Most of what a seed does to a log-loss it does to all of them alike, so differences within a seed
are far steadier than log-losses are, and a mean over other seeds is no fair comparison: whoever was
trained with a hard seed too would look worse.
"""

import math
from collections.abc import Mapping, Sequence

_NOTHING = 1e-9
"""Pivots below are 0 but for rounding: nothing tells that seed from those before it."""

Matrix = list[list[float]]


def levels(log_losses: Sequence[Mapping[int, float]]) -> list[float]:
    """Return what each configuration shows, as if all had been trained with the lowest seed alone.

    a_i of y_is = a_i + c_s + e_is by least squares, c of the lowest seed 0 (two-way layout with
    holes: Yates 1933); y_is is the log-loss of configuration i with seed s, as many of each as
    there are. A configuration with the lowest seed alone keeps its own log-loss; where all have
    the same seeds differences are those of means. A seed that one configuration alone has tells
    nothing: its own luck could be the seed's.

    Raises:
        ValueError: a configuration has no log-loss.
    """
    places, normal = _normal([tuple(each) for each in log_losses])
    right = [0.0] * len(places)
    for each in log_losses:
        mean = math.fsum(each.values()) / len(each)
        for seed, value in each.items():
            right[places[seed]] += value - mean
    (shifts,) = _solved(normal, [right])
    return [
        math.fsum(value - shifts[places[seed]] for seed, value in each.items()) / len(each)
        for each in log_losses
    ]


def level_weights(seeds: Sequence[Sequence[int]]) -> Matrix:
    """Return W with a = W y: y (N,) holds the log-losses, configuration by configuration.

    `seeds[i]` are those of configuration i, in the order of its log-losses; W is
    (configurations, N), its rows sum to 1.

    Raises:
        ValueError: a configuration has no seed.
    """
    places, normal = _normal(seeds)
    right = [[_centred(own, seed, other) for other in places] for own in seeds for seed in own]
    shifts, found, at = _solved(normal, right), [], 0
    for own in seeds:
        row = [-math.fsum(c[places[seed]] for seed in own) / len(own) for c in shifts]
        for k in range(len(own)):
            row[at + k] += 1.0 / len(own)
        at += len(own)
        found.append(row)
    return found


def _normal(seeds: Sequence[Sequence[int]]) -> tuple[dict[int, int], Matrix]:
    """Places of the seeds, lowest first, and the normal equations of what they do."""
    if not all(seeds):
        raise ValueError("a configuration has no seed; expected one or more of each")
    places = {seed: k for k, seed in enumerate(sorted({s for own in seeds for s in own}))}
    normal = [[0.0] * len(places) for _ in places]
    for own in seeds:
        for seed in own:
            for other in own:
                normal[places[seed]][places[other]] += _centred(own, seed, other)
    return places, normal


def _centred(own: Sequence[int], seed: int, other: int) -> float:
    """Of the projection off a configuration's mean: entry (seed, other)."""
    return float(seed == other) - (1.0 / len(own) if other in own else 0.0)


def _solved(matrix: Matrix, right: Matrix) -> Matrix:
    """Solve matrix x = r for every r: symmetric, of a handful of seeds, and singular.

    Of seeds that only differences are known of, the lowest one is 0.
    """
    size = len(matrix)
    rows = [[*matrix[k], *(r[k] for r in right)] for k in range(size)]
    known = []
    for k in reversed(range(size)):
        pivot = rows[k]
        if pivot[k] < _NOTHING:
            continue
        known.append(k)
        for j in range(size):
            if j != k:
                factor = rows[j][k] / pivot[k]
                rows[j] = [a - factor * b for a, b in zip(rows[j], pivot, strict=True)]
    return [
        [rows[k][size + n] / rows[k][k] if k in known else 0.0 for k in range(size)]
        for n in range(len(right))
    ]
