"""The worker's side of a spare runner: a process that has imported torch before there is a job.

A worker keeps at most one, only while it has nothing to do, and gives it one attempt. What is wrong
with a spare costs the start of a fresh process and never the attempt.
"""

import logging
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from models.repositories.jobs import Fence
from worker.outcome import LOG_NAME
from worker.parent import GO, TAKEN, Assignment
from worker.process import RunnerProcess, make_folder, runner_environment

_log = logging.getLogger("kdpo.spare")

# It answers from a thread of its own, also while it imports: within milliseconds, unless it was
# started just now or the machine has no time for it.
ANSWER_S = 10.0
_PACKAGES = ("core", "models", "objectives", "selection", "worker")


@dataclass(frozen=True)
class _Origin:
    """What a fresh process would be made of: its variables, our files, the installed packages."""

    environment: dict[str, str]
    changed_at: dict[Path, int]

    @classmethod
    def now(cls) -> Self:
        root = Path(__file__).parents[1]
        paths = [file for package in _PACKAGES for file in (root / package).rglob("*.py")]
        # Installing or removing a package changes the folder that it lies in.
        paths += [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
        return cls(runner_environment(), {path: _changed_at(path) for path in paths})


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # gone since it was listed
        return 0


class SpareRunner:
    """The spare of one worker. All is called in the thread that lives as long as the worker."""

    def __init__(self, *, answer_s: float = ANSWER_S) -> None:
        self._answer_s = answer_s
        self._kept: tuple[RunnerProcess, _Origin] | None = None

    def prepare(self) -> None:
        """Start a spare unless there is one that can be used."""
        origin = _Origin.now()
        if self._kept is not None and self._is_usable(*self._kept, origin):
            return
        self.close()
        try:
            self._kept = RunnerProcess("--spare"), origin
        except OSError as error:
            _log.warning("no spare runner is kept: %s", error)

    def hand_over(self, fence: Fence, folder: Path) -> RunnerProcess | None:
        """Give the spare an attempt; None when a fresh process is needed. It is used up either way.

        Raises:
            OSError: the folder of the attempt cannot be made.
        """
        if self._kept is None:
            return None
        make_folder(folder)
        (process, origin), self._kept = self._kept, None
        if not self._is_usable(process, origin, _Origin.now()) or not self._give(
            process, Assignment(job_id=fence.job_id, attempt=fence.attempt, log=folder / LOG_NAME)
        ):
            process.close()
            return None
        _log.info("job %s is given to the spare runner, process %d", fence.job_id, process.pid)
        return process

    def close(self) -> None:
        """End the spare, if there is one."""
        if self._kept is not None:
            self._kept[0].close()
            self._kept = None

    def _is_usable(self, process: RunnerProcess, origin: _Origin, now: _Origin) -> bool:
        exit_code = process.wait(0)
        if exit_code is not None:
            _log.warning("the spare runner has ended with code %d", exit_code)
        elif origin != now:
            _log.info("the spare runner is older than the code or the variables of today")
        return exit_code is None and origin == now

    def _give(self, process: RunnerProcess, assignment: Assignment) -> bool:
        process.channel.settimeout(self._answer_s)
        try:
            process.channel.sendall(assignment.line())
            if process.channel.recv(len(TAKEN)) != TAKEN:
                _log.warning("the spare runner does not take job %s", assignment.job_id)
                return False
            process.channel.sendall(GO)
        except OSError as error:
            _log.warning("the spare runner does not answer: %s", error)
            return False
        return True
