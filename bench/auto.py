"""A whole `auto` job through a real server: how long it takes, and what was promised.

`make bench-auto` starts the embedded service in a fresh folder, uploads the shipped TruthfulQA
sample, asks for an `auto` job under tiny-lm with everything left to its defaults, and reports what
the quotes said, what the search then cost, and how many minutes the job took.
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

from bench.recommend import SAMPLE, TINY, Source, body_of, pause, service, upload, write
from bench.report import ROOT, worst
from bench.train import environment

SUMMARY = ROOT / "bench" / "results" / "auto.json"
PAIRS = 600

Row = dict[str, Any]


def measure(scratch: Path, *, search: Row) -> Row:
    """Run one job; seconds are of this client's clock, device seconds the study's."""
    path = scratch / "pairs.jsonl"
    sha256 = write(Source("truthfulqa-600", SAMPLE), PAIRS, path)
    load = os.getloadavg()[0]
    with service(scratch) as (client, _):
        dataset, _, _ = upload(client, path)
        asked = time.monotonic()
        job = _finished(client, dataset["id"], search, asked)
        seconds = time.monotonic() - asked
        study = body_of(client.get(f"/v1/studies/{job['study_id']}"))
    result = job["result"]
    return {
        "data": "truthfulqa-600",
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
        worst("minutes of a whole auto job", "<= 10", {"truthfulqa-600": row["seconds"] / 60.0}),
        worst("search: cost against the quote, percent off", "<= 25", off),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", help="of the search; default: what the service takes")
    parser.add_argument("--gpu-seconds", type=float, help="budget of the search")
    options = parser.parse_args()
    # The service is stopped and the scratch folder removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    search = {"shape": options.shape, "gpu_seconds": options.gpu_seconds}
    with tempfile.TemporaryDirectory(prefix="kdpo-bench-") as scratch:
        row = measure(
            Path(scratch), search={name: v for name, v in search.items() if v is not None}
        )
    found = {"environment": environment(), "run": row, "goals": goals(row)}
    if not row["search"]:
        SUMMARY.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in ("seconds", "steps", "spent", "quotes"):
        print(name, json.dumps(row[name]))
    print(json.dumps({"goals": found["goals"]}))


if __name__ == "__main__":
    main()
