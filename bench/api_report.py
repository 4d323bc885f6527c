"""From the rows of `bench.api` to tables in docs/benchmarks.md, goals and one JSON line."""

import json
import statistics
from collections.abc import Callable
from typing import Any

from bench.report import PAGE, ROOT, goal_table, publish_block, worst

SUMMARY = ROOT / "bench" / "results" / "api.json"
BEGIN, END = "<!-- api: begin -->", "<!-- api: end -->"
FEW, MANY = 1_000, 100_000
RATE = 200.0
P95_MS, FLAT, OF_PLAIN = 10.0, 1.2, 0.7
_OURS = "kdpo"
_QUANTILES = ("p50_ms", "p95_ms", "p99_ms", "max_ms")

Row = dict[str, Any]


def polled(rows: Row) -> dict[tuple[str, int], Row]:
    """Medians over the rounds, by form and number of jobs."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows.get("polls", []):
        groups.setdefault((row["form"], row["jobs"]), []).append(row)
    names = (*_QUANTILES, "cpu_ms", "sent_late_p99_ms")
    return {
        key: {
            "rounds": len(some), "requests": sum(row["requests"] for row in some),
            **{name: statistics.median(row[name] for row in some) for name in names},
        }
        for key, some in groups.items()
    }  # fmt: skip


def growth(rows: Row) -> dict[str, float]:
    """p95 among many jobs over that among few, by form."""
    found = polled(rows)
    return {
        form: row["p95_ms"] / found[form, FEW]["p95_ms"]
        for (form, jobs), row in found.items()
        if jobs == MANY and (form, FEW) in found
    }


def speeds(rows: Row) -> dict[str, dict[str, float]]:
    """Medians of MB/s by direction and store."""
    stores = sorted({row["store"] for row in rows.get("files", [])})
    return {
        way: {
            store: statistics.median(r[way] for r in rows["files"] if r["store"] == store)
            for store in stores
        }
        for way in ("up_mb_s", "down_mb_s")
    }


def shares(rows: Row, way: str) -> dict[str, float]:
    """Our speed over the peer's."""
    found = speeds(rows)[way]
    return {f"against {name}": found[_OURS] / found[name] for name in found if name != _OURS}


def goals(rows: Row) -> list[Row]:
    """The goals of what was measured."""
    p95 = {f"{form}, {jobs:,} jobs": row["p95_ms"] for (form, jobs), row in polled(rows).items()}
    return [
        worst(f"p95 of a job poll at {RATE:.0f} requests/s on one core, ms", f"<= {P95_MS:g}", p95),
        worst(f"p95 among {MANY:,} jobs / among {FEW:,}", f"<= {FLAT:g}", growth(rows)),
        worst("upload, speed / plain file", f">= {OF_PLAIN:g}", shares(rows, "up_mb_s")),
        worst("download, speed / plain file", f">= {OF_PLAIN:g}", shares(rows, "down_mb_s")),
    ]


def poll_table(rows: Row) -> str:
    """Job polls."""
    lines = [
        f"| job polls at {RATE:.0f}/s | jobs | requests | p50, ms | p95 | p99 | slowest "
        "| processor time of the API each, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (form, jobs), row in sorted(polled(rows).items()):
        lines.append(
            f"| {form} | {jobs:,} | {row['requests']:,} | {_ms(row)} | {row['cpu_ms']:.2f} |"
        )
    return "\n".join(lines)


def list_table(rows: Row) -> str:
    """Lists."""
    lines = [
        f"| lists of {MANY:,} jobs, one request at a time | p50, ms | p95 | p99 | slowest |",
        "|---|---|---|---|---|",
        *(f"| {row['page']} | {_ms(row)} |" for row in rows.get("lists", [])),
    ]
    return "\n".join(lines)


def event_table(rows: Row) -> str:
    """Events that are appended."""
    lines = [
        "| workers that append events, a transaction each | events/s | p50, ms | p95 | p99 |",
        "|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {row['workers']} | {row['events_s']:,.0f} | {row['p50_ms']:.1f} | {row['p95_ms']:.1f} "
        f"| {row['p99_ms']:.1f} |"
        for row in rows.get("events", [])
    )
    return "\n".join(lines)


def stream_table(rows: Row) -> str:
    """Open streams."""
    lines = [
        "| open streams | follow | commit to arrival: p50, ms | p95 | p99 | at the last "
        "stream: p50 | p95 | p99 | memory each, kB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {row['streams']} | {row['form']} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} "
        f"| {row['p99_ms']:.0f} | {row['last_p50_ms']:.0f} | {row['last_p95_ms']:.0f} "
        f"| {row['last_p99_ms']:.0f} | {row['stream_bytes'] / 1e3:.0f} |"
        for row in rows.get("streams", [])
    )
    return "\n".join(lines)


def file_table(rows: Row) -> str:
    """A large file up and down."""
    found = speeds(rows)
    size = max((row["bytes"] for row in rows.get("files", [])), default=0)
    lines = [f"| a file of {size / 1e9:.2f} GB | up, MB/s | down, MB/s |", "|---|---|---|"]
    for store, up in found["up_mb_s"].items():
        lines.append(f"| {store} | {up:,.0f} | {found['down_mb_s'][store]:,.0f} |")
    return "\n".join(lines)


def about(rows: Row) -> str:
    """Where it was measured, and the memory of an API process that has done nothing yet."""
    where, idle = rows["environment"], rows["idle"]
    core = "the API on one of them alone" if where["own_core"] else "all on the same"
    return (
        f"Measured on {where['cpu']}, {where['cores']} cores, {core}; Postgres "
        f"{where['postgres']}, Python {where['python']}, uvicorn {where['uvicorn']}, "
        f"fastapi {where['fastapi']}, SQLAlchemy {where['sqlalchemy']}; load average before "
        f"{where['load']:.1f}. An idle API process has {idle['rss'] / 1e6:.0f} MB resident "
        f"({idle['pss'] / 1e6:.0f} MB with shared pages counted in part)."
    )


def _ms(row: Row) -> str:
    return " | ".join(f"{row[name]:.1f}" for name in _QUANTILES)


_TABLES: dict[str, Callable[[Row], str]] = {
    "polls": poll_table, "lists": list_table, "events": event_table, "streams": stream_table,
    "files": file_table,
}  # fmt: skip


def report(rows: Row, *, publish: bool) -> None:
    """Print the tables of what was measured; publish writes the page and the summary, too.

    The last printed line is the summary.
    """
    tables = [table(rows) for part, table in _TABLES.items() if part in rows]
    found = [goal for goal in goals(rows) if goal["measured"] is not None or publish]
    block = "\n\n".join([BEGIN, about(rows), goal_table(found), *tables, END])
    print(block)
    if publish:
        publish_block(PAGE, block)
        SUMMARY.write_text(json.dumps({**rows, "goals": found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"goals": found}))
