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
    if not all(log_losses):
        raise ValueError("a configuration has no log-loss; expected one or more of each")
    places = {seed: k for k, seed in enumerate(sorted({s for each in log_losses for s in each}))}
    normal = [[0.0] * (len(places) + 1) for _ in places]  # the right side beside the matrix
    for each in log_losses:
        mean = math.fsum(each.values()) / len(each)
        for seed, value in each.items():
            row = normal[places[seed]]
            row[-1] += value - mean
            row[places[seed]] += 1.0
            for other in each:
                row[places[other]] -= 1.0 / len(each)
    shifts = _solved(normal)
    return [
        math.fsum(value - shifts[places[seed]] for seed, value in each.items()) / len(each)
        for each in log_losses
    ]


def level_weights(seeds: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return W with a = W y: y (N,) holds the log-losses, configuration by configuration.

    `seeds[i]` are those of configuration i, in the order of its log-losses; W is
    (configurations, N), its rows sum to 1.

    Raises:
        ValueError: a configuration has no seed.
    """
    columns = [
        levels([{s: float((i, s) == one) for s in own} for i, own in enumerate(seeds)])
        for one in [(i, s) for i, own in enumerate(seeds) for s in own]
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _solved(rows: list[list[float]]) -> list[float]:
    """Solve a system given as rows, right sides last: symmetric, of a few seeds, and singular.

    Of seeds that only differences are known of, the lowest one is 0.
    """
    found = [0.0] * len(rows)
    known = []
    for k in reversed(range(len(rows))):
        if rows[k][k] < _NOTHING:
            continue
        known.append(k)
        for j in range(len(rows)):
            if j != k:
                factor = rows[j][k] / rows[k][k]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[k], strict=True)]
    for k in known:
        found[k] = rows[k][-1] / rows[k][k]
    return found
