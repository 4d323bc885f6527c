"""The tables that searches are replayed on, and the runs that the second one still lacks.

`bench/tables/selection.jsonl` (bench.selection) has every pair at one setting. The second table,
`bench/tables/search.jsonl`, has every pair at the settings below, over finer rungs: what a search
that tunes needs. Both are runs of the shipped model that take seconds.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from bench import selection_cases
from bench.report import ROOT
from bench.search_world import Shown, World, Worth, arms_of
from bench.selection import SEEDS, Source, fill_all
from bench.selection_cases import PAIRS, PLAIN, OpenCase, metrics_version, objectives
from bench.train_report import Table
from core.profile import DatasetProfile
from core.run_spec import CandidateSpec
from selection.draws import RECOMMENDED, Setting, candidate_at
from selection.recommender import recommend

TABLE = ROOT / "bench" / "tables" / "search.jsonl"
STEPS = 60
RUNGS = (2, 6, 18)
SETTINGS = (
    RECOMMENDED,
    Setting(learning_rate=2.0, beta=2.0, gamma=0.5, alpha=0.5),
    Setting(learning_rate=0.5, beta=0.5, gamma=2.0, alpha=2.0),
    Setting(learning_rate=2.0, beta=0.5, gamma=0.5, alpha=2.0),
    Setting(learning_rate=0.5, beta=2.0, gamma=2.0, alpha=0.5),
    Setting(learning_rate=2.0),
)
"""Factors on the recommended values, the same for every pair."""
BUDGET: dict[str, Any] = selection_cases.BUDGET | {"steps": STEPS, "warmup_steps": 1}
"""What every run has; the warm-up is one step, so that no rung lies within it."""
LEAST_SETTINGS = 2

Row = dict[str, Any]
Key = tuple[str, str]


# ------------------------------------------------------------------ recording


@dataclass(frozen=True)
class Todo:
    """Runs that are missing of one dataset, seed and setting."""

    source: Source
    seed: int
    setting: int
    runs: tuple[str, ...]
    profile: bool


def missing(table: Table, sources: Sequence[Source]) -> list[Todo]:
    """All that the table lacks: one setting after another, so that a part of it is of use."""
    found = []
    for setting in range(len(SETTINGS)):
        for seed in SEEDS:
            for source in sources:
                at = {"data": source.name, "sha256": source.sha256, "seed": seed, "budget": BUDGET}
                runs = tuple(
                    name
                    for name in (PLAIN, *PAIRS)
                    if not table.has(kind="run", **at, pair=name, setting=setting)
                )
                profile = setting == 0 and not table.has(
                    kind="case", **at, metrics=metrics_version()
                )
                if runs or profile:
                    found.append(Todo(source, seed, setting, runs, profile))
    return found


def measured(case: OpenCase, todo: Todo) -> Iterator[Row]:
    """Rows of what is missing, the profile first."""
    source = todo.source
    at = {"data": source.name, "sha256": source.sha256, "seed": todo.seed, "budget": BUDGET}
    if todo.profile:
        profile = case.profile().model_dump(mode="json")
        yield {"kind": "case", **at, "metrics": metrics_version(), **case.about, "profile": profile}
    specs = objectives()
    short = replace(case.plan, warmup_steps=BUDGET["warmup_steps"])
    for name in todo.runs:
        centre = CandidateSpec(objective=specs[name], learning_rate=short.learning_rate)
        candidate = candidate_at(centre, SETTINGS[todo.setting])
        tuned = replace(case, plan=replace(short, learning_rate=candidate.learning_rate))
        found = tuned.run(candidate.objective, at=RUNGS)
        yield {
            "kind": "run", **at, "pair": name, "setting": todo.setting,
            "factors": SETTINGS[todo.setting].point[:4], **found,
        }  # fmt: skip


def expected_seconds(kept: Table) -> float | None:
    """What a run is likely to take, by this table, else by the shorter runs of the other one."""
    own = [row["seconds"] for row in kept.rows if row.get("kind") == "run"]
    if own:
        return fmean(own)
    other = Table(ROOT / "bench" / "tables" / "selection.jsonl")
    short = [row["seconds"] for row in other.rows if row.get("kind") == "run"]
    return fmean(short) * STEPS / selection_cases.BUDGET["steps"] if short else None


def fill(table: Table, sources: Sequence[Source], *, limit: int | None) -> None:
    """Measure what the table lacks, or so many runs of it; it says first how long that takes."""
    todos = missing(table, sources)
    if not todos:
        print("nothing is missing", flush=True)
        return
    total = sum(len(todo.runs) for todo in todos)
    each, number = expected_seconds(table), min(total, limit or total)
    says = "as long as the first will show" if each is None else f"{number * each / 60:.0f} minutes"
    print(f"{total} runs are missing; {number} of them will take about {says}", flush=True)
    fill_all(table, todos, measured, steps=STEPS, limit=limit)


# -------------------------------------------------------------------- reading


class _Recorded:
    """The runs of one dataset: what each shows at a rung, and what it is worth at other seeds."""

    def __init__(self, rows: Sequence[Row], steps: Sequence[int], *, sees: int) -> None:
        self._steps = steps
        self._sees = sees
        self._rows = {(row["pair"], row.get("setting", 0), row["seed"]): row for row in rows}
        self._hidden = sorted({row["seed"] for row in rows} - {sees})

    def show(self, arm: str, setting: Setting, rung: int, repeat: int) -> Shown:
        assert repeat == 0, "a recorded table has one seed to see"
        row = self._rows[arm, SETTINGS.index(setting), self._sees]
        last = rung == len(self._steps) - 1
        found = row if last else row["rungs"].get(str(self._steps[rung]), {})
        if (last and row["losses"] is None) or "log_loss" not in found:
            return Shown(math.inf)
        return Shown(found["log_loss"], found["drift"])

    def worth(self, arm: str, setting: Setting) -> Worth:
        """A run that broke down is worth what no training is: ln 2 and one half."""
        rows = [self._rows[arm, SETTINGS.index(setting), seed] for seed in self._hidden]
        return Worth(
            fmean(math.log(2.0) if row["losses"] is None else row["log_loss"] for row in rows),
            fmean(0.5 if row["losses"] is None else row["accuracy"] for row in rows),
        )


def worlds(
    rows: Sequence[Row], *, budget: Row, rungs: Sequence[int]
) -> tuple[list[World], list[str]]:
    """Every dataset and seed that can be searched, and sentences about those that cannot.

    The search sees one seed and is judged by the others. Settings count up to the first that is
    not whole.
    """
    runs: dict[Key, list[Row]] = defaultdict(list)
    profiles: dict[tuple[Key, int], Row] = {}
    for row in rows:
        if row.get("budget") != budget:
            continue
        key = (row["data"], row["sha256"])
        if row["kind"] == "run":
            runs[key].append(row)
        elif row["kind"] == "case":
            profiles[key, row["seed"]] = row
    found: list[World] = []
    told: list[str] = []
    for key in sorted(runs):
        settings = _whole_settings(runs[key])
        seeds = sorted({row["seed"] for row in runs[key]})
        if not settings or len(seeds) < 2:
            told.append(f"{key[0]}: not all pairs are measured at two seeds.")
            continue
        for seed in seeds:
            if (scores := _scores(profiles.get((key, seed)))) is None:
                told.append(
                    f"{key[0]}, seed {seed}: the metrics are missing, or too old to be read."
                )
                continue
            found.append(
                _world(key[0], runs[key], scores, seed, settings, (*rungs, budget["steps"]))
            )
    return found, told


def _whole_settings(rows: Sequence[Row]) -> int:
    """How many settings, from the first on, have every pair at every seed."""
    there = {(row["pair"], row.get("setting", 0), row["seed"]) for row in rows}
    seeds = {row["seed"] for row in rows}
    for setting in range(len(SETTINGS)):
        wanted = {(name, setting, seed) for name in (PLAIN, *PAIRS) for seed in seeds}
        if not wanted <= there:
            return setting
    return len(SETTINGS)


def _scores(about: Row | None) -> dict[str, float] | None:
    if about is None:
        return None
    try:
        profile = DatasetProfile.model_validate(about["profile"])
    except ValidationError:
        return None
    ranking = recommend(profile).ranking
    return {selection_cases.pair_name(p.kernel, p.divergence): p.score.value for p in ranking}


def _world(
    data: str,
    rows: Sequence[Row],
    scores: dict[str, float],
    seed: int,
    settings: int,
    steps: Sequence[int],
) -> World:
    recorded = _Recorded(rows, steps, sees=seed)
    # A step costs the same for every pair: seconds of runs on a busy machine say little of them.
    return World(
        name=f"{data}, seed {seed}", data=data, arms=arms_of(scores), rungs=tuple(steps),
        grid=SETTINGS[:settings], pool=SETTINGS[:settings], repeats=0, show=recorded.show,
        worth=recorded.worth,
    )  # fmt: skip
