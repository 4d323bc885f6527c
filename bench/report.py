"""From measured cells to a table in docs/benchmarks.md, goals and one JSON line."""

import json
import statistics
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "bench" / "results" / "objectives-cells.jsonl"
SUMMARY = ROOT / "bench" / "results" / "objectives.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- objectives: begin -->", "<!-- objectives: end -->"
FORMS = ("streamed", "whole", "trl")
MEMORY_AT = (4096, 150_000)
MEMORY_FROM = (256, 512)

Row = dict[str, Any]
Key = tuple[str, int, int]
Place = TypeVar("Place", bound=Hashable)


def read(path: Path) -> tuple[dict[Key, Row], dict[str, Any]]:
    """Rows by cell, the last of each, and the environment that they were measured in."""
    rows: dict[Key, Row] = {}
    environment: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "environment" in row:
            environment = row["environment"]
        else:
            rows[row["divergence"], row["tokens"], row["vocabulary"]] = row
    return rows, environment


def seconds(row: Row, form: str) -> float | None:
    samples = row["seconds"].get(form)
    return statistics.median(samples) if samples else None


def ratios(rows: dict[Key, Row], form: str) -> dict[Key, float]:
    """Median time of the streamed form over that of another, where both ran."""
    found = {}
    for key, row in rows.items():
        ours, theirs = seconds(row, "streamed"), seconds(row, form)
        if ours is not None and theirs is not None:
            found[key] = ours / theirs
    return found


def memory_shares(rows: dict[Key, Row]) -> dict[Key, float]:
    """Streamed over whole at MEMORY_AT, where whole logits do not fit.

    Their memory is a + b tokens; a and b come from the two smaller cells of that vocabulary.
    """
    found = {}
    (few, more), (tokens, vocabulary) = MEMORY_FROM, MEMORY_AT
    for name in sorted({name for name, _, _ in rows}):
        cells = [rows.get((name, n, vocabulary)) for n in (few, more, tokens)]
        if any(cell is None for cell in cells):
            continue
        first, second, ours = (cell["bytes"] for cell in cells if cell is not None)
        slope = (second["whole"] - first["whole"]) / (more - few)
        whole = second["whole"] + slope * (tokens - more)
        found[name, tokens, vocabulary] = ours["streamed"] / whole
    return found


def worst(
    name: str,
    target: str,
    values: Mapping[Place, float],
    *,
    told: Callable[[Place], str] = str,
    digits: int = 3,
) -> Row:
    """A goal over all places: the worst of them must meet the target, `<= x` or `>= x`.

    `told` says where the worst is; the measured value has so many significant digits.
    """
    sign, number = target.split()
    if not values:
        return {"name": name, "target": target, "measured": None, "met": False}
    place = (min if sign == ">=" else max)(values, key=values.__getitem__)
    value = values[place]
    return {
        "name": name,
        "target": target,
        "measured": float(f"{value:.{digits}g}"),
        "met": value >= float(number) if sign == ">=" else value <= float(number),
        "worst_cell": told(place),
        "cells": len(values),
    }


def _cell(key: Key) -> str:
    return "{} at {} x {}".format(*key)


def goals(rows: dict[Key, Row]) -> list[dict[str, Any]]:
    errors = {
        kind: {key: row["error"][kind] for key, row in rows.items() if row["error"]}
        for kind in ("value", "gradient")
    }
    return [
        worst(
            "extra memory at 4096 tokens x 150k, streamed / whole logits",
            "<= 0.1",
            memory_shares(rows),
            told=_cell,
        ),
        worst("time, streamed / TRL chunked (KL, JSD)", "<= 1", ratios(rows, "trl"), told=_cell),
        worst("time, streamed / whole logits", "<= 1.3", ratios(rows, "whole"), told=_cell),
        worst("relative error of D against float64", "<= 1e-05", errors["value"], told=_cell),
        worst(
            "relative error of the gradient against float64",
            "<= 1e-05",
            errors["gradient"],
            told=_cell,
        ),
    ]


def table(rows: dict[Key, Row]) -> str:
    def time_of(row: Row, form: str) -> str:
        value = seconds(row, form)
        return "–" if value is None else f"{value:.2f}"

    def memory_of(row: Row, form: str) -> str:
        return f"{row['bytes'][form] / 1e6:,.0f}" if form in row["bytes"] else "–"

    lines = [
        "| divergence | tokens | vocabulary | s: streamed | whole | TRL "
        "| MB: streamed | whole | TRL | error of D | of gradient |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, tokens, vocabulary), row in sorted(
        rows.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])
    ):
        times = " | ".join(time_of(row, form) for form in FORMS)
        memory = " | ".join(memory_of(row, form) for form in FORMS)
        error = f"{row['error']['value']:.0e} | {row['error']['gradient']:.0e}"
        lines.append(f"| {name} | {tokens} | {vocabulary:,} | {times} | {memory} | {error} |")
    return "\n".join(lines)


def goal_table(found: list[dict[str, Any]]) -> str:
    lines = ["| goal | target | worst measured | where | met |", "|---|---|---|---|---|"]
    for goal in found:
        where = f"{goal.get('worst_cell', 'nothing measured')} of {goal.get('cells', 0)} cells"
        met = "yes" if goal["met"] else "**no**"
        lines.append(
            f"| {goal['name']} | {goal['target']} | {goal['measured']} | {where} | {met} |"
        )
    return "\n".join(lines)


def publish_block(page: Path, block: str) -> None:
    """Put a block in the place of the one that the page has; its first and last line mark both.

    Raises:
        RuntimeError: the page lacks a mark.
    """
    begin, *_, end = block.splitlines()
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise RuntimeError(f"{page} must hold the lines {begin} and {end}, the block's place")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(before + block + after, encoding="utf-8")


def report() -> None:
    """Write the page's table and the summary; the last printed line is the summary."""
    rows, environment = read(CELLS)
    found = goals(rows)
    block = "\n\n".join(
        [
            BEGIN,
            f"Measured on {environment['cpu']}, {environment['threads']} thread of "
            f"{environment['cores']} cores, torch {environment['torch']}, Python "
            f"{environment['python']}, width H = {environment['width']}, {environment['dtype']}.",
            goal_table(found),
            table(rows),
            END,
        ]
    )
    publish_block(PAGE, block)
    SUMMARY.write_text(
        json.dumps({"environment": environment, "goals": found}, indent=1) + "\n", encoding="utf-8"
    )
    print(table(rows))
    print(goal_table(found))
    print(json.dumps({"goals": found}))


if __name__ == "__main__":
    report()
