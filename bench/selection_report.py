"""From rows of `bench.selection` to a block in docs/selection.md, goals and one JSON line."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from bench.report import ROOT, publish_block
from bench.selection_cases import (
    BUDGET,
    HELD_OUT,
    PAIRS,
    SHUFFLED_PAIRS,
    recommender_version,
)
from bench.selection_read import SHAPE, Found, Row, read
from bench.selection_stats import (
    TOP,
    Case,
    Floats,
    best_is_within,
    kendall_tau,
    over_datasets,
    over_prompts,
    rank_of,
    regret,
    share,
)
from bench.train_report import Table
from core.profile import Estimate
from core.spec import BASE_KERNELS, DivergenceName

TABLE = ROOT / "bench" / "tables" / "selection.jsonl"
SUMMARY = ROOT / "bench" / "results" / "selection.json"
PAGE = ROOT / "docs" / "selection.md"
BEGIN, END = "<!-- selection: begin -->", "<!-- selection: end -->"
MIN_DATASETS, MIN_SEEDS = 4, 2
"""A goal is met on no less."""


def agreement(case: Case) -> Callable[[Floats], float]:
    """Kendall's tau of the scores against trained log-losses."""
    return lambda losses: kendall_tau(case.scores, -losses)


def _by_part(case: Case, axis: int) -> float:
    """Tau of kernels (axis 0) or divergences (axis 1) alone, means over the other."""
    scores, losses = (x.reshape(SHAPE).mean(axis=1 - axis) for x in (case.scores, case.trained))
    return kendall_tau(scores.round(9), -losses)


def between_seeds(found: Sequence[Found]) -> Estimate | None:
    """Tau of trained rankings of two seeds of a dataset: about what any prediction can reach."""
    by_data: dict[str, list[Case]] = defaultdict(list)
    for each in found:
        by_data[each.case.data].append(each.case)
    pairs = [
        (a, kendall_tau(a.trained, b.trained))
        for cases in by_data.values()
        for number, a in enumerate(cases)
        for b in cases[number + 1 :]
    ]
    return over_datasets([a for a, _ in pairs], [tau for _, tau in pairs]) if pairs else None


def statistics(found: Sequence[Found]) -> dict[str, Estimate]:
    """All that is said of the ranking, by name, with intervals. Domain: at least one case."""
    cases = [each.case for each in found]

    def mean(value: Callable[[Found], float]) -> Estimate:
        return over_datasets(cases, [value(each) for each in found])

    def first(each: Found) -> float:
        return float(each.case.trained[each.recommended])

    hits = sum(best_is_within(case.order, case.trained) for case in cases)
    said = {
        "Kendall τ of the 28 pairs": mean(lambda f: agreement(f.case)(f.case.trained)),
        "τ of the divergences alone": mean(lambda f: _by_part(f.case, 1)),
        "τ of the kernels alone": mean(lambda f: _by_part(f.case, 0)),
        "rank of the recommended pair (by chance 14.5)": mean(
            lambda f: rank_of(f.recommended, f.case.trained)
        ),
        f"best pair in the recommended top {TOP} (by chance {TOP / len(PAIRS):.2f})": share(
            hits, len(cases)
        ),
        "regret of the recommended pair": mean(lambda f: regret(first(f), f.case.trained)),
        "regret of a random pair": mean(
            lambda f: regret(float(f.case.trained.mean()), f.case.trained)
        ),
        "regret of plain DPO": mean(lambda f: regret(f.plain, f.case.trained)),
        "recommended − random pair": mean(lambda f: first(f) - float(f.case.trained.mean())),
        "recommended − plain DPO": mean(lambda f: first(f) - f.plain),
    }
    for told, pick in (
        ("metrics alone, no table", lambda f: f.metrics),
        ("shipped table, which saw these runs", lambda f: f.shipped),
    ):
        within = sum(best_is_within(pick(f).order, f.case.trained) for f in found)
        said |= {
            f"τ: {told}": mean(lambda f, pick=pick: agreement(pick(f))(f.case.trained)),
            f"best pair in top {TOP}: {told}": share(within, len(cases)),
        }
    again = between_seeds(found)
    return said if again is None else {**said, "τ between trained rankings of two seeds": again}


def confidence(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Shares of shuffles in which today's recommender claims something; empty where unmeasured."""
    now = recommender_version()
    kept = {
        row["data"]: row
        for row in rows
        if row.get("kind") == "shuffles" and row["recommender"] == now
    }
    number = sum(row["shuffles"] for row in kept.values())
    if not number:
        return {}
    names = {
        "claims": "false confidence on shuffled labels",
        "predicts": "a kernel called better than chance on shuffled labels",
    }
    return {
        text: share(sum(row[name] for row in kept.values()), number) for name, text in names.items()
    }


def goals(found: Sequence[Found], rows: Sequence[Row]) -> list[Row]:
    """The goals of selection; met only where enough datasets and seeds are measured."""
    said = statistics(found) if found else {}
    wrong = confidence(rows)
    seeds: dict[str, set[int]] = defaultdict(set)
    for each in found:
        seeds[each.case.data].add(each.case.seed)
    enough = sum(len(of) >= MIN_SEEDS for of in seeds.values()) >= MIN_DATASETS

    def goal(name: str, sign: str, target: float, estimates: dict[str, Estimate]) -> Row:
        estimate = next((e for text, e in estimates.items() if text.startswith(name)), None)
        value = None if estimate is None else estimate.value
        reached = value is not None and (value >= target if sign == ">=" else value <= target)
        return {
            "name": name,
            "target": f"{sign} {target:g}",
            "measured": None if value is None else float(f"{value:.3g}"),
            "interval": None if estimate is None else _rounded(estimate),
            "met": reached and (enough or estimates is wrong),
        }

    return [
        goal("Kendall τ of the 28 pairs", ">=", 0.3, said),
        goal(f"best pair in the recommended top {TOP}", ">=", 0.7, said),
        goal("false confidence on shuffled labels", "<=", 0.05, wrong),
    ]


def _rounded(estimate: Estimate) -> list[float]:
    return [float(f"{x:.3g}") for x in (estimate.low, estimate.high)]


def _goal_table(found: Sequence[Row]) -> str:
    lines = ["| goal | target | measured | met |", "|---|---|---|---|"]
    for goal in found:
        said = "not yet" if goal["measured"] is None else f"{goal['measured']} {goal['interval']}"
        met = "yes" if goal["met"] else "**no**"
        lines.append(f"| {goal['name']} | {goal['target']} | {said} | {met} |")
    return "\n".join(lines)


def _said(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _statistics_table(found: Sequence[Found], rows: Sequence[Row]) -> str:
    lines = ["| what | mean and 95 % interval |", "|---|---|"]
    both = statistics(found) | confidence(rows)
    lines += [f"| {name} | {_said(value)} |" for name, value in both.items()]
    named = sum(each.claims for each in found)
    lines.append(f"| confidence claimed on the data as they are | {named} of {len(found)} cases |")
    return "\n".join(lines)


def _case_table(found: Sequence[Found]) -> str:
    lines = [
        "| data | seed | pairs | validation prompts | τ | best pair | its log-loss | recommended "
        "| rank | its log-loss | mean of the pairs | plain DPO |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        case, trained = each.case, each.case.trained
        best, first = int(trained.argmin()), each.recommended
        tau = over_prompts(case, agreement(case))
        lines.append(
            f"| {case.data} | {case.seed} | {each.train_pairs:,} | {np.unique(case.group).size} "
            f"| {_said(tau, 2)} | {PAIRS[best]} | {trained[best]:.4f} | {PAIRS[first]} "
            f"| {rank_of(first, trained):g} | {trained[first]:.4f} | {trained.mean():.4f} "
            f"| {each.plain:.4f} |"
        )
    return "\n".join(lines)


def _part_table(found: Sequence[Found]) -> str:
    """What training says of each divergence and kernel: the evidence for the prior."""
    lines = [
        "| part | log-loss won over plain DPO, % | drift / plain DPO's | score, mean |",
        "|---|---|---|---|",
    ]
    cases = [each.case for each in found]
    parts = [(1, n, d.value) for n, d in enumerate(DivergenceName)]
    parts += [(0, n, k.value) for n, k in enumerate(BASE_KERNELS)]
    for axis, number, name in parts:
        pick = partial(np.take, indices=number, axis=axis)
        gain = over_datasets(cases, [float(pick(each.gains()).mean()) for each in found])
        drift = np.nanmean([np.nanmean(pick(each.drifts())) for each in found])
        score = np.mean([pick(case.scores.reshape(SHAPE)).mean() for case in cases])
        lines.append(f"| {name} | {_said(gain, 2)} | {drift:.2f} | {score:.2f} |")
    return "\n".join(lines)


def _setting(where: Row) -> str:
    return (
        f"Runs: {BUDGET['model']}, {BUDGET['steps']} steps of {BUDGET['batch_size']} pairs, "
        f"learning rate {BUDGET['learning_rate']}, β {BUDGET['beta']}, γ {BUDGET['gamma']}, "
        f"α {BUDGET['alpha']} for every pair, up to {BUDGET['validation_pairs']} validation pairs. "
        f"The seed draws the split ({HELD_OUT['validation']:.0%} of prompts for validation), the "
        "adapter and the order. Log-loss is calibrated, its temperature fitted on the other half "
        "of the prompts; a run that breaks down counts as ln 2. Intervals of means are over "
        "datasets (all seeds of one come along), widened for how few they are; those of a case's τ "
        "are over its validation prompts; those of shares are Wilson's. Regrets are to the "
        "smallest of 28 noisy losses and too large by the same amount; differences are free of "
        f"that. Shuffled: chosen and rejected exchanged by lot, {SHUFFLED_PAIRS} pairs; confidence "
        "is any lead of what comes first over what comes next that is called separated. "
        f"Measured on {where['cpu']}, {where['threads']} threads of {where['cores']} cores, torch "
        f"{where['torch']}, transformers {where['transformers']}, peft {where['peft']}, Python "
        f"{where['python']}, float32."
    )


def block(table: Table) -> str:
    """The block of the page, markers included."""
    where = table.environment
    if where is None:
        return "\n\n".join([BEGIN, "Nothing is measured yet: `FULL=1 make bench-selection`.", END])
    found, told = read(table.rows)
    parts = [_setting(where), _goal_table(goals(found, table.rows))]
    if found:
        parts += [_statistics_table(found, table.rows), _part_table(found), _case_table(found)]
    stale = sum(each.stale for each in found)
    if stale:
        told.append(f"The metrics of {stale} cases were measured by an earlier version of them.")
    return "\n\n".join([BEGIN, *parts, *told, END])


def report(table: Table, *, publish: bool) -> None:
    """Print the block; the kept table's also goes to the page, with the summary beside.

    The last printed line is the summary.
    """
    text = block(table)
    print(text)
    found, _ = read(table.rows)
    said = goals(found, table.rows)
    if publish and table.environment is not None:
        publish_block(PAGE, text)
        values = (statistics(found) if found else {}) | confidence(table.rows)
        summary = {
            "environment": table.environment,
            "budget": BUDGET,
            "cases": len(found),
            "goals": said,
            "statistics": {name: value.model_dump() for name, value in values.items()},
        }
        SUMMARY.write_text(
            json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(json.dumps({"goals": said}, ensure_ascii=False))
