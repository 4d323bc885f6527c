"""Load on the API: job polls, lists, events, open streams, a large file up and down, idle memory.

`make bench-api` brings a Postgres and a Redis-protocol server of its own, fills two databases with
1,000 and 100,000 jobs, and measures `kdpo api` processes in the full mode, all on loopback and
within minutes. What is not named by `--only` is measured and published in docs/benchmarks.md.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url

from bench import api_load, api_report, api_transfer
from bench.api_load import Rated
from bench.api_report import FEW, MANY, RATE
from bench.api_seed import Seeded, seed
from bench.api_server import Api, Cores, Memory, api, fresh_database, pin
from core.lifecycle import EventType
from models.repositories.events import append_event
from models.repositories.jobs import Fence, JobRepository
from models.session import Database
from tests.servers import run_postgres, run_redis

SIZES = (FEW, MANY)
PARTS = ("polls", "lists", "events", "streams", "files")
ROUNDS, ROUND_S, WARM_S = 3, 8.0, 3.0
LISTED_TIMES = 100
EVENTS_S, STREAMS, DELIVERIES, FILE_ROUNDS = 4.0, 200, 40, 3
_BETWEEN_S = 0.5

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A database with so many jobs, and the API process in front of it."""

    jobs: int
    url: str
    seeded: Seeded
    api: Api


@contextmanager
def places(scratch: Path, cores: Cores) -> Iterator[list[Place]]:
    """A place for each size; databases and API processes are gone afterwards."""
    with ExitStack() as stack:
        admin_url = stack.enter_context(run_postgres(durable=True))
        broker = stack.enter_context(run_redis())
        made = []
        for number, jobs in enumerate(SIZES):
            url = stack.enter_context(fresh_database(admin_url))
            began = time.monotonic()
            seeded = seed(url, jobs)
            print(f"{jobs:,} jobs written in {time.monotonic() - began:.0f} s", flush=True)
            broker_url = f"{broker.url.rpartition('/')[0]}/{number}"
            process = stack.enter_context(api(url, broker_url, scratch / f"api-{jobs}", cores))
            made.append(Place(jobs, url, seeded, process))
        yield made


# ------------------------------------------------------------------ what is measured


def polls(found: list[Place]) -> Iterator[Row]:
    """Jobs that run, wait and have ended, asked for at a constant rate; sizes take turns."""
    forms: tuple[tuple[str, str], ...] = (
        ("/v1/fine_tuning/jobs", "OpenAI's form"),
        ("/v1/jobs", "any job"),
    )
    for place in found:  # what is loaded and put together once
        paths = [f"{path}/{job_id}" for path, _ in forms for job_id in _mixed(place.seeded, 10)]
        told = (place.api.port, place.seeded.secret, paths)
        api_load.run(api_load.at_rate(*told, rate=RATE / 4, seconds=WARM_S))
    for number in range(ROUNDS):
        for path, form in forms:
            for place in found if number % 2 == 0 else found[::-1]:
                ids = _mixed(place.seeded)
                paths = [f"{path}/{job_id}" for job_id in ids]
                told = (place.api.port, place.seeded.secret, paths)
                before = _cpu_s(place.api.pid)
                rated: Rated = api_load.run(api_load.at_rate(*told, rate=RATE, seconds=ROUND_S))
                yield {
                    "form": form, "jobs": place.jobs, "round": number,
                    "cpu_ms": 1e3 * (_cpu_s(place.api.pid) - before) / len(rated.seconds),
                    "sent_late_p99_ms": 1e3 * api_load.quantile(rated.late, 0.99),
                    **api_load.summary(rated.seconds),
                }  # fmt: skip


def _mixed(seeded: Seeded, each: int = 200) -> list[str]:
    """Ids of the three states in turn, spread over all of each."""
    states = [state for state in (seeded.running, seeded.queued, seeded.ended) if state]
    return [state[(n * 7919) % len(state)] for n in range(each) for state in states]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lists(place: Place) -> Iterator[Row]:
    """Pages of 20 and 100 jobs: the first, one in the middle, and those of filters."""
    pages = {
        "first page of 20": "/v1/jobs",
        "first page of 100": "/v1/jobs?limit=100",
        "page of 20 in the middle, by cursor": f"/v1/jobs?after={place.seeded.middle}",
        "status that one in 500 has": "/v1/jobs?status=running",
        "status that only the 20 oldest have": "/v1/jobs?status=paused",
        "status that none has": "/v1/jobs?status=cancelled",
        "fine-tuning jobs, first page of 20": "/v1/fine_tuning/jobs",
        "metadata that one in 50 has": "/v1/fine_tuning/jobs?metadata[team]=t7",
    }
    for name, path in pages.items():
        told = api_load.in_turn(place.api.port, place.seeded.secret, path, times=LISTED_TIMES)
        yield {"page": name, **api_load.summary(api_load.run(told))}


def events(place: Place) -> Iterator[Row]:
    """Events a second of workers that do nothing else, each with a job of its own."""
    spawn = multiprocessing.get_context("spawn")
    for workers in (1, 4):
        jobs = place.seeded.running[:workers]
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            list(pool.map(_append_for, [place.url] * workers, jobs, [0.2] * workers))
            took = pool.map(_append_for, [place.url] * workers, jobs, [EVENTS_S] * workers)
            seconds = [one for each in took for one in each]
        yield {
            "workers": workers, "events_s": len(seconds) / EVENTS_S, **api_load.summary(seconds),
        }  # fmt: skip


def _append_for(url: str, job_id: str, seconds: float) -> list[float]:
    """Append events as a worker does, a transaction each, for so long; seconds of each."""
    database, found = Database(url, pool_size=1), list[float]()
    deadline = time.monotonic() + seconds
    while (began := time.monotonic()) < deadline:
        _append(database, job_id, len(found))
        found.append(time.monotonic() - began)
    database.dispose()
    return found


def _append(database: Database, job_id: str, number: int) -> None:
    with database.transaction() as session:
        JobRepository(session).guard(Fence(job_id, 1))
        append_event(
            session, job_id, EventType.JOB_WARNING, "Something to see.", level="warn",
            data={"round": number},
        )  # fmt: skip


def streams(place: Place) -> Iterator[Row]:
    """Open streams, all of one job and each of its own: delivery, and memory for each."""
    database = Database(place.url, pool_size=1)
    running = place.seeded.running
    # Once: what the streams of one form have used is there for those of the other.
    before = Memory.of(place.api.pid)
    try:
        for form, jobs in (("one job", running[:1]), ("a job each", running)):
            followed = [jobs[n % len(jobs)] for n in range(STREAMS)]
            yield {"form": form, **api_load.run(_streamed(place, database, followed, before))}
    finally:
        database.dispose()


async def _streamed(place: Place, database: Database, job_ids: list[str], before: Memory) -> Row:
    def append(job_id: str, number: int) -> float:
        _append(database, job_id, number)
        return time.perf_counter()

    async with api_load.streams(place.api.port, place.seeded.secret, job_ids) as opened:
        during = Memory.of(place.api.pid)
        rounds = await api_load.deliveries(opened, append, rounds=DELIVERIES, every_s=_BETWEEN_S)
    each = [seconds for one in rounds for seconds in one]
    last = [max(one) for one in rounds]
    return {
        "streams": len(job_ids), "events": len(rounds),
        **{f"p{p}_ms": 1e3 * api_load.quantile(each, p / 100) for p in (50, 95, 99)},
        **{f"last_p{p}_ms": 1e3 * api_load.quantile(last, p / 100) for p in (50, 95, 99)},
        "stream_bytes": (during.pss - before.pss) / len(job_ids),
    }  # fmt: skip


def files(place: Place, cores: Cores, scratch: Path, size_bytes: int) -> Iterator[Row]:
    """A file through the API and through the peer; both may use all cores."""
    path = scratch / "sent.jsonl"
    api_transfer.write_file(path, size_bytes)
    pin(place.api.pid, cores.all)
    with api_transfer.peer(scratch / "peer") as peer:
        ours = api_transfer.ApiStore(place.api.port, place.seeded.secret)
        yield from api_transfer.measure([ours, peer], path, rounds=FILE_ROUNDS)
    pin(place.api.pid, cores.server)
    path.unlink()


# ------------------------------------------------------------------ all of it


def measure(scratch: Path, parts: list[str], size_bytes: int) -> Row:
    """All rows that are asked for, and where they were measured."""
    cores = Cores.of_machine()
    load = os.getloadavg()[0]
    pin(os.getpid(), cores.others)
    with places(scratch, cores) as found:
        few, many = found
        rows: Row = {"environment": _environment(many.url, cores, load)}
        # The process with few jobs has done nothing yet and is asked nothing but polls.
        rows["idle"] = asdict(Memory.of(few.api.pid))
        doers: dict[str, Callable[[], Iterator[Row]]] = {
            "polls": lambda: polls(found),
            "lists": lambda: lists(many),
            "streams": lambda: streams(many),
            "events": lambda: events(many),
            "files": lambda: files(many, cores, scratch, size_bytes),
        }
        for part, do in doers.items():
            if part in parts:
                # Workers and files may use all cores, as there is no other load then.
                pin(os.getpid(), cores.all if part in ("events", "files") else cores.others)
                rows[part] = []
                for row in do():
                    print(json.dumps({part: row}), flush=True)
                    rows[part].append(row)
    return rows


def _environment(url: str, cores: Cores, load: float) -> Row:
    plain = make_url(url).set(drivername="postgresql").render_as_string(False)
    with psycopg.connect(plain) as connection:
        server = connection.info.server_version
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {
        "cpu": cpu, "cores": os.cpu_count(), "own_core": cores.are_apart, "load": load,
        "python": platform.python_version(), "postgres": f"{server // 10000}.{server % 10000}",
        **{name: version(name) for name in ("fastapi", "uvicorn", "sqlalchemy")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure this; publish nothing")
    parser.add_argument("--bytes", type=int, default=1 << 30, help="size of the file")
    options = parser.parse_args()
    # Servers are stopped and the scratch folder removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="kdpo-bench-") as scratch:
        rows = measure(Path(scratch), options.only or list(PARTS), options.bytes)
    api_report.report(rows, publish=options.only is None)


if __name__ == "__main__":
    main()
