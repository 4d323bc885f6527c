"""What a job function gets: its row, its folders, its fence, and ways to report and to stop."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from core.errors import CancelRequested, KdpoError
from core.lifecycle import Attention, EventType, Phase, StepStatus
from core.search_files import trials_folder
from core.settings import Settings
from models.job import Job
from models.repositories.events import append_event
from models.repositories.jobs import Fence, JobRepository
from models.repositories.steps import StepRepository
from models.session import Database


class Preempted(KdpoError):
    """The worker is shutting down: save, leave, and let another attempt go on."""

    default_code = "preempted"


@dataclass
class JobContext:
    """One attempt at one job; every write carries its fence."""

    settings: Settings
    database: Database
    fence: Fence
    job: Job
    stop: threading.Event = field(default_factory=threading.Event)
    _cancelled: bool = False
    _reported_at: float = float("-inf")
    _rate_from: tuple[str, float, int] | None = None

    @property
    def home_id(self) -> str:
        """The job whose runs these are: this one, or the one that it helps."""
        return self.job.parent_id or self.fence.job_id

    @property
    def job_dir(self) -> Path:
        """Folder of the job, shared by its attempts."""
        return self.settings.artifact_dir / "jobs" / self.fence.job_id

    @property
    def trials_dir(self) -> Path:
        """Folder of a search's trials, shared by all attempts at its job and by its helpers."""
        return trials_folder(self.settings.artifact_dir, self.home_id)

    @property
    def attempt_dir(self) -> Path:
        """Folder that only this attempt writes to."""
        return self.job_dir / f"a{self.fence.attempt}"

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Give a transaction; repositories check the fence in it."""
        with self.database.transaction() as session:
            yield session

    def phase(self, phase: Phase) -> None:
        """Say what the job is doing now."""
        with self.transaction() as session:
            JobRepository(session).set_phase(self.fence, phase)
        self.job.phase = phase

    def warn(self, message: str, **data: Any) -> None:
        """Add a warning to the job's events."""
        with self.transaction() as session:
            JobRepository(session).guard(self.fence)
            append_event(
                session, self.fence.job_id, EventType.JOB_WARNING, message, level="warn", data=data
            )

    def attention(self, flag: Attention, message: str) -> None:
        """Raise a flag that people should look at."""
        with self.transaction() as session:
            JobRepository(session).add_attention(self.fence, flag.value)
        self.warn(message, attention=flag.value)

    def progress(
        self,
        *,
        unit: str,
        done: int,
        total: int,
        overall: float | None = None,
        eta: tuple[float, float] | None = None,
    ) -> None:
        """Report progress of the present part, at most once in `progress_every_s`.

        `overall` is the fraction of the whole job that is done; the rate and ETA are of the
        present part, measured since this attempt began it, unless `eta` (P50, P90) is known better.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        now = time.monotonic()
        if self._rate_from is None or self._rate_from[0] != unit or done < self._rate_from[2]:
            self._rate_from = (unit, now, done)
        if now - self._reported_at < self.settings.training.progress_every_s and done < total:
            return
        self._reported_at = now
        _, since, first = self._rate_from
        rate = (done - first) / (now - since) if now > since and done > first else None
        if eta is None and rate is not None:
            eta = ((total - done) / rate, 1.25 * (total - done) / rate)
        report = {
            "fraction": round(done / total if overall is None else overall, 4) if total else 0.0,
            "unit": unit,
            "done": done,
            "total": total,
            "rate": rate,
            "eta_seconds": None if eta is None else eta[0],
            "eta_low": None if eta is None else 0.9 * eta[0],
            "eta_high": None if eta is None else eta[1],
            "basis": "prior" if eta is None else "measured",
        }
        with self.transaction() as session:
            beat = JobRepository(session).set_progress(self.fence, report)
        self._cancelled = self._cancelled or beat.cancel_requested

    def stopping(self) -> bool:
        """Whether the attempt must stop at the next step boundary."""
        return self.stop.is_set() or self._cancelled

    def raise_if_stopped(self) -> None:
        """End the attempt at a step boundary when asked to.

        Raises:
            CancelRequested: the user cancelled the job.
            Preempted: the worker is shutting down.
        """
        if self._cancelled:
            raise CancelRequested(f"job {self.fence.job_id} was cancelled")
        if self.stop.is_set():
            raise Preempted("the worker is shutting down")

    def plan(self, names: list[str]) -> None:
        """Write down the steps of the job once."""
        with self.transaction() as session:
            StepRepository(session).plan(self.fence, names)

    def step_result(self, name: str) -> dict[str, Any] | None:
        """Return the result of a step that some attempt has finished."""
        with self.database.reading() as session:
            for step in StepRepository(session).of_job(self.fence.job_id):
                if step.name == name and step.status is StepStatus.SUCCEEDED:
                    return step.result or {}
        return None

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a step; what the block puts into the dict is its result, kept for later attempts."""
        with self.transaction() as session:
            StepRepository(session).start(self.fence, name)
        result: dict[str, Any] = {}
        yield result
        with self.transaction() as session:
            StepRepository(session).succeed(self.fence, name, result)
