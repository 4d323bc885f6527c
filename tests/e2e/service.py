"""A running kdpo for tests: the real commands, real HTTP, and the means to kill parts of it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FAST_PROTOCOL = {
    "KDPO_WORKER__LEASE_S": "3",
    "KDPO_WORKER__HEARTBEAT_S": "0.5",
    "KDPO_WORKER__SELF_FENCE_S": "2",
    "KDPO_WORKER__REAP_S": "0.5",
    "KDPO_WORKER__SWEEP_S": "0.5",
    "KDPO_WORKER__BACKOFF_S": "0.2",
    "KDPO_WORKER__SPARE_RUNNER": "false",
    "KDPO_TRAINING__CHECKPOINT_EVERY_S": "0",
    "KDPO_TRAINING__NUM_THREADS": "1",
    "KDPO_TRAINING__PROGRESS_EVERY_S": "0.2",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
    """Return the first true value of the condition."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {timeout_s} s in vain for {what}")


def process_table() -> dict[int, tuple[int, str]]:
    """Return pid -> (parent pid, command line) of all processes."""
    table = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = stat.rsplit(")", 1)[1].split()[:2]
        if state != "Z":
            table[int(entry.name)] = (int(parent), command)
    return table


def descendants(pid: int) -> dict[int, str]:
    """Return pid -> command line of all processes below one."""
    table = process_table()
    found: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {
            child for child, (parent, _) in table.items() if parent in frontier
        } - found.keys()
        found.update({child: table[child][1] for child in frontier})
    return found


@dataclass
class Service:
    """Processes of one kdpo installation and a client that is logged in to it."""

    folder: Path
    environment: dict[str, str]
    commands: list[list[str]]
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    key: str = ""

    @classmethod
    def embedded(cls, folder: Path, **extra: str) -> "Service":
        port = free_port()
        command = ["serve", "--port", str(port), "--model-dir", str(EXAMPLES / "models")]
        return cls(folder, {"KDPO_DATA_DIR": str(folder / "data"), **extra}, [command], port)

    @classmethod
    def full(cls, folder: Path, *, database: str, broker: str, **extra: str) -> "Service":
        port = free_port()
        environment = {
            "KDPO_MODE": "full",
            "KDPO_DATA_DIR": str(folder / "data"),
            "KDPO_DB__URL": database,
            "KDPO_BROKER__URL": broker,
            "KDPO_MODELS__DIRS": str(EXAMPLES / "models"),
            **extra,
        }
        commands = [
            ["api", "--port", str(port)],
            ["worker", "--queue", "cpu"],
            ["worker", "--queue", "gpu"],
        ]
        return cls(folder, environment, commands, port)

    def __enter__(self) -> "Service":
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.run("migrate")
        self.key = self.run("keys", "create", "--name", "test").strip()
        for command in self.commands:
            self.start(command)
        try:
            wait_for("the service to be ready", self.is_ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            below = descendants(process.pid)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                for pid in (*below, process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()

    def environ(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KDPO_")}
        return {**kept, **FAST_PROTOCOL, **self.environment}

    def run(self, *arguments: str) -> str:
        finished = subprocess.run(
            [sys.executable, "-m", "app", *arguments],
            env=self.environ(), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        name = "-".join(part for part in command[:3] if not part.startswith("-"))
        log = (self.folder / "logs" / f"{name}.txt").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "app", *command],
            env=self.environ(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        log.close()
        self.processes.append(process)
        return process

    def is_ready(self) -> bool:
        for process in self.processes:
            assert process.poll() is None, self.logs()
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text()[-4000:]}"
            for path in sorted((self.folder / "logs").iterdir())
        )

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=90.0,
        )

    def runners(self) -> list[int]:
        """Return pids of job processes."""
        return [
            pid
            for process in self.processes
            for pid, command in descendants(process.pid).items()
            if "worker.runner" in command
        ]

    def workers(self, queue: str) -> list[int]:
        """Return pids of worker processes of a queue."""
        candidates = {p.pid: " ".join(map(str, p.args)) for p in self.processes}
        for process in self.processes:
            candidates.update(descendants(process.pid))
        return [
            pid
            for pid, command in candidates.items()
            if f"--queue {queue}" in command and "runner" not in command
        ]


def upload(client: httpx.Client, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        answer = client.post(
            "/v1/datasets", files={"file": (path.name, file)}, headers={"Prefer": "wait=60"}
        )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def finished_job(service: Service, job_id: str, *, timeout_s: float = 240.0) -> dict[str, Any]:
    """Poll a job until it has ended."""
    with service.client() as client:

        def ended() -> dict[str, Any] | None:
            job = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        return dict(wait_for(f"job {job_id} to end", ended, timeout_s=timeout_s))
