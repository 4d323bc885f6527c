"""From rows of `bench.kernel_term` to a block in docs/selection.md, goals and one JSON line."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.kernel_cases import BUDGET, FUNCTIONS, NOISE, PLAIN, SCALES, VARIANTS, versions
from bench.kernel_effects import AT_END, BESIDE, CONTROLS, TRAINED, Effect, effects, losses
from bench.kernel_encoder import ENCODER
from bench.kernel_stats import Case, Point, over_prompts, scored
from bench.report import ROOT, publish_block
from bench.train_report import Table
from core.lifecycle import EndedBy
from core.profile import Estimate

TABLE = ROOT / "bench" / "tables" / "kernel-term.jsonl"
SUMMARY = ROOT / "bench" / "results" / "kernel-term.json"
PAGE = ROOT / "docs" / "selection.md"
BEGIN, END = "<!-- kernel-term: begin -->", "<!-- kernel-term: end -->"
MIN_DATASETS, MIN_SEEDS = 4, 2
"""A goal is met on no less."""

Row = dict[str, Any]


def read(rows: Sequence[Row]) -> tuple[list[Case], list[Row], list[str]]:
    """Cases of the present budget that have a run of γ = 0, what was stored of them, and notes.

    The notes say what is missing and what broke down; each comparison is over the cases that have
    both of its runs.
    """
    known: dict[tuple[str, str, int], Row] = {}
    runs: dict[tuple[str, str, int], dict[str, Row]] = defaultdict(dict)
    now = versions()
    for row in rows:
        if row.get("budget") != BUDGET:
            continue
        key = (row["data"], row["sha256"], row["seed"])
        if row["kind"] == "case":
            known[key] = row
        elif row["version"] == now.get(row["variant"]):
            runs[key][row["variant"]] = row
    cases, stored, told = [], [], []
    for key in sorted(known.keys() | runs.keys()):
        name = f"{key[0]}, seed {key[2]}"
        broken = [v for v, run in runs[key].items() if run["ended_by"] != EndedBy.BUDGET]
        whole = {v: run for v, run in runs[key].items() if v not in broken}
        far = sum(len(run["points"]) == len(SCALES) for run in whole.values())
        if broken:
            told.append(f"{name}: {', '.join(broken)} broke down.")
        if key not in known or PLAIN not in whole:
            told.append(f"{name} is left out: there is no whole run of {PLAIN}.")
            continue
        if far + len(broken) < len(VARIANTS):
            told.append(
                f"{name}: of {len(VARIANTS)} variants {len(whole)} are trained, {far} of them "
                "scored at all scales."
            )
        cases.append(_case(known[key], whole))
        stored.append(known[key])
    return cases, stored, told


def _case(about: Row, runs: dict[str, Row]) -> Case:
    return Case(
        data=about["data"],
        seed=about["seed"],
        prompt=np.array(about["prompt"], dtype=np.int64),
        log_odds={name: np.array(f["log_odds"]) for name, f in about["functions"].items()},
        runs={
            name: [
                Point(point["scale"], point["drift"], np.array(point["margins"]))
                for point in run["points"]
            ]
            for name, run in runs.items()
        },
    )


def goals(trained: Mapping[str, Effect]) -> list[Row]:
    """The question of this benchmark; met only where enough datasets and seeds are measured."""
    candidates = {
        name: of for name, of in trained.items() if name not in CONTROLS and len(of.sources) > 1
    }
    most = max((len(of.sources) for of in candidates.values() if of.seeds >= MIN_SEEDS), default=0)
    best = min(candidates.items(), key=lambda item: item[1].datasets.high, default=None)
    row: Row = {
        "name": "log-loss of the best kernel variant − γ = 0 at equal drift, over datasets",
        "target": "interval < 0", "measured": None, "interval": None, "met": False,
    }  # fmt: skip
    if best is not None:
        name, of = best
        row |= {
            "variant": name,
            "measured": float(f"{of.datasets.value:.3g}"),
            "interval": [float(f"{x:.3g}") for x in (of.datasets.low, of.datasets.high)],
            "met": of.beats and len(of.sources) >= MIN_DATASETS and of.seeds >= MIN_SEEDS,
        }
    return [
        {
            "name": f"datasets at equal drift with {MIN_SEEDS} seeds",
            "target": f">= {MIN_DATASETS}", "measured": most, "interval": None,
            "met": most >= MIN_DATASETS,
        },
        row,
    ]  # fmt: skip


def _said(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def _effect_table(title: str, found: Mapping[str, Effect]) -> str:
    lines = [
        f"| {title} | log-loss − γ = 0's: over prompts | over datasets | accuracy − γ = 0's "
        "| drift / γ = 0's | cases better | datasets |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of in found.items():
        lines.append(
            f"| {name} | {_said(of.prompts)} | {_said(of.datasets)} | {_said(of.accuracy, 3)} "
            f"| {of.drift:.2f} | {of.better} of {of.cases} | {len(of.sources)} |"
        )
    return "\n".join(lines)


def _dataset_table(cases: Sequence[Case]) -> str:
    """Differences of each dataset alone after the same steps, with intervals over its prompts."""
    names = sorted({case.data for case in cases})
    lines = ["| " + " | ".join(["after the same steps", *names]) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for variant, comparison in AT_END.items():
        cells = []
        for name in names:
            having, found = comparison.of([case for case in cases if case.data == name])
            cells.append(_said(over_prompts(having, found, losses), 3) if having else "–")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _case_table(cases: Sequence[Case], stored: Sequence[Row]) -> str:
    lines = [
        "| data | seed | pairs | validation pairs | f: held-out accuracy, log-loss "
        "| lexical f | sentence f | γ = 0: accuracy | log-loss | drift "
        "| drift of the variants / γ = 0's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, about in zip(cases, stored, strict=True):
        plain = case.runs[PLAIN][-1]
        found = scored(case, plain.margins)
        ratios = [run[-1].drift / plain.drift for name, run in case.runs.items() if name != PLAIN]
        held_out = " | ".join(_held_out(about["functions"].get(name)) for name in FUNCTIONS)
        lines.append(
            f"| {case.data} | {case.seed} | {about['train_pairs']:,} | {case.prompt.size} "
            f"| {held_out} | {found.right.mean():.3f} "
            f"| {found.losses.mean():.4f} | {plain.drift:.4f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return "\n".join(lines)


def _held_out(function: Row | None) -> str:
    if function is None:
        return "–"
    return f"{function['held_out_accuracy']:.3f}, {function['held_out_log_loss']:.3f}"


def verdict(title: str, trained: Mapping[str, Effect]) -> str:
    """What the intervals over datasets say, in words; nothing is said of a single dataset."""
    single = [name for name, of in trained.items() if len(of.sources) < 2]
    trained = {name: of for name, of in trained.items() if name not in single}
    better = [name for name, of in trained.items() if of.beats]
    worse = [name for name, of in trained.items() if of.datasets.low > 0.0]
    level = [name for name in trained if name not in better and name not in worse]
    parts = [
        f"better than γ = 0: {', '.join(better) or 'none'}",
        f"worse: {', '.join(worse) or 'none'}",
        f"no difference that the interval leaves standing: {', '.join(level) or 'none'}",
    ]
    if single:
        parts.append(f"on a single dataset, so not judged: {', '.join(single)}")
    return f"**{title}** ({len(trained)} comparisons of 95 % each): {'; '.join(parts)}."


def _setting(where: Row) -> str:
    return (
        f"Runs: {BUDGET['model']}, {BUDGET['steps']} steps of {BUDGET['batch_size']} pairs, "
        f"learning rate {BUDGET['learning_rate']}, β {BUDGET['beta']}, the product's training "
        f"loop: an epoch of at most {BUDGET['train_pairs']} pairs, to which f is fitted too; up to "
        f"{BUDGET['validation_pairs']} validation pairs. All variants of a case have its split, "
        "adapter and order. Equal drift: of two runs the one that went further has its adapter "
        f"scaled down to the other's (scored at {SCALES[0]} and {SCALES[1]}, between them margins "
        "are linear in √drift). Log-loss is calibrated, strengths fitted on the other half of the "
        "prompts. Intervals over prompts are for these datasets; those over datasets "
        "are widened for how few there are. Labels of a posterior are taken to flip with "
        f"{NOISE:g}. Sentence: {ENCODER}, frozen. "
        f"Measured on {where['cpu']}, {where['threads']} threads of {where['cores']} cores, torch "
        f"{where['torch']}, transformers {where['transformers']}, peft {where['peft']}, Python "
        f"{where['python']}, float32."
    )


def _plain(value: object) -> object:
    if isinstance(value, Estimate):
        return value.model_dump()
    raise TypeError(f"{type(value).__name__} has no place in a summary")


@dataclass(frozen=True)
class Report:
    """All that a table says."""

    text: str
    goals: list[Row]
    cases: int
    effects: Mapping[str, Mapping[str, Effect]]


def said(table: Table) -> Report:
    """The block of the page, markers included, the goals and the numbers."""
    where = table.environment
    cases, stored, told = read(table.rows) if where is not None else ([], [], [])
    trained, ended = effects(cases, TRAINED), effects(cases, AT_END)
    beside = effects(cases, BESIDE)
    if where is None:
        parts = ["Nothing is measured yet: `FULL=1 make bench-kernel-term`."]
    else:
        parts = [_setting(where)]
    if cases:
        parts += [
            verdict("Over datasets, at equal drift", trained),
            _effect_table("trained, at equal drift", trained),
            verdict("Over datasets, after the same steps", ended),
            _effect_table("trained, after the same steps", ended),
            _effect_table("at prediction only, no policy", beside),
            _dataset_table(cases),
            _case_table(cases, stored),
        ]
    return Report(
        text="\n\n".join([BEGIN, *parts, *told, END]),
        goals=goals(trained),
        cases=len(cases),
        effects={"equal drift": trained, "same steps": ended, "at prediction": beside},
    )


def report(table: Table, *, publish: bool) -> None:
    """Print the block; the kept table's also goes to the page, with the summary beside.

    The last printed line is the summary.
    """
    found = said(table)
    print(found.text)
    if publish and table.environment is not None:
        publish_block(PAGE, found.text)
        summary = {
            "environment": table.environment,
            "budget": BUDGET,
            "cases": found.cases,
            "goals": found.goals,
            "effects": {
                group: {name: asdict(of) for name, of in each.items()}
                for group, each in found.effects.items()
            },
        }
        SUMMARY.write_text(
            json.dumps(summary, indent=1, ensure_ascii=False, default=_plain) + "\n",
            encoding="utf-8",
        )
    print(json.dumps({"goals": found.goals}, ensure_ascii=False))
