"""The A/A test: one configuration under two names, and how often one "beats" the other.

On recorded per-pair losses: two seeds of every arm and setting are the two names. With the same
seed they would be the same run; so each has its own, which is harder than anything that a search
compares. They are compared as the search compares its finalists (selection/ties.py), and, to show
what that is for, with prompts alone. Beside it how often pairs are told from plain DPO: a test that
never calls anything is no use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.search_record import RUNGS
from bench.search_table import Case
from bench.search_world import Floats
from bench.selection_cases import PAIRS, PLAIN
from selection.ties import LEVEL, SEED_NOISE, Entrant, SeedNoise, gaps

_RESAMPLES = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """Comparisons of one dataset: two names for one configuration, and pairs with plain DPO.

    `false` calls of `same` comparisons of one seed with another as the search makes them, `naive`
    ones without the noise of seeds; of `pairs` pairs `told` are called different from plain DPO by
    two seeds of each, `single` by the first seed alone, and of these `turned` lie the other way
    with the second. `own` and `shared` are standard deviations of log-loss over seeds, as parts of
    it: of what a seed does to one configuration, and to all alike.
    """

    data: str
    same: int
    false: int
    naive: int
    pairs: int
    told: int
    single: int
    turned: int
    own: float
    shared: float


def named(case: Case) -> Names:
    """All comparisons of a dataset; none where it has one seed."""
    both: dict[tuple[str, int], Floats] = {}
    for setting in range(case.twice):
        for arm in (PLAIN, *PAIRS):
            scores = [case.scored((arm, setting, seed), len(RUNGS)) for seed in case.seeds[:2]]
            losses = [score.losses for score in scores if score is not None]
            if len(losses) == 2:
                both[arm, setting] = np.stack(losses)
    means = np.array([row.mean(axis=1) for row in both.values()]).reshape(-1, 2)
    apart = np.log(means[:, 0] / means[:, 1]) / math.sqrt(2.0)
    pairs = [
        (both[arm, setting], both[PLAIN, setting])
        for arm, setting in both
        if arm != PLAIN and (PLAIN, setting) in both
    ]
    single = [pair for pair in pairs if _called(case, pair[0][:1], pair[1][:1])]
    return Names(
        data=case.data,
        same=len(both),
        false=sum(_called(case, row[:1], row[1:], shared=False) for row in both.values()),
        naive=sum(_called(case, row[:1], row[1:], noise=NO_NOISE) for row in both.values()),
        pairs=len(pairs),
        told=sum(_called(case, one, other) for one, other in pairs),
        single=len(single),
        turned=sum(_turned(one.mean(axis=1) - other.mean(axis=1)) for one, other in single),
        own=float(np.std(apart)) if both else math.nan,
        shared=abs(float(np.mean(apart))) if both else math.nan,
    )


def _turned(differences: Floats) -> bool:
    """Whether the second seed contradicts the first."""
    return bool(differences[0] * differences[1] < 0.0)


NO_NOISE = SeedNoise(own=0.0, shared=0.0)


def _called(
    case: Case, one: Floats, other: Floats, *, shared: bool = True, noise: SeedNoise = SEED_NOISE
) -> bool:
    """Whether the better of two is called better; losses (seeds, pairs), seeds shared or not."""
    seeds = tuple(range(len(one)))
    again = seeds if shared else tuple(range(len(one), 2 * len(one)))
    entrants = [Entrant(0, one, seeds), Entrant(1, other, again)]
    best = min(entrants, key=lambda entrant: float(entrant.losses.mean())).number
    found = gaps(entrants, case.group, winner=best, noise=noise, resamples=_RESAMPLES)
    return any(gap.is_beaten for gap in found)


def rate(found: Sequence[Names]) -> float | None:
    """Share of false calls over all datasets; None where nothing is recorded."""
    same = sum(each.same for each in found)
    return sum(each.false for each in found) / same if same else None


def names_table(found: Sequence[Names]) -> str:
    """As a block of the page."""
    text = [
        "| dataset | one configuration, two seeds | called different | prompts alone "
        "| pairs against plain DPO | called by two seeds | called by one | of these turned "
        "| own noise of a seed, % of log-loss | shared |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    text += [
        f"| {x.data} | {x.same} | {_part(x.false, x.same)} | {_part(x.naive, x.same)} "
        f"| {x.pairs} | {_part(x.told, x.pairs)} | {_part(x.single, x.pairs)} "
        f"| {_part(x.turned, x.single)} | {100 * x.own:.1f} | {100 * x.shared:.1f} |"
        for x in found
        if x.same
    ]
    return "\n".join(text)


def _part(number: int, of: int) -> str:
    return f"{number} ({number / of:.0%})" if of else "0"


def goal(found: Sequence[Names]) -> Row:
    """The goal of the A/A test; null where nothing is recorded."""
    measured = rate(found)
    return {
        "name": "A/A: share of runs in which one of two equal configurations is said to win",
        "target": f"<= {LEVEL:g}",
        "measured": None if measured is None else round(measured, 3),
        "met": measured is not None and measured <= LEVEL,
    }
