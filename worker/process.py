"""The process of one attempt: its own session, a pipe that kills it when we die, and its log."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from core.logs import scrub
from models.repositories.jobs import Fence
from worker.outcome import LOG_NAME, OUTCOME_NAME

LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 32 * 1024
_LOG_TAIL_LINE_CHARACTERS = 1000


class RunnerProcess:
    """A running `worker.runner`; `close` leaves no process of its group behind.

    The thread that starts it must not end before it: the kernel would end it with that thread.
    """

    def __init__(self, *arguments: str, output: IO[bytes] | None = None) -> None:
        """Start the process; without `output` it writes where this one does.

        Raises:
            OSError: the process cannot be made.
        """
        self.channel, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        # -P: the folder that the worker runs in must not be searched for modules.
                        *(sys.executable, "-P", "-m", "worker.runner"),
                        *("--parent", str(os.getpid()), *arguments),
                    ],
                    stdin=theirs.fileno(),
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    start_new_session=True,
                    env=runner_environment(),
                )
        except OSError:
            self.channel.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group and session too."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self) -> None:
        """Ask it to save and leave."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it started, now."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End what is left of its group and release the pipe."""
        self.kill()
        self._process.wait()
        self.channel.close()

    def _signal(self, number: signal.Signals) -> None:
        # The group outlives its leader when the leader left children; macOS answers EPERM for
        # a group of zombies.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def start_runner(fence: Fence, folder: Path) -> RunnerProcess:
    """Start a fresh process for an attempt.

    Raises:
        OSError: its folder or the process cannot be made.
    """
    make_folder(folder)
    with (folder / LOG_NAME).open("ab") as log:
        return RunnerProcess("--job", fence.job_id, "--attempt", str(fence.attempt), output=log)


def make_folder(folder: Path) -> None:
    """Make the folder of an attempt with an empty log and without an outcome.

    Raises:
        OSError: there is no room, or no right to.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / OUTCOME_NAME).unlink(missing_ok=True)
    (folder / LOG_NAME).touch()


def runner_environment() -> dict[str, str]:
    """Return the variables that a runner gets if it starts now."""
    # Threads that spin while they wait make a step 10 to 25 times slower as soon as anything else
    # wants a core.
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def read_log_tail(folder: Path) -> list[str]:
    """Return the last lines of an attempt's log without secrets."""
    with (folder / LOG_NAME).open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
        # Postgres stores no NUL, neither in text nor in JSON.
        text = log.read().decode(errors="replace").replace("\0", "")
    lines = scrub(text).splitlines()[-LOG_TAIL_LINES:]
    return [line[:_LOG_TAIL_LINE_CHARACTERS] for line in lines]
