"""The servers of the API's benchmark: Postgres, a broker, `kdpo api` on a core of its own."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
from sqlalchemy import make_url

from models.migrate import upgrade

MAX_STREAMS = 1_000
_PER_MINUTE = 1_000_000
_START_S, _STOP_S = 120.0, 30.0


@dataclass(frozen=True)
class Cores:
    """Which cores serve the API, and which do all the rest."""

    server: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of_machine(cls) -> "Cores":
        """The first core for the API; without a choice, the same for all."""
        if not hasattr(os, "sched_setaffinity"):
            return cls(frozenset(), frozenset())
        first, *rest = sorted(os.sched_getaffinity(0))
        return cls(frozenset({first}), frozenset(rest or {first}))

    @property
    def are_apart(self) -> bool:
        """Whether the API has its core to itself."""
        return bool(self.server) and not self.server & self.others

    @property
    def all(self) -> frozenset[int]:
        """Every core that may be used."""
        return self.server | self.others


def pin(pid: int, cores: frozenset[int]) -> None:
    """Keep a process, with all its threads, on these cores; those that it starts later, too."""
    if not cores:
        return
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):  # a thread that has ended
            os.sched_setaffinity(int(task.name), cores)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: resident, and with shared pages counted in part."""

    rss: int
    pss: int

    @classmethod
    def of(cls, pid: int) -> "Memory":
        """What the kernel says now."""
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kib = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        return cls(1024 * kib["Rss:"], 1024 * kib["Pss:"])


@contextmanager
def fresh_database(admin_url: str) -> Iterator[str]:
    """A migrated database of its own, gone afterwards."""
    admin = make_url(admin_url).set(drivername="postgresql")
    name = f"kdpo_bench_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(admin.render_as_string(False), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            url = make_url(admin_url).set(database=name, drivername="postgresql+psycopg")
            upgrade(url.render_as_string(False))
            yield url.render_as_string(False)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@dataclass(frozen=True)
class Api:
    """A running API process."""

    port: int
    pid: int
    data_dir: Path


@contextmanager
def api(database_url: str, broker_url: str, folder: Path, cores: Cores) -> Iterator[Api]:
    """One `kdpo api` process in the full mode, with its defaults but for limits of one key."""
    folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KDPO_")}
    environ = {
        **kept,
        "KDPO_MODE": "full",
        "KDPO_DATA_DIR": str(folder / "data"),
        "KDPO_DB__URL": database_url,
        "KDPO_BROKER__URL": broker_url,
        "KDPO_API__MAX_STREAMS": str(MAX_STREAMS),
        "KDPO_AUTH__REQUESTS_PER_MINUTE": str(_PER_MINUTE),
        "HF_HUB_OFFLINE": "1",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "app", "api", "--port", str(port)]
    log = folder / "api.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        pin(process.pid, cores.server)
        _until_it_answers(port, process, log)
        yield Api(port, process.pid, folder / "data")
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_it_answers(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the process answers; that no worker runs is as it should be here."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    told = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"`kdpo api` did not answer within {_START_S:.0f} s: {told}")
