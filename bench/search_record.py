"""Records the table that searches are replayed on: short runs of the shipped model.

Every arm at every setting below, with two seeds of data order and adapter on one split, in the
order seed, setting, dataset, pair, so that what is there counts whenever it is stopped. Kept are
the margins of every validation pair, at the end and on the way: log-losses, ties and comparisons of
two seeds all follow from them. Rungs are those that a search of such runs has. Several processes
may record into one file, each its own seeds or datasets.
"""

import fcntl
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench import selection_cases
from bench.report import ROOT
from bench.selection import SEEDS, TINY, Progress, Source
from bench.selection_cases import PAIRS, PLAIN, OpenCase, metrics_version, objectives, open_case
from bench.train import environment
from bench.train_report import Table
from core.lifecycle import EndedBy
from core.run_spec import CandidateSpec, LoraSpec
from core.spec import ObjectiveSpec
from objectives import build_objective
from selection.draws import RECOMMENDED, Setting, candidate_at
from selection.study import ladder
from worker.training.evaluate import Measured, trial_score
from worker.training.loop import train
from worker.training.model import Policy, load_policy

TABLE = ROOT / "bench" / "tables" / "search.jsonl"
DATASETS = ("truthfulqa", "comve-reasons", "ai-risk", "hh-harmless")
"""Of the public datasets at hand those with enough short pairs that a run teaches something."""
STEPS = 80
WARMUP = 1
"""A step, so that no rung lies within it."""
RUNGS = ladder(STEPS, warmup_steps=WARMUP)[:-1]
SETTINGS = (
    RECOMMENDED,
    Setting(learning_rate=2.0, beta=2.0, gamma=0.5, alpha=0.5),
    Setting(learning_rate=0.5, beta=0.5, gamma=2.0, alpha=2.0),
    Setting(learning_rate=2.0, beta=0.5, gamma=0.5, alpha=2.0),
)
"""Factors on the recommended values, the same for every pair."""
SPLIT_SEED = 0
HELD_OUT = {"validation": 0.49, "test": 0.02}
LONGEST = 80
LONGER = {"hh-harmless": 96}
"""Tokens of the longest pair, of datasets that have too few of the usual length."""
TRAIN_PAIRS = 300
VALIDATION_PAIRS = 160
BATCH = 4
BUDGET: dict[str, Any] = selection_cases.BUDGET | {
    "steps": STEPS, "batch_size": BATCH, "warmup_steps": WARMUP, "split_seed": SPLIT_SEED,
    "held_out": HELD_OUT, "longest": LONGEST, "train_pairs": TRAIN_PAIRS,
    "validation_pairs": VALIDATION_PAIRS,
}  # fmt: skip
"""What every run has."""


def budget_of(data: str) -> dict[str, Any]:
    """What runs on a dataset have."""
    return BUDGET | {"longest": LONGER.get(data, LONGEST)}


Row = dict[str, Any]


@dataclass(frozen=True)
class Todo:
    """Runs that are missing of one dataset, seed and setting."""

    source: Source
    seed: int
    setting: int
    runs: tuple[str, ...]
    profile: bool

    @property
    def at(self) -> Row:
        """What its rows are of."""
        return {
            "data": self.source.name, "sha256": self.source.sha256, "seed": self.seed,
            "budget": budget_of(self.source.name),
        }  # fmt: skip


def missing(table: Table, sources: Sequence[Source], seeds: Sequence[int]) -> list[Todo]:
    """All that the table lacks, one setting after another, so that a part of it is of use."""
    found = []
    for seed in seeds:
        for setting in range(len(SETTINGS)):
            for source in sources:
                empty = Todo(source, seed, setting, (), profile=False)
                runs = tuple(
                    name
                    for name in (PLAIN, *PAIRS)
                    if not table.has(kind="run", **empty.at, pair=name, setting=setting)
                )
                # One split, so one profile: that of the first seed.
                profile = (setting, seed) == (0, SEEDS[0]) and not table.has(
                    kind="case", **empty.at, metrics=metrics_version()
                )
                if runs or profile:
                    found.append(replace(empty, runs=runs, profile=profile))
    return found


def append(path: Path, row: Row) -> None:
    """Add one line to the file, whole, whoever else writes to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
        file.flush()


class _Rungs:
    """Hooks of a run that nobody stops; it is scored at its rungs."""

    def __init__(self, case: OpenCase) -> None:
        self._case = case
        self.found: dict[str, Row] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def stepped(self, step: int, total: int) -> None:
        if step in RUNGS:
            self.found[str(step)] = _figures(self._case.measured())

    def stopping(self) -> bool:
        return False

    def raise_if_stopped(self) -> None:
        raise AssertionError("never asked to stop")


def _figures(measured: Measured) -> Row:
    """Log-loss, accuracy, drift and margins to four digits; no losses where a number is missing."""
    if not measured.is_finite:
        return {"log_loss": None}
    score = trial_score(measured)
    return {
        "log_loss": score.log_loss, "accuracy": score.accuracy, "drift": score.drift,
        "margins": [float(f"{margin:.4g}") for margin in measured.margins],
    }  # fmt: skip


def trained(case: OpenCase, objective: ObjectiveSpec) -> Row:
    """One run from the reference's weights; one that meets NaN has no log-loss at the end."""
    started = time.perf_counter()
    rungs = _Rungs(case)
    outcome = train(
        case.policy,
        build_objective(objective, geometry=case.geometry, head=case.policy.head.weight),
        case.data, plan=case.plan, weights_learning_rate=0.0, hooks=rungs,
    )  # fmt: skip
    reached = outcome.ended_by is EndedBy.BUDGET
    end = _figures(case.measured()) if reached else {"log_loss": None}
    return {
        "ended_by": outcome.ended_by.value, **end, "rungs": rungs.found,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def measured(case: OpenCase, todo: Todo) -> Iterator[Row]:
    """Rows of what is missing, the profile first."""
    if todo.profile:
        profile = case.profile().model_dump(mode="json")
        yield {
            "kind": "case", **todo.at, "metrics": metrics_version(), **case.about,
            "profile": profile,
        }  # fmt: skip
    specs = objectives()
    for name in todo.runs:
        centre = CandidateSpec(objective=specs[name], learning_rate=case.plan.learning_rate)
        candidate = candidate_at(centre, SETTINGS[todo.setting])
        plan = replace(case.plan, learning_rate=candidate.learning_rate, seed=todo.seed)
        found = trained(replace(case, plan=plan), candidate.objective)
        yield {
            "kind": "run", **todo.at, "pair": name, "setting": todo.setting,
            "factors": SETTINGS[todo.setting].point[:4], **found,
        }  # fmt: skip


def opened(policy: Policy, source: Source, scratch: Path) -> OpenCase:
    """The pairs of a dataset that runs are made of, and its reference."""
    longest = LONGER.get(source.name, LONGEST)
    case = open_case(
        policy, source.path, seed=SPLIT_SEED, scratch=scratch, steps=STEPS, held_out=HELD_OUT,
        longest=longest, train_pairs=TRAIN_PAIRS, validation_pairs=VALIDATION_PAIRS,
    )  # fmt: skip
    if len(case.validation) < VALIDATION_PAIRS:
        raise SystemExit(
            f"{source.path} leaves {len(case.validation)} pairs of at most {longest} tokens for "
            f"validation; a table wants {VALIDATION_PAIRS}: leave it out with --datasets"
        )
    plan = replace(case.plan, batch_size=BATCH, warmup_steps=WARMUP)
    return replace(case, plan=plan)


def fill(path: Path, sources: Sequence[Source], *, seeds: Sequence[int], limit: int | None) -> None:
    """Measure what the table lacks, or so many runs of it; it says first how long that takes."""
    table = Table(path)
    todos = missing(table, sources, seeds)
    if not todos:
        print("nothing is missing", flush=True)
        return
    left: Counter[str] = Counter()
    for todo in todos:
        left[todo.source.name] += len(todo.runs)
    kept = [row["seconds"] for row in table.rows if row.get("kind") == "run"]
    number = min(left.total(), limit or left.total())
    says = f"about {number * fmean(kept) / 60:.0f} minutes" if kept else "as the first will show"
    print(f"{left.total()} runs are missing; {number} of them will take {says}", flush=True)
    progress = Progress(left)
    append(path, {"environment": environment() | {"threads": 1}})
    # Processes stand beside each other, and a run is the same however many there are.
    torch.set_num_threads(1)
    policy = load_policy(TINY, lora=LoraSpec(), device=torch.device("cpu"))
    cases: dict[str, OpenCase] = {}
    runs = 0
    with ExitStack() as stack:
        for todo in todos:
            if todo.source.name not in cases:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                cases[todo.source.name] = opened(policy, todo.source, scratch)
            for row in measured(cases[todo.source.name], todo):
                append(path, row)
                progress.tell({"losses": row.get("log_loss"), **row})
                runs += row["kind"] == "run"
                if limit is not None and runs >= limit:
                    return
