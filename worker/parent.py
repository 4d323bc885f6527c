"""The runner's side of its worker: dies with it, and a spare learns from it which job is its own.

Standard input is a socket to the worker. A spare reads one line with its job, answers `TAKEN` as
soon as all it says goes to the log of the attempt, and begins when it reads `GO`: a worker that has
lost patience kills it instead, and knows that it has done nothing.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

from pydantic import BaseModel, ConfigDict

from models.repositories.jobs import Fence

TAKEN = b"taken\n"
GO = b"go\n"

_PR_SET_PDEATHSIG = 1
_log = logging.getLogger("kdpo.runner")


class Assignment(BaseModel):
    """What a spare is told: its job, and the file that takes over its output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: str
    attempt: int
    log: Path

    def line(self) -> bytes:
        """As the worker sends it."""
        return self.model_dump_json().encode() + b"\n"


class Parent:
    """The worker that started this process, from this process's side."""

    def __init__(self, pid: int, stop: threading.Event) -> None:
        self._pid = pid
        self._stop = stop
        self._fences: SimpleQueue[Fence] = SimpleQueue()

    def follow(self, *, gives_a_job: bool) -> None:
        """End this process when the worker does, however that one ends."""
        threading.Thread(
            target=self._listen, args=(gives_a_job,), name="parent", daemon=True
        ).start()
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._pid:  # it died before the lines above
            _kill_group()

    def fence(self) -> Fence:
        """Wait for the job of a spare."""
        return self._fences.get()

    def _listen(self, gives_a_job: bool) -> None:
        try:
            # Without a buffer: its lock, held for ever here, would be in the way of an interpreter
            # that ends.
            with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as words:
                if gives_a_job:
                    fence = self._take(words)
                    if fence is None or words.readline() != GO:
                        return
                    self._fences.put(fence)
                words.read()
        except (OSError, ValueError) as error:
            _log.error("the worker cannot be heard: %s", error)
        finally:
            _kill_group()

    def _take(self, words: FileIO) -> Fence | None:
        """Read the job of a spare; None when the worker is gone or this process was told to end.

        Raises:
            ValueError: what came is no assignment.
            OSError: the log cannot be written, or the worker is gone.
        """
        line = words.readline()
        if not line or self._stop.is_set():
            return None
        given = Assignment.model_validate_json(line)
        log = os.open(given.log, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
        os.write(sys.stdin.fileno(), TAKEN)
        return Fence(given.job_id, given.attempt)


def _kill_group() -> None:
    """End this process and what it started; it leads a session of its own."""
    os.killpg(os.getpgid(0), signal.SIGKILL)
