"""The supervisor of `kdpo serve` with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app import embedded
from app.embedded import Supervisor, worker_command, worker_commands
from core.queue import QueueName

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable, "-c",
    "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True)\ntime.sleep(60)",
]  # fmt: skip
READS_PIPE = [sys.executable, "-c", "import sys; sys.stdin.read(); print('parent gone')"]


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_dead_process_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(embedded, "POLL_S", 0.02)
    supervisor = Supervisor({"a": SLEEP, "b": SLEEP})
    supervisor.start()
    try:
        first = supervisor.pids()
        assert set(first) == {"a", "b"}
        os.kill(first["a"], signal.SIGKILL)
        until(lambda: supervisor.pids().get("a", first["a"]) != first["a"])
        assert supervisor.pids()["b"] == first["b"]
    finally:
        supervisor.stop(grace_s=5)
    for pid in (*first.values(), *supervisor.pids().values()):
        assert not is_alive(pid)


def test_process_that_always_dies_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "POLL_S", 0.01)
    supervisor = Supervisor({"a": [sys.executable, "-c", "raise SystemExit(3)"]})
    supervisor.start()
    try:
        child = supervisor._children[0]
        until(lambda: child.delay_s == 2 * embedded.FIRST_DELAY_S)
        assert child.process is None
    finally:
        supervisor.stop(grace_s=1)


def test_stubborn_process_is_killed() -> None:
    supervisor = Supervisor({"a": STUBBORN})
    supervisor.start()
    pid = supervisor.pids()["a"]
    time.sleep(0.5)
    supervisor.stop(grace_s=0.2)
    assert not is_alive(pid)


def test_pipe_breaks_with_the_parent() -> None:
    code = (
        "import sys, os\nfrom app.embedded import Supervisor\n"
        f"s = Supervisor({{'a': {READS_PIPE!r}}})\ns.start()\nprint(s.pids()['a'], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )

    parent = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert parent.returncode == -signal.SIGKILL
    # The run waits for the end of the grandchild's output, so it has ended by now.
    assert parent.stdout.splitlines()[1] == "parent gone"


def test_one_worker_for_each_queue() -> None:
    commands = worker_commands()
    assert [list(c[1:]) for c in commands.values()] == [
        ["-P", "-m", "worker.main", "--queue", "cpu", "--parent-pipe"],
        ["-P", "-m", "worker.main", "--queue", "gpu", "--parent-pipe"],
    ]


def test_worker_serves_several_queues() -> None:
    command = worker_command(QueueName.CPU, QueueName.GPU, parent_pipe=False)
    assert command[-4:] == ["--queue", "cpu", "--queue", "gpu"]


def test_worker_does_not_import_from_the_folder_it_is_called_in(tmp_path: Path) -> None:
    for package in ("core", "worker"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('poison')\n")
    # An unknown queue: the command line is read after all imports, and the worker ends there.
    command = [*worker_command(QueueName.CPU, parent_pipe=False), "--queue", "none"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "poison" not in ended.stderr
    assert "invalid choice: 'none'" in ended.stderr
