"""From warm and cold starts to a block in docs/selection.md, goals and one JSON line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from bench.history_worlds import GAIN_SD, TRIALS, Past
from bench.report import ROOT, publish_block
from bench.search_report import SHARE
from core.profile import Estimate
from worker.training.evaluate import bootstrap_mean

SUMMARY = ROOT / "bench" / "results" / "history.json"
PAGE = ROOT / "docs" / "selection.md"
BEGIN, END = "<!-- history: begin -->", "<!-- history: end -->"
COUNTS = (5, 10, 20)
SEARCHED = (5, 20)
CHEAPER = 0.7
"""Of the budget: a warm search with thirty percent less."""
MARGIN = 0.1
"""Accuracy points (percent of log-loss for a first pair) by which a warm start may be worse."""
MIN_DATASETS = 4
FIRST, WHOLE = "first pair, made up", "whole search, made up"
RECORDED_FIRST, RECORDED_WHOLE = "first pair, recorded", "whole search, recorded"
CHEAP, TAU = f"warm with {CHEAPER:.0%} of the budget − cold", "Kendall τ cold → warm"
TABLES = ("no table of runs is known", "the table that the other datasets give")

Row = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """One new dataset, without finished searches (cold) and with them (warm).

    What is lost: of a first pair percent of log-loss against the best pair, of a whole search
    accuracy points against the grid's pick. `cheap`: of a warm search with CHEAPER of the budget.
    """

    kind: str
    searches: int
    data: str
    used: bool
    cold: float
    warm: float
    cold_tau: float | None = None
    warm_tau: float | None = None
    cheap: float | None = None

    @property
    def harm(self) -> float:
        """What is lost more because of the finished searches."""
        return self.warm - self.cold

    @property
    def saved(self) -> float:
        """What is lost more by a warm search with CHEAPER of the budget."""
        if self.cheap is None:
            raise ValueError(f"{self.kind}, {self.data}: a first pair has no budget")
        return self.cheap - self.cold


@dataclass(frozen=True)
class Findings:
    """Made-up services and the recorded table: first pairs and whole searches of both."""

    first: Sequence[Start]
    whole: Sequence[Start]
    recorded_first: Sequence[Start]
    recorded_whole: Sequence[Start]


@dataclass(frozen=True)
class Line:
    """Starts of one kind and number of searches; intervals are over datasets."""

    kind: str
    searches: int
    used: float
    cold: float
    warm: float
    harm: Estimate
    cold_tau: float | None
    warm_tau: float | None
    saved: Estimate | None
    datasets: int


def lines(starts: Sequence[Start]) -> list[Line]:
    """A line for each kind and number of searches, in the order in which they come."""
    keys = dict.fromkeys((start.kind, start.searches) for start in starts)
    return [_line([s for s in starts if (s.kind, s.searches) == key]) for key in keys]


def _line(of: Sequence[Start]) -> Line:
    cold_tau = [s.cold_tau for s in of if s.cold_tau is not None]
    warm_tau = [s.warm_tau for s in of if s.warm_tau is not None]
    return Line(
        kind=of[0].kind,
        searches=of[0].searches,
        used=fmean(s.used for s in of),
        cold=fmean(s.cold for s in of),
        warm=fmean(s.warm for s in of),
        harm=over_data(of, [s.harm for s in of]),
        cold_tau=fmean(cold_tau) if cold_tau else None,
        warm_tau=fmean(warm_tau) if warm_tau else None,
        saved=None if of[0].cheap is None else over_data(of, [s.saved for s in of]),
        datasets=len({s.data for s in of}),
    )


def over_data(of: Sequence[Start], values: Sequence[float]) -> Estimate:
    """Mean with its interval; all cases of a dataset come along."""
    names = sorted({s.data for s in of})
    group = np.array([names.index(s.data) for s in of], dtype=np.int64)
    return bootstrap_mean(np.array(values, dtype=np.float64), group, seed=0, resamples=1000)


# --------------------------------------------------------------------- goals


def goals(found: Findings) -> list[Row]:
    """That finished searches help where they carry over, and do no harm where they do not.

    A recorded goal is not met with fewer than four datasets.
    """
    first, whole = lines(found.first), lines(found.whole)
    most = max((line.searches for line in whole), default=0)
    same = [x for x in whole if x.kind == Past.SAME and x.searches == most]
    other = (Past.NOISE, Past.OWN)
    share = f"{CHEAPER:.0%}"
    return [
        _goal(
            "first pair, searches that carry over: warm - cold, %, worst number of searches",
            0.0, [x.harm for x in first if x.kind == Past.SAME],
        ),
        _goal(
            "first pair, searches that do not carry over: warm - cold, %, worst case",
            MARGIN, [x.harm for x in first if x.kind in other],
        ),
        _goal(
            f"whole search, {most} that carry over: warm with {share} of the budget - cold, points",
            MARGIN, [x.saved for x in same if x.saved is not None],
        ),
        _goal(
            "whole search, searches that do not carry over: warm - cold, points, worst case",
            MARGIN, [x.harm for x in whole if x.kind in other],
        ),
        _goal(
            "whole search, searches that agree and mislead: warm - cold, points, worst case",
            MARGIN, [x.harm for x in whole if x.kind == Past.REVERSE],
        ),
        _goal(
            f"whole search on the recorded datasets (at least {MIN_DATASETS}): warm - cold, points",
            MARGIN, [x.harm for x in lines(found.recorded_whole) if x.datasets >= MIN_DATASETS],
        ),
    ]  # fmt: skip


def _goal(name: str, margin: float, of: Sequence[Estimate]) -> Row:
    """Met when the upper end of every interval is at most the margin; the worst is shown."""
    target = f"upper end <= {margin:g}"
    if not of:
        return {"name": name, "target": target, "measured": None, "interval": None, "met": False}
    worst = max(of, key=lambda estimate: estimate.high)
    return {
        "name": name,
        "target": target,
        "measured": round(worst.value, 3),
        "interval": [round(worst.low, 3), round(worst.high, 3)],
        "met": worst.high <= margin,
    }


# ------------------------------------------------------------------- summary


def summary(found: Findings) -> Row:
    """Goals and all lines, as they are kept; the block is made of them."""
    return {
        "goals": goals(found),
        "sources": {
            FIRST: _source(found.first),
            WHOLE: _source(found.whole),
            RECORDED_FIRST: _source(found.recorded_first),
            RECORDED_WHOLE: _source(found.recorded_whole),
        },
    }


def _source(starts: Sequence[Start]) -> Row:
    kept = [_as_row(line) for line in lines(starts)]
    return {"datasets": len({start.data for start in starts}), "lines": kept}


def _as_row(line: Line) -> Row:
    return {
        "searches": line.kind,
        "number": line.searches,
        "used": line.used,
        "lost_cold": line.cold,
        "lost_warm": line.warm,
        "warm_minus_cold": line.harm.model_dump(),
        "tau_cold": line.cold_tau,
        "tau_warm": line.warm_tau,
        "cheap_minus_cold": None if line.saved is None else line.saved.model_dump(),
    }


def block(kept: Row) -> str:
    """The block of the page of a summary, markers included."""
    sources = kept["sources"]
    services, searches, data = (
        sources[name]["datasets"] for name in (FIRST, WHOLE, RECORDED_FIRST)
    )
    return "\n\n".join(
        [
            BEGIN,
            _goal_table(kept["goals"]),
            f"**Made-up services, {services} of each kind: the pair that comes first.** Finished "
            f"searches have {TRIALS} trials, noise of a gain {GAIN_SD:g} %, and merits drawn with "
            "the deviations of no table. Lost: percent of log-loss against the best pair.",
            _table(sources[FIRST]["lines"], last=TAU),
            f"**Made-up services, {searches} of each kind: a whole search** with {SHARE:.0%} of "
            "the tuned grid's price. Lost: accuracy points against the pick of that grid.",
            _table(sources[WHOLE]["lines"], last=CHEAP),
            f"**Recorded: the {data} datasets of `bench/tables/selection.jsonl`**, each case new "
            "to the searches of the other datasets: the pair that comes first, percent of "
            "log-loss.",
            _table(sources[RECORDED_FIRST]["lines"], last=TAU),
            "**Recorded: a whole search**, accuracy points; it sees one seed and is judged by the "
            "other.",
            _table(sources[RECORDED_WHOLE]["lines"], last=CHEAP),
            END,
        ]
    )


def _goal_table(found: Sequence[Row]) -> str:
    text = ["| goal | target | measured | met |", "|---|---|---|---|"]
    for goal in found:
        low_high = goal["interval"]
        said = "not yet" if low_high is None else f"{goal['measured']} {low_high}"
        met = "yes" if goal["met"] else "**no**"
        text.append(f"| {goal['name']} | {goal['target']} | {said} | {met} |")
    return "\n".join(text)


def _table(kept: Sequence[Row], *, last: str) -> str:
    text = [
        f"| the searches | number | used | lost cold | warm | warm − cold | {last} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in kept:
        if last == CHEAP:
            end = "–" if row["cheap_minus_cold"] is None else _said(row["cheap_minus_cold"])
        else:
            end = f"{row['tau_cold']:.2f} → {row['tau_warm']:.2f}"
        text.append(
            f"| {row['searches']} | {row['number']} | {row['used']:.0%} | {row['lost_cold']:.2f} "
            f"| {row['lost_warm']:.2f} | {_said(row['warm_minus_cold'])} | {end} |"
        )
    return "\n".join(text)


def _said(estimate: Row) -> str:
    return f"{estimate['value']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"


def report(found: Findings, *, publish: bool) -> None:
    """Print the block and the summary, the last line; publish both where that is asked."""
    kept = summary(found)
    text = block(kept)
    print(text)
    if publish:
        publish_block(PAGE, text)
        SUMMARY.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({"goals": kept["goals"]}, ensure_ascii=False))
