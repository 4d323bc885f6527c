"""From the end of an upload to a recommendation, through a real server: where the time goes.

`make bench-recommend` starts the embedded service on a loopback port in a fresh folder, uploads
2,300 pairs, asks for a recommendation under tiny-lm, and reports; `FULL=1` measures 1,000, 10,000
and 100,000 pairs that the kept table lacks, too. Seconds inside the job are those that its result
tells.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import httpx

from bench import recommend_report
from bench.recommend_report import SIZE, SIZES, TABLE
from bench.report import ROOT
from bench.train import environment
from bench.train_report import Table

TINY = ROOT / "examples" / "models" / "tiny-lm"
SAMPLE = ROOT / "examples" / "data" / "truthfulqa-600.jsonl.gz"
WANTED = "hh-harmless.jsonl.gz"
NEIGHBOUR = ROOT.parent / "shared" / "data"
"""Where the whole of hh-harmless is looked for when no folder is named."""
TIMEOUT_S = 1800.0
_POLL_S = 0.2
_REST_S, _REST_SHARE, _REST_WITHIN_S = 2.0, 0.1, 300.0
"""At rest: over so many seconds no more than this share of one core is used."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows to make files of, and what they are called in the table."""

    name: str
    path: Path

    def rows(self) -> list[Row]:
        """All rows of the file."""
        opened = gzip.open if self.path.suffix == ".gz" else open
        with opened(self.path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def find(folder: Path | None) -> Source:
    """hh-harmless of a folder; without one the shipped TruthfulQA sample, which is not the same.

    Raises:
        SystemExit: the named folder has no hh-harmless.
    """
    path = (folder or NEIGHBOUR) / WANTED
    if path.is_file():
        return Source("hh-harmless", path)
    if folder is not None:
        raise SystemExit(f"{folder} has no {WANTED}; name a folder that has it, or none at all")
    return Source("truthfulqa-600", SAMPLE)


def enlarged(rows: list[Row], size: int) -> Iterator[Row]:
    """`size` rows: all as they are, then again with a number behind the last prompt turn.

    So prompts stay distinct, and no pair is a double of another.
    """
    repeated = (numbered(row, again) for again in count() for row in rows)
    return islice(repeated, size)


def numbered(row: Row, again: int) -> Row:
    """The row with the number of its repetition in the prompt; the first is left as it is."""
    if again == 0:
        return row
    mark = f" (asked again, {again})"
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {**row, "prompt": prompt + mark}
    last = prompt[-1]
    return {**row, "prompt": [*prompt[:-1], {**last, "content": last["content"] + mark}]}


def write(source: Source, size: int, path: Path) -> str:
    """Write a file of so many pairs; return its sha256."""
    text = "".join(json.dumps(row) + "\n" for row in enlarged(source.rows(), size)).encode()
    path.write_bytes(text)
    return hashlib.sha256(text).hexdigest()


# ------------------------------------------------------------------ the service


@contextmanager
def service(folder: Path) -> Iterator[tuple[httpx.Client, int]]:
    """The embedded server with its own workers; a client that is logged in, and its process id."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KDPO_")}
    environ = {**kept, "KDPO_DATA_DIR": str(folder / "data"), "HF_HUB_OFFLINE": "1"}
    kdpo = [sys.executable, "-P", "-m", "app"]
    subprocess.run([*kdpo, "migrate"], env=environ, check=True, stdout=subprocess.DEVNULL)
    key = subprocess.run(
        [*kdpo, "keys", "create", "--name", "bench"],
        env=environ, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*kdpo, "serve", "--port", str(port), "--model-dir", str(TINY.parent)]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    headers = {"Authorization": f"Bearer {key}"}
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S) as client:
            _until_ready(client, process, folder / "service.log")
            yield client, process.pid
    finally:
        process.terminate()
        process.wait(60)


def _until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with code {process.returncode}: {_tail(log)}")
        with suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the service was not ready within 120 s: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


class Memory(threading.Thread):
    """Watches the job processes below the service: the peak of the resident set, in bytes.

    Of a process that is kept for the next job only where `spare` is true.
    """

    def __init__(self, pid: int, *, spare: bool) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._ignored = None if spare else b"--spare"
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.1):
            for pid in _descendants(self._pid):
                with suppress(OSError):  # it has ended
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if b"worker.runner" in words and self._ignored not in words:
                        self.peak = max(self.peak, _peak_rss(pid))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _until_at_rest(pid: int) -> None:
    """Wait until a service that has just started is like one that runs: nothing is imported now."""
    deadline = time.monotonic() + _REST_WITHIN_S
    before = _cpu_ticks(pid)
    while time.monotonic() < deadline:
        time.sleep(_REST_S)
        now = _cpu_ticks(pid)
        if now - before <= _REST_SHARE * _REST_S * os.sysconf("SC_CLK_TCK"):
            return
        before = now
    raise RuntimeError(f"the service was still busy after {_REST_WITHIN_S:.0f} s")


def _cpu_ticks(pid: int) -> int:
    """Processor time of the service and of all that runs below it."""
    ticks = 0
    for each in (pid, *_descendants(pid)):
        with suppress(OSError):  # it has ended
            # Behind the name, which may hold anything: user and system time are fields 14 and 15.
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found


def _peak_rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    lines = (line.split() for line in status.splitlines())
    return next((1024 * int(parts[1]) for parts in lines if parts[0] == "VmHWM:"), 0)


@contextmanager
def watched(pid: int, *, spare: bool) -> Iterator[Memory]:
    """Peak memory of jobs that run within the block."""
    memory = Memory(pid, spare=spare)
    memory.start()
    try:
        yield memory
    finally:
        memory.stop()


# ------------------------------------------------------------------ one measurement


def measure(source: Source, size: int, scratch: Path) -> Row:
    """Upload, recommend, and what took how long; times are of this client's clock."""
    scratch.mkdir()
    path = scratch / "pairs.jsonl"
    sha256 = write(source, size, path)
    load = os.getloadavg()[0]
    with service(scratch) as (client, pid):
        _until_at_rest(pid)
        with watched(pid, spare=False) as validating:
            dataset, received, ready = upload(client, path)
        with watched(pid, spare=True) as recommending:
            view, first, done = _recommend(client, dataset["id"])
        job = body_of(client.get(f"/v1/jobs/{view['job_id']}"))
    evidence = view["evidence"]
    return {
        "kind": "run",
        "data": source.name,
        "sha256": sha256,
        "pairs": size,
        "train_pairs": evidence["pairs"],
        "sampled_pairs": evidence["sampled_pairs"],
        "load": load,
        "seconds": {
            "ready": ready - received,
            "provisional": None if first is None else first - received,
            "recommendation": done - received,
            "job": done - ready,
            **{f"job: {part}": s for part, s in job["result"]["seconds"].items()},
        },
        "peak_bytes": {"validation": validating.peak, "recommendation": recommending.peak},
    }


def body_of(response: httpx.Response) -> Row:
    """The JSON of an answer that must not be an error."""
    if response.is_error:
        raise RuntimeError(f"{response.request.url}: {response.status_code} {response.text[:500]}")
    body: Row = response.json()
    return body


class Sending(io.FileIO):
    """A file that notes when it was last read from: its end, when an upload has sent all of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.last_read = time.monotonic()

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file."""
        self.last_read = time.monotonic()
        return super().read(-1 if size is None else size) or b""


def upload(client: httpx.Client, path: Path) -> tuple[Row, float, float]:
    """The dataset, when the last of the file was sent, and when it was found ready.

    The server may answer when a small file is validated, so its answer does not end the upload.
    """
    with Sending(path) as file:
        dataset = body_of(client.post("/v1/datasets", files={"file": (path.name, file)}))
        received = file.last_read
    while dataset["status"] == "validating":
        pause(received)
        dataset = body_of(client.get(f"/v1/datasets/{dataset['id']}"))
    if not dataset["status"].startswith("ready"):
        raise RuntimeError(f"the dataset is {dataset['status']}: {dataset}")
    return dataset, received, time.monotonic()


def _recommend(client: httpx.Client, dataset_id: str) -> tuple[Row, float | None, float]:
    """The answer, when the early one was seen first (if it was), and when the last one was."""
    asked = time.monotonic()
    body = {"dataset_id": dataset_id, "model": str(TINY)}
    view = body_of(client.post("/v1/recommendations", json=body))
    first: float | None = None
    while view["status"] not in ("succeeded", "failed", "cancelled"):
        pause(asked)
        view = body_of(client.get(f"/v1/recommendations/{view['id']}"))
        if first is None and view["recommendation"] is not None and view["provisional"]:
            first = time.monotonic()
    if view["status"] != "succeeded":
        raise RuntimeError(f"the recommendation has {view['status']}: {view['error']}")
    return view, first, time.monotonic()


def pause(since: float) -> None:
    """Wait a moment, but not for ever."""
    if time.monotonic() - since > TIMEOUT_S:
        raise RuntimeError(f"no answer within {TIMEOUT_S:.0f} s")
    time.sleep(_POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="measure all sizes the table lacks")
    parser.add_argument("--keep", action="store_true", help="keep what is measured without --full")
    parser.add_argument("--data", type=Path, help=f"folder with {WANTED}")
    parser.add_argument("--pairs", type=int, nargs="+", default=[SIZE], help="sizes to measure")
    parser.add_argument("--table", type=Path, default=TABLE, help="where rows are kept")
    options = parser.parse_args()
    # The service is stopped and the scratch folder removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.full and (options.keep or options.pairs != [SIZE]):
        parser.error("--full measures and keeps all sizes: leave --keep and --pairs out")
    if min(options.pairs) < 20:
        parser.error(f"--pairs {min(options.pairs)}: expected 20 or more")
    source, table = find(options.data), Table(options.table)
    sizes = options.pairs
    if options.full:
        sizes = [n for n in SIZES if not table.has(kind="run", data=source.name, pairs=n)]
    kept = options.full or options.keep
    now: list[Row] = []
    if kept and sizes:
        table.append({"environment": environment()})
    with tempfile.TemporaryDirectory(prefix="kdpo-bench-") as scratch:
        for size in sizes:
            print(f"{size:,} pairs of {source.name}", flush=True)
            row = measure(source, size, Path(scratch) / str(size))
            print(json.dumps(row), flush=True)
            (table.append if kept else now.append)(row)
    recommend_report.report(table, now=now, publish=options.table == TABLE)


if __name__ == "__main__":
    main()
