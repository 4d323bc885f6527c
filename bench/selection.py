"""Is the recommendation right? Trains every kernel–divergence pair and compares the rankings.

`make bench-selection` reports the kept table; `FULL=1` first measures what it lacks: short runs of
28 pairs and plain DPO for every dataset and seed, one JSON line each, and recommendations on labels
drawn by lot. It can be stopped and goes on.
"""

import hashlib
import pprint
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch

from bench import selection_report
from bench.options import parse, table_parser
from bench.report import ROOT
from bench.selection_cases import (
    BUDGET,
    OpenCase,
    metrics_version,
    objectives,
    open_case,
    recommender_version,
)
from bench.selection_prior import fit_prior, rounded
from bench.selection_read import evidence
from bench.selection_report import TABLE
from bench.train import environment
from bench.train_report import Table
from core.run_spec import LoraSpec
from worker.training.model import load_policy

TINY = ROOT / "examples" / "models" / "tiny-lm"
SAMPLES = ROOT / "examples" / "data"
NEIGHBOUR = ROOT.parent / "shared" / "data"
"""More datasets than the shipped samples, where someone has put them there."""
DATASETS = ("truthfulqa", "comve-reasons", "ai-risk", "pandalm-human")
"""Of the public datasets at hand those with the shortest texts: a run takes seconds."""
SEEDS = (0, 1)
SHUFFLES = 200


@dataclass(frozen=True)
class Source:
    """A file of preference data; its bytes are part of what rows are of."""

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Todo:
    """What the table lacks of one dataset and seed."""

    source: Source
    seed: int
    runs: tuple[str, ...]
    profile: bool
    shuffles: bool

    @property
    def anything(self) -> bool:
        """Whether something is missing."""
        return bool(self.runs) or self.profile or self.shuffles


def find(folder: Path | None, names: Sequence[str] | None) -> list[Source]:
    """The files to measure: the named ones of a folder, or the usual ones that it has.

    Raises:
        SystemExit: a file is not there.
    """
    folder = folder or (NEIGHBOUR if NEIGHBOUR.is_dir() else SAMPLES)
    found = {
        path.name.split(".")[0]: path for path in sorted(folder.glob("*.jsonl*")) if path.is_file()
    }
    wanted = list(names or [name for name in DATASETS if name in found] or found)
    missing = [name for name in wanted if name not in found]
    if missing or not wanted:
        raise SystemExit(
            f"{folder} has {sorted(found)}, asked for {wanted}: name others with --datasets, or "
            "another folder of .jsonl or .jsonl.gz files with --data"
        )
    return [
        Source(name, found[name], hashlib.sha256(found[name].read_bytes()).hexdigest())
        for name in wanted
    ]


def missing(table: Table, source: Source, *, seed: int) -> Todo:
    """What the table lacks of a dataset and seed; labels are drawn by lot at the first seed."""
    at = {"data": source.name, "sha256": source.sha256, "seed": seed}
    return Todo(
        source=source,
        seed=seed,
        runs=tuple(
            name
            for name in objectives()
            if not table.has(kind="run", **at, budget=BUDGET, pair=name)
        ),
        profile=not table.has(kind="case", **at, budget=BUDGET, metrics=metrics_version()),
        shuffles=seed == SEEDS[0]
        and not table.has(
            kind="shuffles", **at, recommender=recommender_version(), shuffles=SHUFFLES
        ),
    )


def measured(case: OpenCase, todo: Todo) -> Iterator[dict[str, Any]]:
    """Rows of what is missing: the profile first, runs one by one, labels by lot last."""
    at = {"data": todo.source.name, "sha256": todo.source.sha256, "seed": todo.seed}
    if todo.profile:
        started = time.perf_counter()
        profile = case.profile().model_dump(mode="json")
        yield {
            "kind": "case", **at, "budget": BUDGET, "metrics": metrics_version(), **case.about,
            "profile_s": time.perf_counter() - started, "profile": profile,
        }  # fmt: skip
    specs = objectives()
    for name in todo.runs:
        yield {"kind": "run", **at, "budget": BUDGET, "pair": name, **case.run(specs[name])}
    if todo.shuffles:
        started = time.perf_counter()
        found = case.shuffles(SHUFFLES)
        yield {
            "kind": "shuffles", **at, "recommender": recommender_version(), "shuffles": SHUFFLES,
            **found, "seconds": time.perf_counter() - started,
        }  # fmt: skip


class Progress:
    """Says what is done and how long the rest will take.

    A run of a dataset is taken to last as long as the others of it, or as any if there is none yet.
    """

    def __init__(self, left: Mapping[str, int]) -> None:
        self._left = Counter(left)
        self._runs = self._left.total()
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def minutes_left(self) -> float:
        """What the missing runs will take."""
        known = {name: fmean(seconds) for name, seconds in self._seconds.items()}
        mean = fmean(known.values()) if known else 0.0
        return sum(n * known.get(name, mean) for name, n in self._left.items()) / 60

    def tell(self, row: Mapping[str, Any]) -> None:
        """Print a line about a row."""
        place = f"{row['data']} seed {row['seed']}"
        if row["kind"] != "run":
            print(f"{place}: {row['kind']}", flush=True)
            return
        self._left[row["data"]] -= 1
        self._seconds[row["data"]].append(row["seconds"])
        loss = "none" if row["losses"] is None else f"{row['log_loss']:.4f}"
        print(
            f"{place} {row['pair']}: log-loss {loss}, {row['seconds']:.1f} s; run "
            f"{self._runs - self._left.total()}/{self._runs}, {self.minutes_left():.0f} min left",
            flush=True,
        )


class Missing(Protocol):
    """Runs that a table lacks of one dataset and seed."""

    @property
    def source(self) -> Source: ...
    @property
    def seed(self) -> int: ...
    @property
    def runs(self) -> tuple[str, ...]: ...


Lacking = TypeVar("Lacking", bound=Missing)


def fill_all(
    table: Table,
    todos: Sequence[Lacking],
    measure: Callable[[OpenCase, Lacking], Iterator[dict[str, Any]]],
    *,
    steps: int,
    limit: int | None,
) -> None:
    """Keep the rows that `measure` gives of each case; with a limit, of so many runs."""
    left: Counter[str] = Counter()
    for todo in todos:
        left[todo.source.name] += len(todo.runs)
    progress = Progress(left)
    table.append({"environment": environment()})
    policy = load_policy(TINY, lora=LoraSpec(), device=torch.device("cpu"))
    runs = 0
    for todo in todos:
        with tempfile.TemporaryDirectory() as scratch:
            case = open_case(
                policy, todo.source.path, seed=todo.seed, scratch=Path(scratch), steps=steps
            )
            for row in measure(case, todo):
                table.append(row)
                progress.tell(row)
                runs += row["kind"] == "run"
                if limit is not None and runs >= limit:
                    return


def fill(table: Table, sources: Sequence[Source], *, limit: int | None) -> None:
    """Measure what the table lacks, every dataset of a seed before the next seed."""
    found = [missing(table, source, seed=seed) for seed in SEEDS for source in sources]
    todos = [todo for todo in found if todo.anything]
    if todos:
        fill_all(table, todos, measured, steps=BUDGET["steps"], limit=limit)
    else:
        print("nothing is missing", flush=True)


def main() -> None:
    parser = table_parser(__doc__, table=TABLE)
    parser.add_argument(
        "--prior", action="store_true", help="print the prior table that the kept runs give"
    )
    options = parse(parser)
    if options.prior and options.full:
        parser.error("--prior prints what is kept, --full measures: one at a time")
    table = Table(options.table)
    if options.prior:
        pprint.pprint(rounded(fit_prior(list(evidence(table.rows).values()))), sort_dicts=False)
        return
    if options.full:
        fill(table, find(options.data, options.datasets), limit=options.limit)
    selection_report.report(table, publish=options.table == TABLE)


if __name__ == "__main__":
    main()
