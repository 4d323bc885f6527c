"""Worker processes of `kdpo serve`: started, restarted when they die, stopped with the server."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.queue import QueueName

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0
# A worker that ran for so long has started well; its next death is a new story.
HEALTHY_S = 60.0
POLL_S = 0.2

_log = logging.getLogger("kdpo.serve")


@dataclass
class _Child:
    """One process that shall run, and when it may start next."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    delay_s: float = FIRST_DELAY_S


@dataclass
class Supervisor:
    """Keeps one process for each command alive.

    Each child gets a pipe as its standard input. The pipe breaks when this process dies, however
    it dies, and a worker started with `--parent-pipe` leaves then.
    """

    commands: dict[str, Sequence[str]]
    _stop: threading.Event = field(default_factory=threading.Event)
    _children: list[_Child] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start all processes and watch them."""
        self._children = [_Child(name, command) for name, command in self.commands.items()]
        for child in self._children:
            self._start(child)
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self, *, grace_s: float) -> None:
        """Ask all processes to leave, and kill those that have not within `grace_s`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        running = [c.process for c in self._children if c.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + grace_s
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def pids(self) -> dict[str, int]:
        """Return the process ids by name."""
        return {c.name: c.process.pid for c in self._children if c.process is not None}

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            for child in self._children:
                if child.process is not None and child.process.poll() is not None:
                    self._note_death(child, child.process)
                elif child.process is None and time.monotonic() >= child.start_at:
                    self._start(child)

    def _start(self, child: _Child) -> None:
        child.process = subprocess.Popen(
            child.command, stdin=subprocess.PIPE, start_new_session=True
        )
        child.started_at = time.monotonic()

    def _note_death(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        now = time.monotonic()
        if now - child.started_at >= HEALTHY_S:
            child.delay_s = FIRST_DELAY_S
        _log.error(
            "%s ended with code %d; it starts again in %.0f s",
            child.name, process.returncode, child.delay_s,
        )  # fmt: skip
        if process.stdin is not None:
            process.stdin.close()
        child.process = None
        child.start_at = now + child.delay_s
        child.delay_s = min(2 * child.delay_s, MAX_DELAY_S)


def worker_commands() -> dict[str, Sequence[str]]:
    """Return the command of one worker for each queue."""
    return {f"{queue.value} worker": worker_command(queue, parent_pipe=True) for queue in QueueName}


def worker_command(*queues: QueueName, parent_pipe: bool) -> list[str]:
    """Return the command that runs one worker of the queues."""
    # -P: the folder that kdpo is called from must not be searched for modules.
    command = [sys.executable, "-P", "-m", "worker.main"]
    for queue in queues:
        command += ["--queue", queue.value]
    return [*command, "--parent-pipe"] if parent_pipe else command
