"""Do finished searches help the next one, and do they ever harm it?

`make bench-history` compares warm starts with cold ones: on made-up services whose finished
searches carry over or not, and on the recorded table of `bench.selection`, where every dataset is
new to the others. Once as the pair that is recommended first, once as a whole search on a twentieth
of the grid's budget. Nothing is trained.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import history_report, selection_report
from bench.history_report import CHEAPER, COUNTS, SEARCHED, TABLES, Findings, Start
from bench.history_worlds import PAIRS, PRIOR, Pair, Past, service
from bench.search_report import SHARE, TUNED
from bench.search_strategies import grid, ours
from bench.search_table import worlds
from bench.search_world import Law, World, arms_of, made_of
from bench.selection_cases import BUDGET, RUNGS, pair_name
from bench.selection_cases import PAIRS as TRAINED
from bench.selection_read import Found, read
from bench.selection_stats import kendall_tau
from bench.train_report import Table
from core.profile import DatasetProfile
from core.spec import BASE_KERNELS, DivergenceName
from selection.history import Gain, PastSearch, refine
from selection.parts import NO_HISTORY, Refinement
from selection.prior import NOTHING_KNOWN, PriorTable
from selection.recommender import recommend

FIRST, WHOLE = 1000, 100
"""Made-up services of each kind: first pairs take milliseconds, searches a tenth of a second."""
LAW = Law(pair_sd=math.hypot(PRIOR.kernel_sd, PRIOR.divergence_sd))
_REPEATS = 5


# ------------------------------------------------------------------- made up


def first_pairs(past: Past, searches: int, *, template: DatasetProfile, number: int) -> list[Start]:
    """What the first pair loses, in so many made-up services."""
    found = []
    for seed in range(number):
        made = service(past, searches, template=template, seed=seed)
        true = _values(made.gains)
        found.append(
            Start(
                kind=past.value,
                searches=searches,
                data=f"service {seed}",
                used=made.history.use.weight > 0.0,
                cold=made.regret(made.cold),
                warm=made.regret(made.warm),
                cold_tau=kendall_tau(_values(made.cold), true),
                warm_tau=kendall_tau(_values(made.warm), true),
            )
        )
    return found


def _values(of: Mapping[Pair, float]) -> NDArray[np.float64]:
    # Scores are sums of parts: what is equal but for rounding is a tie.
    return np.array([of[pair] for pair in PAIRS]).round(9)


def whole_searches(
    past: Past, searches: int, *, template: DatasetProfile, number: int
) -> list[Start]:
    """What whole searches lose, in so many made-up services; only the scores differ."""
    found, helps = [], past is Past.SAME
    for seed in range(number):
        made = service(past, searches, template=template, seed=seed)
        cold, warm = _named(made.cold), _named(made.warm)
        world = made_of(LAW, seed, gains=_named(made.gains), scores=cold)
        budget = SHARE * world.grid_cost()
        found.append(
            Start(
                kind=past.value,
                searches=searches,
                data=f"service {seed}",
                used=made.history.use.weight > 0.0,
                cold=lost(world, cold, budget=budget, seeds=(seed,)),
                warm=lost(world, warm, budget=budget, seeds=(seed,)),
                cheap=lost(world, warm, budget=CHEAPER * budget, seeds=(seed,)) if helps else None,
            )
        )
    return found


def _named(of: Mapping[Pair, float]) -> dict[str, float]:
    """The 28 pairs that worlds have, by name."""
    return {pair_name(k.value, d.value): x for (k, d), x in of.items() if k in BASE_KERNELS}


def lost(
    world: World, scores: Mapping[str, float], *, budget: float, seeds: Sequence[int]
) -> float:
    """Accuracy points that our search with these scores loses against the pick of the grid."""
    reference = grid(world, settings=len(world.grid))
    best = world.worth(reference.arm, reference.setting).accuracy
    started = replace(world, arms=arms_of(scores))
    picks = [ours(started, budget, seed) for seed in seeds]
    return fmean(100.0 * (best - world.worth(p.arm, p.setting).accuracy) for p in picks)


# ------------------------------------------------------------------ recorded


def recorded(table: Table) -> tuple[list[Start], list[Start]]:
    """First pairs and whole searches on every recorded case, searches of the others before it.

    Once where no table of runs is known, once with the table that the other datasets give: the
    finished searches then say the same a second time.
    """
    cases, _ = read(table.rows)
    there, _ = worlds(table.rows, budget=BUDGET, rungs=RUNGS)
    by_name = {world.name: world for world in there}
    first, whole = [], []
    for found in cases:
        before = [past_search(other) for other in cases if other.case.data != found.case.data]
        for kind, prior in zip(TABLES, (NOTHING_KNOWN, found.prior), strict=True):
            history = refine(found.profile, model=BUDGET["model"], past=before, prior=prior)
            used = history.use.weight > 0.0
            cold = _ranking(found, prior, NO_HISTORY)
            warm = _ranking(found, prior, history)
            about = {"kind": kind, "searches": len(before), "data": found.case.data, "used": used}
            first.append(_first(found, cold, warm, about))
            world = by_name.get(f"{found.case.data}, seed {found.case.seed}")
            if world is not None:
                whole.append(_whole(world, cold, warm, about))
    return first, whole


def past_search(found: Found) -> PastSearch:
    """A recorded case as a search that has ended: what its 28 pairs have won."""
    won = found.gains()
    return PastSearch(
        profile=found.profile,
        model=BUDGET["model"],
        gains=tuple(
            Gain(kernel, divergence, float(won[i, j]))
            for i, kernel in enumerate(BASE_KERNELS)
            for j, divergence in enumerate(DivergenceName)
        ),
    )


def _ranking(found: Found, prior: PriorTable, history: Refinement) -> dict[str, float]:
    """Scores of the 28 pairs by name, the best first."""
    ranking = recommend(found.profile, history=history, prior=prior).ranking
    trained = {kernel.value for kernel in BASE_KERNELS}
    return {
        pair_name(entry.kernel, entry.divergence): round(entry.score.value, 9)
        for entry in ranking
        if entry.mode == "penalty" and entry.kernel in trained
    }


def _first(
    found: Found, cold: Mapping[str, float], warm: Mapping[str, float], about: Mapping[str, Any]
) -> Start:
    won = dict(zip(TRAINED, found.gains().ravel().tolist(), strict=True))
    best = max(won.values())
    true = np.array([won[name] for name in TRAINED])

    def tau(said: Mapping[str, float]) -> float:
        return kendall_tau(np.array([said[name] for name in TRAINED]), true)

    return Start(
        **about,
        cold=best - won[next(iter(cold))],
        warm=best - won[next(iter(warm))],
        cold_tau=tau(cold),
        warm_tau=tau(warm),
    )


def _whole(
    world: World, cold: Mapping[str, float], warm: Mapping[str, float], about: Mapping[str, Any]
) -> Start:
    # One setting is recorded; the budget is what a tuned grid's would allow.
    budget = SHARE * TUNED * world.grid_cost(settings=1)
    seeds = range(_REPEATS)
    return Start(
        **about,
        cold=lost(world, cold, budget=budget, seeds=seeds),
        warm=lost(world, warm, budget=budget, seeds=seeds),
        cheap=lost(world, warm, budget=CHEAPER * budget, seeds=seeds),
    )


# ---------------------------------------------------------------------- main


def findings(table: Table, *, first: int, whole: int) -> Findings:
    """Everything, with so many made-up services of each kind."""
    cases, _ = read(table.rows)
    if not cases:
        raise SystemExit(
            f"{selection_report.TABLE} has no whole case, whose metrics made-up data are like: "
            "`FULL=1 make bench-selection`"
        )
    template = cases[0].profile
    pairs, searches = recorded(table)
    return Findings(
        first=[
            start
            for past in Past
            for number in COUNTS
            for start in first_pairs(past, number, template=template, number=first)
        ],
        whole=[
            start
            for past in Past
            for number in SEARCHED
            for start in whole_searches(past, number, template=template, number=whole)
        ],
        recorded_first=pairs,
        recorded_whole=searches,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=FIRST, help="services for first pairs")
    parser.add_argument("--whole", type=int, default=WHOLE, help="services for whole searches")
    options = parser.parse_args()
    if min(options.first, options.whole) < 2:
        parser.error("--first and --whole: expected 2 or more made-up services of each kind")
    found = findings(Table(selection_report.TABLE), first=options.first, whole=options.whole)
    usual = (options.first, options.whole) == (FIRST, WHOLE)
    history_report.report(found, publish=usual)


if __name__ == "__main__":
    main()
