"""What decides how a run ends, on the recorded table: divergence, kernel or setting; and how early.

Of the first seed's runs, on all validation pairs. Shares are of the sum of squares of what pairs at
one setting end at, around its mean: sums over kernels or divergences of squared means (two-way
layout, one run a cell), averaged over settings. Correlations are with the end of the same runs: of
pairs within a setting, averaged over settings, and of the means of settings, which are few.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.search_record import BUDGET, RUNGS
from bench.search_table import Case
from bench.search_world import Floats
from bench.selection_cases import PAIRS


@dataclass(frozen=True)
class Parts:
    """Of one dataset; correlations by rung, of settings None where there are fewer than three.

    Not a number where everything is the same. `pairs_sd` and `settings_sd` are standard deviations
    of the end, percent of log-loss.
    """

    data: str
    settings: int
    kernel: float
    divergence: float
    pairs_sd: float
    settings_sd: float
    of_pairs: tuple[float, ...]
    of_settings: tuple[float, ...] | None


def parts_of(case: Case) -> Parts:
    """What decides on one dataset; runs that broke down count as the worst of their setting."""
    shown = _shown(case)
    ends = shown[-1]
    means = shown.mean(axis=2)
    shares = np.array([_shares(row) for row in ends]).mean(axis=0)
    rungs = range(len(RUNGS))
    return Parts(
        data=case.data,
        settings=ends.shape[0],
        kernel=float(shares[0]),
        divergence=float(shares[1]),
        pairs_sd=float(np.sqrt(ends.var(axis=1).mean())),
        settings_sd=float(means[-1].std()),
        of_pairs=tuple(
            float(np.mean([_correlation(a, b) for a, b in zip(shown[k], ends, strict=True)]))
            for k in rungs
        ),
        of_settings=tuple(_correlation(means[k], means[-1]) for k in rungs)
        if ends.shape[0] >= 3
        else None,
    )


def _shown(case: Case) -> Floats:
    """Percent won, (rungs and the end, settings, pairs)."""
    seed = case.seeds[0]
    found = np.full((len(RUNGS) + 1, case.whole[seed], len(PAIRS)), np.nan)
    for rung, setting, pair in np.ndindex(found.shape):
        score = case.scored((PAIRS[pair], setting, seed), rung)
        if score is not None:
            found[rung, setting, pair] = -100.0 * math.log(score.log_loss)
    worst = np.nanmin(found, axis=2, keepdims=True)
    return np.where(np.isnan(found), worst, found)


def _shares(row: Floats) -> tuple[float, float]:
    """Parts of the sum of squares that kernels and divergences explain."""
    away = row - row.mean()
    parts = []
    for place in (0, 1):
        names = [pair.split(" × ")[place] for pair in PAIRS]
        of = [away[[name == each for each in names]] for name in sorted(set(names))]
        parts.append(sum(len(x) * float(x.mean()) ** 2 for x in of))
    total = float(away @ away)
    return (parts[0] / total, parts[1] / total) if total else (0.0, 0.0)


def _correlation(a: Floats, b: Floats) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0.0 and b.std() > 0.0 else math.nan


def parts_table(found: Sequence[Parts]) -> str:
    """As a block of the page."""
    at = [f"{step / BUDGET['steps']:.0%}" for step in RUNGS]
    text = [
        "| dataset | settings | pairs at one setting end sd apart, % | of that divergence | kernel "
        f"| {' | '.join(f'order at {x} with the end' for x in at)} | settings end sd apart, % "
        f"| {' | '.join(f'order at {x}' for x in at)} |",
        "|" + "---|" * (6 + 2 * len(at)),
    ]
    for x in found:
        settings = x.of_settings or (math.nan,) * len(at)
        cells = [
            x.data, f"{x.settings}", f"{x.pairs_sd:.2f}", f"{x.divergence:.0%}", f"{x.kernel:.0%}",
            *map(_said, x.of_pairs), f"{x.settings_sd:.2f}", *map(_said, settings),
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _said(correlation: float) -> str:
    return f"{correlation:.2f}" if math.isfinite(correlation) else "–"
