"""Runs the jobs of a queue, each attempt in a process of its own, and writes down how it ended.

The terminal state is written here and never by the job's process (design: RELIABILITY 7.3).
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never

from core.clock import Clock, SystemClock
from core.errors import FailureCode, LeaseLost, StorageFull, Unavailable
from core.lifecycle import AttemptOutcome, JobStatus
from core.queue import QUEUE_OF_KIND, QueueName
from core.settings import Settings
from models.repositories.jobs import Claim, Fence, JobRepository
from models.session import Database, is_value_refused
from worker.ingest.files import full_disk_reason
from worker.outcome import (
    Cancelled,
    DiskFull,
    ExitCode,
    Failed,
    JobFailure,
    Outcome,
    Preempted,
    Succeeded,
    disk_full,
    read_outcome,
)
from worker.process import RunnerProcess, read_log_tail, start_runner
from worker.spare import ANSWER_S, SpareRunner

_log = logging.getLogger("kdpo.supervisor")

_TICK_S = 0.1
_RETRY_S = 1.0
_MODEL_QUEUE = QueueName.GPU


@dataclass(frozen=True)
class _Ended:
    """How a process ended; `asked` when we wanted it to, by signal."""

    exit_code: int
    asked: bool


class Heartbeat(threading.Thread):
    """Renews the lease of one attempt; a database that hangs hangs this thread only."""

    def __init__(
        self, database: Database, fence: Fence, settings: Settings, *, clock: Clock, since: float
    ) -> None:
        super().__init__(name=f"heartbeat-{fence.job_id}", daemon=True)
        self.lost = False
        self.cancel_requested = self.cancel_forced = self.pause_requested = False
        self.last_success = since
        self._database = database
        self._fence = fence
        self._limits = settings.worker
        self._clock = clock
        self._stopped = threading.Event()

    def run(self) -> None:
        pause_s = self._limits.heartbeat_s
        while not self._stopped.wait(pause_s):
            begun = self._clock.monotonic()
            try:
                with self._database.transaction() as session:
                    beat = JobRepository(session).heartbeat(
                        self._fence, lease_s=self._limits.lease_s
                    )
            except LeaseLost:
                self.lost = True
                return
            except Exception as error:
                # Whatever it is, the attempt ends by self-fencing when it does not pass.
                _log.warning("heartbeat of job %s failed: %s", self._fence.job_id, error)
                pause_s = min(self._limits.heartbeat_s, _RETRY_S)
                continue
            self.last_success = begun
            self.cancel_requested = beat.cancel_requested
            self.cancel_forced = beat.cancel_forced
            self.pause_requested = beat.pause_requested
            pause_s = self._limits.heartbeat_s

    @property
    def must_stop(self) -> bool:
        """Whether a person wants the attempt to end."""
        return self.cancel_requested or self.pause_requested

    def stop(self) -> None:
        self._stopped.set()


class Supervisor:
    """Claims jobs one after the other; runs in the thread that handles the wake-up."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        *,
        worker_id: str,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._limits = settings.worker
        self._database = database
        self._worker_id = worker_id
        self._clock = clock or SystemClock()
        self._spare = (
            SpareRunner(answer_s=min(ANSWER_S, self._limits.heartbeat_s))
            if self._limits.spare_runner
            else None
        )
        self._draining = False
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether it works on a queue now."""
        return self._busy

    @property
    def draining(self) -> bool:
        """Whether it was told to stop."""
        return self._draining

    def stop(self) -> None:
        """Take no further job and preempt the present one; safe to call from a signal handler."""
        # A plain flag: an Event's lock could be held by the very thread the signal interrupts.
        self._draining = True

    def drain(self, queue: QueueName) -> None:
        """Run due jobs of a queue until there is none or the worker stops.

        While there is none, a spare runner is kept for the next one that runs models.
        """
        self._busy = True
        try:
            while not self._draining:
                claimed_at = self._clock.monotonic()
                with self._database.transaction() as session:
                    claim = JobRepository(session).claim(
                        queue,
                        worker_id=self._worker_id,
                        lease_s=self._limits.lease_s,
                        quarantine_s=self._limits.quarantine_s,
                    )
                if claim is None:
                    if self._spare is not None and queue is _MODEL_QUEUE:
                        self._spare.prepare()
                    return
                self._run(claim, claimed_at)
        except (Unavailable, StorageFull) as error:
            _log.warning("queue %s is left for later: %s", queue.value, error.message)
        finally:
            self._busy = False

    def close(self) -> None:
        """Leave no process behind; the last call."""
        if self._spare is not None:
            self._spare.close()

    # ----------------------------------------------------------- one attempt

    def _run(self, claim: Claim, claimed_at: float) -> None:
        fence = claim.fence
        folder = self._folder(fence)
        _log.info("job %s: attempt %d of kind %s", fence.job_id, fence.attempt, claim.kind.value)
        heartbeat = Heartbeat(
            self._database, fence, self._settings, clock=self._clock, since=claimed_at
        )
        heartbeat.start()
        try:
            try:
                process = self._process(claim, folder)
            except OSError as error:
                self._store(fence, self._not_started(fence, error))
                return
            try:
                ended = self._watch(fence, process, heartbeat)
            finally:
                process.close()
        finally:
            heartbeat.stop()
        if ended is not None:
            self._report(fence, folder, ended)

    def _process(self, claim: Claim, folder: Path) -> RunnerProcess:
        if self._spare is not None and QUEUE_OF_KIND[claim.kind] is _MODEL_QUEUE:
            given = self._spare.hand_over(claim.fence, folder)
            if given is not None:
                return given
        return start_runner(claim.fence, folder)

    def _folder(self, fence: Fence) -> Path:
        return self._settings.artifact_dir / "jobs" / fence.job_id / f"a{fence.attempt}"

    def _watch(self, fence: Fence, process: RunnerProcess, heartbeat: Heartbeat) -> _Ended | None:
        """Wait for the process; None when the job is no longer ours to report on."""
        kill_at: float | None = None
        while True:
            exit_code = process.wait(_TICK_S)
            now = self._clock.monotonic()
            if exit_code is not None:
                return _Ended(exit_code, asked=kill_at is not None)
            if heartbeat.lost:
                _log.warning("job %s: attempt %d lost its lease", fence.job_id, fence.attempt)
                return None
            if now - heartbeat.last_success > self._limits.self_fence_s:
                _log.error(
                    "job %s: no heartbeat for %.0f s; attempt %d is killed before its lease ends",
                    fence.job_id, now - heartbeat.last_success, fence.attempt,
                )  # fmt: skip
                return None
            if kill_at is None:
                if heartbeat.must_stop or self._draining:
                    process.ask_to_stop()
                    kill_at = now + self._limits.kill_grace_s
            elif now > kill_at or heartbeat.cancel_forced:
                process.kill()

    # -------------------------------------------------------- how it ended

    def _report(self, fence: Fence, folder: Path, ended: _Ended) -> None:
        outcome, log_tail = read_outcome(folder), read_log_tail(folder)
        if outcome is None and ended.exit_code == ExitCode.DISK_FULL:
            outcome = self._no_room(fence, "how the attempt ended could not be written")
        _log.info(
            "job %s: attempt %d ended with code %d, %s",
            fence.job_id, fence.attempt, ended.exit_code,
            "no outcome" if outcome is None else outcome.status,
        )  # fmt: skip

        def write(jobs: JobRepository) -> None:
            if outcome is None:
                self._write_silent_end(jobs, fence, ended, log_tail)
            else:
                self._write_outcome(jobs, fence, outcome, ended.exit_code, log_tail)

        self._store(fence, write)

    def _write_outcome(
        self,
        jobs: JobRepository,
        fence: Fence,
        outcome: Outcome,
        exit_code: int,
        log_tail: list[str],
    ) -> None:
        match outcome:
            case Succeeded(result=result):
                jobs.finish(
                    fence, JobStatus.SUCCEEDED, result=result, exit_code=exit_code,
                    message="The job has succeeded.",
                )  # fmt: skip
            case Failed(error=error):
                complete = error.model_copy(update={"log_tail": log_tail})
                self._fail(jobs, fence, complete, exit_code=exit_code)
            case Cancelled():
                jobs.finish(
                    fence, JobStatus.CANCELLED, exit_code=exit_code,
                    message="The job was cancelled.",
                )  # fmt: skip
            case Preempted():
                self._requeue(jobs, fence, exit_code)
            case DiskFull():
                self._pause(jobs, fence, outcome, exit_code=exit_code, log_tail=log_tail)
            case _:
                assert_never(outcome)

    def _write_silent_end(
        self, jobs: JobRepository, fence: Fence, ended: _Ended, log_tail: list[str]
    ) -> None:
        if ended.asked:
            self._requeue(jobs, fence, ended.exit_code)
            return
        jobs.lose(
            fence,
            message=f"its process ended with code {ended.exit_code} without an outcome",
            log_tail=log_tail,
            max_losses=self._limits.max_losses,
            backoff_s=self._limits.backoff_s,
            exit_code=ended.exit_code,
        )

    def _requeue(self, jobs: JobRepository, fence: Fence, exit_code: int) -> None:
        jobs.requeue(
            fence, AttemptOutcome.PREEMPTED, delay_s=0.0, exit_code=exit_code,
            message=f"Attempt {fence.attempt} made room for a shutdown; the job is queued again.",
        )  # fmt: skip

    def _fail(
        self,
        jobs: JobRepository,
        fence: Fence,
        error: JobFailure,
        *,
        exit_code: int | None = None,
    ) -> None:
        jobs.fail(
            fence, error.model_dump(mode="json"), max_retries=self._limits.max_retries,
            backoff_s=self._limits.backoff_s, exit_code=exit_code,
        )  # fmt: skip

    def _pause(
        self,
        jobs: JobRepository,
        fence: Fence,
        outcome: DiskFull,
        *,
        exit_code: int | None = None,
        log_tail: Sequence[str] = (),
    ) -> None:
        complete = outcome.error.model_copy(update={"log_tail": list(log_tail)})
        jobs.pause(
            fence, complete.model_dump(mode="json"), exit_code=exit_code,
            data={"folder": outcome.folder, "free_bytes": outcome.free_bytes},
        )  # fmt: skip

    def _no_room(self, fence: Fence, reason: str) -> DiskFull:
        return disk_full(self._settings.root, reason, job_id=fence.job_id, attempt=fence.attempt)

    def _not_started(self, fence: Fence, error: OSError) -> Callable[[JobRepository], None]:
        """Return how to write down that there was no process."""
        message = f"the process of the job could not be started: {error.strerror}"
        if full_disk_reason(error) is not None:
            no_room = self._no_room(fence, message)
            return lambda jobs: self._pause(jobs, fence, no_room)
        failure = _failure(fence, FailureCode.INTERNAL, message, retryable=True)
        return lambda jobs: self._fail(jobs, fence, failure)

    def _store(self, fence: Fence, write: Callable[[JobRepository], Any]) -> None:
        """Write the end of an attempt, through outages of the database and unknown COMMITs."""
        give_up_at: float | None = None
        while True:
            try:
                self._write_or_learn(fence, write)
                return
            except (Unavailable, StorageFull) as error:
                _log.warning("job %s: its end waits: %s", fence.job_id, error.message)
            except Exception as error:
                # Anything but a refused value is tried again: a job that has succeeded must not
                # fail because of the database. When it never passes, the lease runs out.
                _log.exception("job %s: its end cannot be stored", fence.job_id)
                if is_value_refused(error):
                    message = "the outcome of the job could not be stored"
                    failure = _failure(fence, FailureCode.INTERNAL, message)
                    write = partial(self._fail, fence=fence, error=failure)
            now = self._clock.monotonic()
            if self._draining and give_up_at is None:
                give_up_at = now + self._limits.kill_grace_s
            if give_up_at is not None and now > give_up_at:
                _log.error("job %s: stopping; its lease will expire", fence.job_id)
                return
            self._clock.sleep(_RETRY_S)

    def _write_or_learn(self, fence: Fence, write: Callable[[JobRepository], Any]) -> None:
        try:
            with self._database.transaction() as session:
                write(JobRepository(session))
        except LeaseLost:
            # Either an earlier COMMIT of ours took effect although it raised, or another attempt
            # owns the job and ours does not count. Both are final.
            with self._database.reading() as session:
                recorded = JobRepository(session).attempt_outcome(fence)
            _log.warning(
                "job %s: attempt %d is already recorded as %s",
                fence.job_id, fence.attempt, "open" if recorded is None else recorded.value,
            )  # fmt: skip


def _failure(
    fence: Fence, code: FailureCode, message: str, *, retryable: bool = False
) -> JobFailure:
    return JobFailure(
        code=code, message=message, hint="read the log of the worker", retryable=retryable,
        phase=None, attempt=fence.attempt, errors=[],
    )  # fmt: skip
