"""From rows of `bench.recommend` to a table in docs/benchmarks.md, goals and one JSON line."""

import json
from typing import Any

from bench.report import PAGE, ROOT, goal_table, publish_block, worst
from bench.train_report import Table

TABLE = ROOT / "bench" / "results" / "recommend-cells.jsonl"
SUMMARY = ROOT / "bench" / "results" / "recommend.json"
BEGIN, END = "<!-- recommend: begin -->", "<!-- recommend: end -->"
SIZE = 2_300
SIZES = (1_000, SIZE, 10_000, 100_000)
IN_ALL_S, BESIDE_S = 25.0, 5.0
GROWTH = 1.2
"""Linear with a fifth to spare: seconds a pair among the most pairs over those among fewer."""
_FEWER, _MOST = SIZES[-2:]
_PARTS = ("model", "tokenize", "provisional", "reference", "metrics", "rank", "store")

Row = dict[str, Any]
Key = tuple[str, int]


def newest(rows: list[Row]) -> dict[Key, Row]:
    """The last row of every data set and size."""
    return {(row["data"], row["pairs"]): row for row in rows if row.get("kind") == "run"}


def beside_reference(row: Row) -> float:
    """Seconds from the upload's end to the recommendation less those of the reference pass."""
    seconds = row["seconds"]
    return float(seconds["recommendation"] - seconds["job: reference"])


def around(row: Row) -> float:
    """Seconds of the job that no part accounts for: wake-up, process, imports, its end."""
    seconds = row["seconds"]
    parts = sum(s for name, s in seconds.items() if name.startswith("job: "))
    return float(seconds["job"] - parts)


def growing(row: Row) -> float:
    """Seconds of what is done with every pair: validation, reading and tokenising."""
    return float(row["seconds"]["ready"] + row["seconds"]["job: tokenize"])


def goals(rows: list[Row]) -> list[Row]:
    """The goals of the newest rows."""
    found = newest(rows)
    at_size = {data: row for (data, pairs), row in found.items() if pairs == SIZE}
    most = {data: row for (data, pairs), row in found.items() if pairs == _MOST}
    growth = {
        data: growing(row) / growing(found[data, _FEWER]) * _FEWER / _MOST
        for data, row in most.items()
        if (data, _FEWER) in found
    }
    return [
        worst(
            f"upload's end to recommendation, {SIZE:,} pairs, s", f"<= {IN_ALL_S:g}",
            {data: row["seconds"]["recommendation"] for data, row in at_size.items()},
        ),
        worst(
            f"everything but the reference pass, {SIZE:,} pairs, s", f"<= {BESIDE_S:g}",
            {data: beside_reference(row) for data, row in at_size.items()},
        ),
        worst(
            f"validation and tokenising, seconds a pair among {_MOST:,} / among {_FEWER:,}",
            f"<= {GROWTH:g}", growth,
        ),
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    """Seconds by part, data set and size."""
    names = " | ".join(_PARTS)
    lines = [
        "| data | pairs | to train on | measured | valid | process, imports, queue | "
        f"{names} | recommendation | without the reference | first answer | MB: validation "
        "| recommendation | load |",
        "|" + "---|" * (len(_PARTS) + 12),
    ]
    for (data, pairs), row in sorted(newest(rows).items()):
        seconds = row["seconds"]
        parts = " | ".join(_seconds(seconds.get(f"job: {name}")) for name in _PARTS)
        memory = " | ".join(
            f"{row['peak_bytes'][name] / 1e6:,.0f}" for name in ("validation", "recommendation")
        )
        lines.append(
            f"| {data} | {pairs:,} | {row['train_pairs']:,} | {row['sampled_pairs']:,} "
            f"| {_seconds(seconds['ready'])} | {_seconds(around(row))} | {parts} "
            f"| {_seconds(seconds['recommendation'])} | {_seconds(beside_reference(row))} "
            f"| {_seconds(seconds['provisional'])} | {memory} | {row['load']:.1f} |"
        )
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _block(kept: Table) -> str:
    where = kept.environment
    if where is None:
        return "\n\n".join([BEGIN, "Nothing is measured yet.", END])
    about = (
        f"Measured on {where['cpu']}, {where['cores']} cores, torch {where['torch']}, transformers "
        f"{where['transformers']}, Python {where['python']}, tiny-lm, SQLite. Seconds."
    )
    return "\n\n".join([BEGIN, about, goal_table(goals(kept.rows)), table(kept.rows), END])


def report(kept: Table, *, now: list[Row], publish: bool) -> None:
    """Print the tables; the kept one also goes to the page and the summary.

    The last printed line is the summary; `now` are rows that this run has measured and not kept.
    """
    if now:
        print("measured now, not kept:")
        print(table(now))
        print(goal_table([goal for goal in goals(now) if goal["measured"] is not None]))
    found, block = goals(kept.rows), _block(kept)
    print(block)
    if publish and kept.environment is not None:
        publish_block(PAGE, block)
        about = {"environment": kept.environment, "goals": found}
        SUMMARY.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    seen = [goal for goal in goals(now) if goal["measured"] is not None]
    print(json.dumps({"goals": found, "now": seen}))
