"""From replayed searches to a block in docs/search.md, goals and one JSON line."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel

from bench import search_ties
from bench.report import ROOT, publish_block
from bench.search_fit import ShortRuns
from bench.search_parts import Parts, parts_table
from bench.search_strategies import STRATEGIES, Pick, grid
from bench.search_ties import Names
from bench.search_world import Law, World, made_up
from core.profile import Estimate
from worker.training.evaluate import bootstrap_mean

SUMMARY = ROOT / "bench" / "results" / "search.json"
PAGE = ROOT / "docs" / "search.md"
BEGIN, END = "<!-- search: begin -->", "<!-- search: end -->"
SHARE = 0.05
"""Of the tuned grid's cost: what every strategy may spend."""
MIN_DATASETS = 4
TUNED = 4
"""Settings of the tuned grid; a table with fewer of them has no tuned grid."""
OURS, PLAIN_GRID, TUNED_GRID = "ours", "grid, recommended settings", "grid, tuned"
LAWS = {
    "pairs differ by 1.5 %": Law(pair_sd=1.5),
    "pairs differ by 0.7 %": Law(pair_sd=0.7),
    "pairs differ by 1.5 %, half of it kernel + divergence": Law(pair_sd=1.5, additive=0.5),
    "pairs differ by 1.5 %, scores mean nothing": Law(pair_sd=1.5, agreement=0.0),
}
_RECORDED_REPEATS = 5

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What one strategy came to on one world: regret in accuracy points and percent of log-loss.

    Against the pick of the grid over all settings that the world has; below 0 it was better.
    """

    strategy: str
    data: str
    points: float
    percent: float
    cost: float
    grid_share: float


def outcomes(world: World, *, seeds: Sequence[int], budget: float) -> list[Outcome]:
    """All strategies on one world, each with each seed; the grids once."""
    best = grid(world, settings=len(world.grid))
    whole = world.grid_cost()
    picks: list[tuple[str, Pick]] = [(PLAIN_GRID, grid(world, settings=1))]
    if len(world.grid) > 1:
        picks.append((TUNED_GRID, best))
    for name, strategy in STRATEGIES.items():
        picks += [(name, strategy(world, budget, seed)) for seed in seeds]
    reference = world.worth(best.arm, best.setting)
    found = []
    for name, pick in picks:
        worth = world.worth(pick.arm, pick.setting)
        found.append(
            Outcome(
                strategy=name,
                data=world.data,
                points=100.0 * (reference.accuracy - worth.accuracy),
                percent=100.0 * math.log(worth.log_loss / reference.log_loss),
                cost=pick.cost,
                grid_share=pick.cost / whole,
            )
        )
    return found


def on_made_up(law: Law, *, replicates: int) -> list[Outcome]:
    """All strategies on so many worlds of a law."""
    found: list[Outcome] = []
    for seed in range(replicates):
        world = made_up(law, seed)
        found += outcomes(world, seeds=(seed,), budget=SHARE * world.grid_cost())
    return found


def on_recorded(worlds: Sequence[World]) -> list[Outcome]:
    """All strategies on recorded worlds.

    A table with one setting has no tuned grid: the budget is what that would allow.
    """
    found: list[Outcome] = []
    for world in worlds:
        settings = max(TUNED, len(world.grid))
        budget = SHARE * settings * world.grid_cost(settings=1)
        found += outcomes(world, seeds=range(_RECORDED_REPEATS), budget=budget)
    return found


# ----------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Line:
    """A strategy over all worlds of a source; intervals are over datasets."""

    strategy: str
    points: Estimate
    percent: Estimate
    p90: float
    within: float
    cost: float
    share: float


def lines(found: Sequence[Outcome]) -> list[Line]:
    """A line for each strategy, in the order in which they were run."""
    by_name: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in found:
        by_name[outcome.strategy].append(outcome)
    return [_line(name, of) for name, of in by_name.items()]


def _line(name: str, of: Sequence[Outcome]) -> Line:
    points = [o.points for o in of]
    return Line(
        strategy=name,
        points=_over_data(of, points),
        percent=_over_data(of, [o.percent for o in of]),
        p90=float(np.quantile(points, 0.9)),
        within=float(np.mean([p <= 0.5 for p in points])),
        cost=float(np.mean([o.cost for o in of])),
        share=float(np.mean([o.grid_share for o in of])),
    )


def _over_data(of: Sequence[Outcome], values: Sequence[float]) -> Estimate:
    names = sorted({o.data for o in of})
    group = np.array([names.index(o.data) for o in of], dtype=np.int64)
    return bootstrap_mean(np.array(values, dtype=np.float64), group, seed=0, resamples=1000)


def lead(found: Sequence[Outcome], rival: str) -> Estimate:
    """Accuracy points by which ours is ahead of another, dataset by dataset."""
    mine: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    for outcome in found:
        if outcome.strategy == OURS:
            mine[outcome.data].append(outcome.points)
        elif outcome.strategy == rival:
            theirs[outcome.data].append(outcome.points)
    gaps = np.array([float(np.mean(theirs[d]) - np.mean(mine[d])) for d in sorted(mine)])
    return bootstrap_mean(gaps, np.arange(gaps.size, dtype=np.int64), seed=0, resamples=1000)


# --------------------------------------------------------------------- goals


def goals(
    tuned: Sequence[Outcome], single: Sequence[Outcome], *, settings: int = TUNED
) -> list[Row]:
    """The goals of the search on recorded tables: `tuned` with `settings`, `single` with one.

    Null and not met where fewer than four datasets are recorded: made-up worlds are no evidence. A
    grid of fewer than four settings is no tuned grid.
    """
    tuned = tuned if _enough(tuned) else []
    single = single if _enough(single) else []
    whole = tuned if settings >= TUNED else []
    mine = next((line for line in lines(whole) if line.strategy == OURS), None)
    cheap = mine is not None and mine.share <= SHARE
    points = None if mine is None else mine.points
    tail = None if mine is None else mine.p90
    found = [
        _goal(
            "mean regret against the tuned grid, points, <= 5 % of its cost", "<=", 0.5, points,
            also=cheap,
        ),
        _goal("P90 of that regret", "<=", 1.5, tail, also=cheap),
    ]  # fmt: skip
    either = tuned or single
    behind = lead(either, PLAIN_GRID) if either else None
    share = _mean_cost(either, OURS) / _mean_cost(either, PLAIN_GRID) if either else 1.0
    found.append(
        _goal(
            "behind the 28 x 1 grid, points, upper end of the interval, <= 20 % of its cost",
            "<=", 0.2, None if behind is None else -behind.low, also=share <= 0.2,
        )
    )  # fmt: skip
    rivals = [name for name in STRATEGIES if name not in (OURS, "metrics alone")]
    leads = [lead(either, name) for name in rivals] if either else []
    smallest = min(leads, key=lambda estimate: estimate.value, default=None)
    found.append(
        _goal("smallest lead over another strategy, equal budget, points", ">", 0.0, smallest)
    )
    return found


def _enough(found: Sequence[Outcome]) -> bool:
    return len({outcome.data for outcome in found}) >= MIN_DATASETS


def _mean_cost(found: Sequence[Outcome], name: str) -> float:
    return float(np.mean([o.cost for o in found if o.strategy == name]))


def _goal(
    name: str, sign: str, target: float, measured: Estimate | float | None, *, also: bool = True
) -> Row:
    value = measured.value if isinstance(measured, Estimate) else measured
    reached = value is not None and (value > target if sign == ">" else value <= target)
    row: Row = {
        "name": name,
        "target": f"{sign} {target:g}",
        "measured": None if value is None else round(value, 3),
        "met": reached and also,
    }
    if isinstance(measured, Estimate):
        row["interval"] = [round(measured.low, 3), round(measured.high, 3)]
    return row


# ---------------------------------------------------------------------- block


def _table(found: Sequence[Outcome]) -> str:
    text = [
        "| strategy | regret, accuracy points | P90 | share <= 0.5 | log-loss, % | cost, runs "
        "| of the grid |",
        "|---|---|---|---|---|---|---|",
    ]
    text += [
        f"| {x.strategy} | {_said(x.points)} | {x.p90:.2f} | {x.within:.2f} | {_said(x.percent)} "
        f"| {x.cost:.1f} | {x.share:.1%} |"
        for x in lines(found)
    ]
    return "\n".join(text)


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def goal_table(found: Sequence[Row]) -> str:
    text = ["| goal | target | measured | met |", "|---|---|---|---|"]
    for goal in found:
        said = "not yet" if goal["measured"] is None else f"{goal['measured']}"
        text.append(
            f"| {goal['name']} | {goal['target']} | {said} | {'yes' if goal['met'] else '**no**'} |"
        )
    return "\n".join(text)


@dataclass(frozen=True)
class Findings:
    """All replays: on the table with `settings`, on that with one, and on made-up worlds by law.

    `tuned` is judged by the checkpoints that were picked; `again` by another seed's runs of what
    was picked, at `twice` settings. `names` are A/A tests by dataset, `short` is what rungs of the
    tables say of whole runs, `parts` what decides these.
    """

    tuned: Sequence[Outcome]
    again: Sequence[Outcome]
    single: Sequence[Outcome]
    told: Sequence[str]
    made_up: dict[str, Sequence[Outcome]]
    replicates: int
    settings: int = 0
    twice: int = 0
    names: Sequence[Names] = ()
    short: Sequence[ShortRuns] = ()
    parts: Sequence[Parts] = ()

    @property
    def goals(self) -> list[Row]:
        """What the search has to show, and whether it does."""
        own = goals(self.tuned, self.single, settings=self.settings)
        return [*own, search_ties.goal(self.names)]


def block(found: Findings) -> str:
    """The block of the page, markers included."""
    parts = [BEGIN, goal_table(found.goals)]
    number = str(found.settings or "several")
    for title, outcomes_of, lacking in (
        (f"Checkpoints of pairs at {number} settings (`bench/tables/search.jsonl`)", found.tuned,
         "Nothing is whole yet: `FULL=1 make bench-search` (hours)."),
        (f"Other seeds of what was picked, {found.twice or 'several'} settings (the same table)",
         found.again, "No second seed is whole yet: `FULL=1 make bench-search` (hours)."),
        ("Pairs at one setting (`bench/tables/selection.jsonl`), judged by the other seed",
         found.single,
         "Nothing whole is recorded yet: `FULL=1 make bench-selection`."),
    ):  # fmt: skip
        parts.append(f"**{title}.**")
        datasets = len({outcome.data for outcome in outcomes_of})
        parts.append(f"{datasets} datasets.\n\n{_table(outcomes_of)}" if outcomes_of else lacking)
    parts += found.told
    if found.names:
        parts += ["**One configuration under two names.**", search_ties.names_table(found.names)]
    if found.parts:
        parts += ["**What decides, and when it shows: the same runs.**", parts_table(found.parts)]
    for short in found.short:
        if short.fitted:
            parts += [f"**What short runs say of whole ones: {short.table}.**", short.text]
    for law, outcomes_of in found.made_up.items():
        parts.append(f"**Made-up worlds, {found.replicates} of them: {law}.**")
        parts.append(_table(outcomes_of))
    return "\n\n".join([*parts, END])


def report(found: Findings, *, publish: bool) -> None:
    """Print the block and the summary, the last line; publish both where that is asked."""
    text, said = block(found), found.goals
    print(text)
    if publish:
        publish_block(PAGE, text)
        sources = {
            "settings": found.tuned, "other seeds": found.again, "one setting": found.single,
            **found.made_up,
        }  # fmt: skip
        summary = {
            "goals": said,
            "share_of_grid": SHARE,
            "settings": found.settings,
            "made_up_worlds_of_each_law": found.replicates,
            "two_names": [asdict(each) for each in found.names],
            "parts": [asdict(each) for each in found.parts],
            "short_runs": [asdict(each) for each in found.short],
            "sources": {
                name: [_as_row(line) for line in lines(of)] for name, of in sources.items()
            },
        }
        SUMMARY.write_text(
            json.dumps(summary, indent=1, ensure_ascii=False, default=BaseModel.model_dump) + "\n",
            encoding="utf-8",
        )
    print(json.dumps({"goals": said}, ensure_ascii=False))


def _as_row(line: Line) -> Row:
    return {
        "strategy": line.strategy,
        "regret_points": line.points.model_dump(),
        "regret_points_p90": line.p90,
        "log_loss_percent": line.percent.model_dump(),
        "cost_runs": line.cost,
        "share_of_grid": line.share,
    }
