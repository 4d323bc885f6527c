"""The shapes of searches: how many trials go how far, from the dearest to the cheapest."""

import math
from dataclasses import replace

import numpy as np

from selection.draws import RECOMMENDED
from selection.study import Plan, Shape

SHAPES: dict[str, Shape] = {
    "wide": Shape(28 + 7, (16, 10, 4), leading=4, draws=4, repeats=3),
    "usual": Shape(28 + 7, (12, 7, 3), leading=2, draws=2, repeats=2),
    "lean": Shape(28 + 7, (8, 5, 2), leading=2, draws=2, repeats=0),
    "narrow": Shape(14, (5, 3, 1), leading=1, draws=2, repeats=0),
    "few": Shape(6, (3, 2, 1), leading=1, draws=2, repeats=0),
    "least": Shape(3, (2, 1, 1), leading=1, draws=1, repeats=0),
}
"""From the dearest to the cheapest, over four rungs (docs/search.md)."""
MOST_FINALISTS = max(shape.kept[-1] for shape in SHAPES.values())


def shaped(plan: Plan, name: str) -> Plan:
    """The plan in a named shape, fitted to its arms and rungs.

    With fewer rungs than four the last number is still that of the finalists; with more, what is
    kept falls geometrically between those given. A pool allows as many draws as it has settings.
    """
    shape, others = SHAPES[name], len(plan.arms) - 1
    if plan.last == 0:
        kept: tuple[int, ...] = ()
    elif plan.last <= 3:
        kept = (*shape.kept[: plan.last - 1], shape.kept[-1])
    else:
        where = np.linspace(0.0, 2.0, plan.last)
        logs = np.interp(where, [0.0, 1.0, 2.0], np.log(shape.kept))
        kept = tuple(max(1, round(math.exp(x))) for x in logs)
    draws = shape.draws
    if plan.pool:
        draws = min(draws, sum(setting != RECOMMENDED for setting in plan.pool))
    fitted = replace(
        shape,
        draws=draws,
        screened=max(1, min(shape.screened, others)),
        kept=kept,
        leading=min(shape.leading, others),
    )
    return replace(plan, shape=fitted)
