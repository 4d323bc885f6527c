"""A whole `auto` job through a real server: how long it takes, and what was promised.

`make bench-auto` starts the embedded service in a fresh folder, uploads `truthfulqa` (the shipped
sample of it where the whole is not at hand), asks for an `auto` job under tiny-lm with everything
left to its defaults, and reports what the quotes said, what the search then cost, and how many
minutes the job took.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.recommend import NEIGHBOUR, SAMPLE, TINY, Source, body_of, pause, service, upload, write
from bench.report import PAGE, ROOT, goal_table, publish_block, worst
from bench.train import environment

SUMMARY = ROOT / "bench" / "results" / "auto.json"
WANTED = "truthfulqa.jsonl.gz"
BEGIN, END = "<!-- auto: begin -->", "<!-- auto: end -->"

Row = dict[str, Any]


def find(folder: Path | None) -> Source:
    """truthfulqa of a folder; without one the shipped sample of it.

    Raises:
        SystemExit: the named folder has no truthfulqa.
    """
    path = (folder or NEIGHBOUR) / WANTED
    if path.is_file():
        return Source("truthfulqa", path)
    if folder is not None:
        raise SystemExit(f"{folder} has no {WANTED}; name a folder that has it, or none at all")
    return Source("truthfulqa-600", SAMPLE)


def measure(source: Source, scratch: Path, *, search: Row) -> Row:
    """Run one job; seconds are of this client's clock, device seconds the study's."""
    path = scratch / "pairs.jsonl"
    size = len(source.rows())
    sha256 = write(source, size, path)
    load = os.getloadavg()[0]
    with service(scratch) as (client, _):
        dataset, _, _ = upload(client, path)
        asked = time.monotonic()
        job = _finished(client, dataset["id"], search, asked)
        seconds = time.monotonic() - asked
        study = body_of(client.get(f"/v1/studies/{job['study_id']}"))
    result = job["result"]
    return {
        "data": source.name,
        "pairs": size,
        "sha256": sha256,
        "load": load,
        "search": search,
        "seconds": round(seconds, 1),
        "steps": {step["name"]: step["finished_at"] - step["started_at"] for step in job["steps"]},
        "spent": round(study["gpu_seconds"], 1),
        "quotes": study["quotes"],
        "summary": result["search"],
        "comparison": result["comparison"],
    }


def _finished(client: httpx.Client, dataset_id: str, search: Row, asked: float) -> Row:
    body = {
        "model": str(TINY),
        "dataset_id": dataset_id,
        "method": {"type": "auto", "auto": {"search": search}},
    }
    job = body_of(client.post("/v1/fine_tuning/jobs", json=body))
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        pause(asked)
        job = body_of(client.get(f"/v1/fine_tuning/jobs/{job['id']}"))
    if job["status"] != "succeeded":
        raise RuntimeError(f"the job has {job['status']}: {job['error']}")
    return job


def goals(row: Row) -> list[Row]:
    """The live goals of the search, from one run."""
    off = {
        quote["at"]: 100.0 * abs(row["spent"] / quote["p50"] - 1.0)
        for quote in row["quotes"]
        if quote["p50"] > 0.0
    }
    return [
        worst("minutes of a whole auto job", "<= 10", {row["data"]: row["seconds"] / 60.0}),
        worst("search: cost against the quote, percent off", "<= 25", off),
    ]


def block(found: Row) -> str:
    """What the page shows of a kept run."""
    row, where = found["run"], found["environment"]
    promised = "; ".join(
        f"{quote['at']}: {quote['p50']:.0f} s (P90 {quote['p90']:.0f} s)" for quote in row["quotes"]
    )
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["steps"].items())
    summary = row["summary"]
    about = (
        f"Measured on {where['cpu']}, {where['cores']} cores, torch {where['torch']}, tiny-lm, "
        f"{row['data']} ({row['pairs']:,} pairs), load average before: {row['load']:.1f}."
    )
    said = (
        f"The whole job took {row['seconds']:.0f} s ({parts}). The search had been quoted at "
        f"{promised}, and cost {row['spent']:.0f} device seconds. {summary['trials']} trials, "
        f"{summary['sentence']}"
    )
    return "\n\n".join([BEGIN, about, goal_table(found["goals"]), said, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", help="of the search; default: what the service takes")
    parser.add_argument("--gpu-seconds", type=float, help="budget of the search")
    parser.add_argument("--data", type=Path, help=f"folder with {WANTED}")
    options = parser.parse_args()
    # The service is stopped and the scratch folder removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked = {"shape": options.shape, "gpu_seconds": options.gpu_seconds}
    search = {name: value for name, value in asked.items() if value is not None}
    source = find(options.data)
    print(f"an auto job on {source.name}; this takes minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="kdpo-bench-") as scratch:
        row = measure(source, Path(scratch), search=search)
    found = {"environment": environment(), "run": row, "goals": goals(row)}
    print(block(found))
    # Only the job that the goals speak of is kept.
    if not search and source.name == "truthfulqa":
        SUMMARY.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        publish_block(PAGE, block(found))
    print(json.dumps({"goals": found["goals"]}))


if __name__ == "__main__":
    main()
