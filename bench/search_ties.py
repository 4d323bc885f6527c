"""The A/A test: one configuration under two names, and how often one "beats" the other.

On recorded per-pair losses: two seeds of every arm and setting are the two names. They are compared
as the search compares its finalists (selection/ties.py): with the noise of seeds that it assumes
where no second seed has shown it, and, to show what that is for, with prompts alone. Beside it how
often two seeds of each tell a pair from plain DPO: a test that never calls anything is no use.
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
from selection.ties import LEVEL, SEED_NOISE, Entrant, gaps

_RESAMPLES = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """Comparisons of one dataset: two names for one configuration, and pairs with plain DPO.

    `false` calls of `same` comparisons as the search makes them, `naive` ones without the noise of
    seeds; `told` of `pairs` pairs called different from plain DPO, two seeds each. `seed_noise` is
    the standard deviation of log-loss over seeds, as a part of it.
    """

    data: str
    same: int
    false: int
    naive: int
    pairs: int
    told: int
    seed_noise: float


def named(case: Case) -> Names:
    """All comparisons of a dataset."""
    both: dict[tuple[str, int], Floats] = {}
    for arm in (PLAIN, *PAIRS):
        for setting in range(case.settings):
            scores = [case.scored((arm, setting, seed), len(RUNGS)) for seed in case.seeds[:2]]
            losses = [score.losses for score in scores if score is not None]
            if len(losses) == 2:
                both[arm, setting] = np.stack(losses)
    noises = [0.5 * (row[0].mean() - row[1].mean()) ** 2 / row.mean() ** 2 for row in both.values()]
    pairs = [
        (both[arm, setting], both[PLAIN, setting])
        for arm, setting in both
        if arm != PLAIN and (PLAIN, setting) in both
    ]
    return Names(
        data=case.data,
        same=len(both),
        false=sum(_called(case, row[:1], row[1:], SEED_NOISE) for row in both.values()),
        naive=sum(_called(case, row[:1], row[1:], 0.0) for row in both.values()),
        pairs=len(pairs),
        told=sum(_called(case, one, other, SEED_NOISE) for one, other in pairs),
        seed_noise=math.sqrt(float(np.mean(noises))) if noises else math.nan,
    )


def _called(case: Case, one: Floats, other: Floats, seed_noise: float) -> bool:
    """Whether the better of two is called better; losses (seeds, pairs)."""
    entrants = [Entrant(0, one), Entrant(1, other)]
    best = min(entrants, key=lambda entrant: entrant.log_loss).number
    found = gaps(entrants, case.group, winner=best, seed_noise=seed_noise, resamples=_RESAMPLES)
    return any(gap.is_beaten for gap in found)


def rate(found: Sequence[Names]) -> float | None:
    """Share of false calls over all datasets; None where nothing is recorded."""
    same = sum(each.same for each in found)
    return sum(each.false for each in found) / same if same else None


def names_table(found: Sequence[Names]) -> str:
    """As a block of the page."""
    text = [
        "| dataset | one configuration, two names | called different | prompts alone "
        "| pairs against plain DPO | called different | noise of a seed, % of log-loss |",
        "|---|---|---|---|---|---|---|",
    ]
    text += [
        f"| {x.data} | {x.same} | {_part(x.false, x.same)} | {_part(x.naive, x.same)} "
        f"| {x.pairs} | {_part(x.told, x.pairs)} | {100 * x.seed_noise:.1f} |"
        for x in found
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
