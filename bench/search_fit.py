"""What short runs say of whole ones, on recorded tables: s_k and the correlation of a rung.

The search assumes both (selection/belief.py). Here they are estimated by moments from two looks at
the same runs on different pairs, or at the same configurations with different seeds too. With y_k
and y'_k percent of log-loss at rung k in the two, centred within a dataset, and K the end,

    s_k = Cov(y_k, y'_K) / Cov(y_K, y'_K),
    rho_k = Cov(y_k, y'_K) / sqrt(Cov(y_k, y'_k) Cov(y_K, y'_K)),

sums over datasets in numerator and denominator, both looks in either role. Noise of what the looks
do not share is in none of them. Intervals are those of the jackknife over datasets.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.search_record import BUDGET, RUNGS
from bench.search_table import HALVES, Case
from bench.search_world import Floats
from core.profile import Estimate
from selection.belief import misleading, signal
from worker.training.evaluate import t_quantile

Row = dict[str, Any]


@dataclass(frozen=True)
class Looks:
    """Two independent looks at n configurations of a dataset at all rungs, percent, (rungs, n)."""

    data: str
    one: Floats
    other: Floats


@dataclass(frozen=True)
class Fitted:
    """What a rung of this part of the run says, and what the search assumes of it."""

    fraction: float
    signal: Estimate | None
    correlation: Estimate | None
    assumed_signal: float
    assumed_correlation: float


@dataclass(frozen=True)
class Repeated:
    """How much configurations of a dataset differ at the end: as one look shows, and for good.

    Standard deviations in percent of log-loss. `lasting` is the root of Cov(y_K, y'_K), 0 where
    that is negative: the part of what is seen that another seed and other pairs show too.
    """

    data: str
    configurations: int
    seen: float
    lasting: float


def repeated(looks: Sequence[Looks]) -> list[Repeated]:
    """By dataset, all its looks in one."""
    found = []
    for data in sorted({look.data for look in looks}):
        of = [look for look in looks if look.data == data]
        ends = [(x.one[-1] - x.one[-1].mean(), x.other[-1] - x.other[-1].mean()) for x in of]
        number = sum(one.size - 1 for one, _ in ends)
        shared = sum(float(one @ other) for one, other in ends) / number
        total = sum(float(one @ one + other @ other) / 2 for one, other in ends) / number
        found.append(
            Repeated(data, of[0].one.shape[1], math.sqrt(total), math.sqrt(max(shared, 0.0)))
        )
    return found


def looks_of_runs(case: Case) -> list[Looks]:
    """Each seed's runs on one half of the prompts and on the other."""
    found = []
    for seed in case.seeds:
        own = case.first(case.whole[seed])
        one, other = (_seen(own, seed, half=half) for half in HALVES)
        fine = np.isfinite(one).all(axis=0) & np.isfinite(other).all(axis=0)
        found.append(Looks(case.data, one[:, fine], other[:, fine]))
    return found


def looks_of_case(case: Case) -> list[Looks]:
    """One seed on one half of the prompts and the other seed on the other half, both ways."""
    case = case.first(case.twice)
    if len(case.seeds) < 2 or not case.twice:
        return []
    first, second = case.seeds[:2]
    found = []
    for half in HALVES:
        both = [_seen(case, seed, half=at) for seed, at in ((first, half), (second, 1 - half))]
        fine = np.isfinite(both[0]).all(axis=0) & np.isfinite(both[1]).all(axis=0)
        found.append(Looks(case.data, both[0][:, fine], both[1][:, fine]))
    return found


def _seen(case: Case, seed: int, *, half: int) -> Floats:
    places = sorted({(arm, setting) for arm, setting, of in case.runs if of == seed})
    found = np.full((len(RUNGS) + 1, len(places)), np.nan)
    for column, (arm, setting) in enumerate(places):
        for rung in range(len(RUNGS) + 1):
            score = case.scored((arm, setting, seed), rung, half=half)
            if score is not None:
                found[rung, column] = -100.0 * math.log(score.log_loss)
    return found


def looks_of_seeds(rows: Sequence[Row], *, budget: Row, rungs: Sequence[int]) -> list[Looks]:
    """Two seeds of a table in which each has a split of its own."""
    runs: dict[str, dict[tuple[str, int], list[float]]] = defaultdict(dict)
    for row in rows:
        if row.get("kind") != "run" or row.get("budget") != budget or row["losses"] is None:
            continue
        at = [row["rungs"].get(str(step), {}).get("log_loss") for step in rungs]
        if None not in at:
            runs[row["data"]][row["pair"], row["seed"]] = [*at, row["log_loss"]]
    found = []
    for data, of in sorted(runs.items()):
        names = sorted(name for name, seed in of if seed == 0 and (name, 1) in of)
        if len(names) >= 3:
            one, other = (
                -100.0 * np.log(np.array([of[name, seed] for name in names]).T) for seed in (0, 1)
            )
            found.append(Looks(data, one, other))
    return found


def fit(looks: Sequence[Looks], rungs: Sequence[int]) -> list[Fitted]:
    """Both constants of every rung (in steps) but the last; None where the data carry none."""
    names = sorted({each.data for each in looks})
    found = []
    whole = rungs[-1]
    for rung, step in enumerate(rungs[:-1]):
        together = _moments(looks, rung)
        without = [_moments([x for x in looks if x.data != name], rung) for name in names]
        found.append(
            Fitted(
                fraction=step / whole,
                signal=_estimate(together[0], [each[0] for each in without]),
                correlation=_estimate(together[1], [each[1] for each in without]),
                assumed_signal=signal(step, whole),
                assumed_correlation=1.0 / math.sqrt(1.0 + misleading(step, whole)),
            )
        )
    return found


def _moments(looks: Sequence[Looks], rung: int) -> tuple[float, float]:
    """(s_k, rho_k); not a number where a variance comes out at 0 or below."""
    ends, cross, here = 0.0, 0.0, 0.0
    for each in looks:
        one = each.one - each.one.mean(axis=1, keepdims=True)
        other = each.other - each.other.mean(axis=1, keepdims=True)
        ends += float(one[-1] @ other[-1])
        here += float(one[rung] @ other[rung])
        cross += 0.5 * float(one[rung] @ other[-1] + other[rung] @ one[-1])
    if ends <= 0.0:
        return math.nan, math.nan
    return cross / ends, cross / math.sqrt(ends * here) if here > 0.0 else math.nan


def _estimate(value: float, without: Sequence[float]) -> Estimate | None:
    """The value with its jackknife interval, t with one degree less than there are datasets."""
    left = np.array(without)
    if left.size < 2 or not math.isfinite(value) or not np.isfinite(left).all():
        return None
    n = left.size
    error = math.sqrt((n - 1) / n * float(np.square(left - left.mean()).sum()))
    half = t_quantile(n - 1) * error
    return Estimate(value=value, low=value - half, high=value + half)


@dataclass(frozen=True)
class ShortRuns:
    """All that a table says of short runs."""

    table: str
    repeated: Sequence[Repeated]
    fitted: Sequence[Fitted]

    @classmethod
    def of(cls, table: str, looks: Sequence[Looks], rungs: Sequence[int]) -> "ShortRuns":
        """Of all looks at a table; empty where there are none."""
        return cls(table, repeated(looks), fit(looks, rungs) if looks else [])

    @property
    def text(self) -> str:
        """As a block of the page."""
        return f"{repeated_table(self.repeated)}\n\n{fitted_table(self.fitted)}"


def repeated_table(found: Sequence[Repeated]) -> str:
    """As a block of the page."""
    text = [
        "| dataset | configurations | they differ by, sd, % of log-loss | for good |",
        "|---|---|---|---|",
    ]
    text += [f"| {x.data} | {x.configurations} | {x.seen:.2f} | {x.lasting:.2f} |" for x in found]
    return "\n".join(text)


def fitted_table(found: Sequence[Fitted]) -> str:
    """As a block of the page."""
    text = [
        "| part of the run | s_k | assumed | correlation with the end | assumed |",
        "|---|---|---|---|---|",
    ]
    text += [
        f"| {x.fraction:.0%} | {_said(x.signal)} | {x.assumed_signal:.2f} "
        f"| {_said(x.correlation)} | {x.assumed_correlation:.2f} |"
        for x in found
    ]
    return "\n".join(text)


def _said(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not to be had"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


STEPS = (*RUNGS, BUDGET["steps"])
"""Rungs of the table with settings, the end included."""
