"""Pauses and forced cancels reach the process of a job, through the real supervisor."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.lifecycle import AttemptOutcome, JobStatus
from core.queue import QueueName
from models.repositories.jobs import Fence, JobRepository
from tests.integration.live_world import until
from tests.integration.workers import Stack, pairs, run_stack
from worker.process import RunnerProcess, start_runner
from worker.supervisor import Supervisor

GRACE_S = 60.0


@pytest.fixture
def stack(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setenv("KDPO_WORKER__KILL_GRACE_S", str(GRACE_S))
    with run_stack(tmp_path, database=sqlite_url, broker=None) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@contextmanager
def supervised(stack: Stack) -> Iterator[None]:
    supervisor = Supervisor(stack.settings, stack.database, worker_id="wrk_test")
    thread = threading.Thread(target=supervisor.drain, args=(QueueName.CPU,))
    thread.start()
    try:
        yield
    finally:
        thread.join(GRACE_S)
        assert not thread.is_alive()


def ask(stack: Stack, job_id: str, what: str, **options: Any) -> None:
    with stack.database.transaction() as session:
        jobs = JobRepository(session)
        owner = stack.job(job_id).owner_id
        job = jobs.lock(owner, job_id)
        match what:
            case "pause":
                jobs.request_pause(job)
            case "resume":
                jobs.resume(job)
            case "cancel":
                jobs.request_cancel(owner, job_id, options=options)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stop each process as it begins, so that it neither ends nor hears SIGTERM."""
    pids: list[int] = []

    def start(fence: Fence, folder: Path) -> RunnerProcess:
        process = start_runner(fence, folder)
        os.kill(process.pid, signal.SIGSTOP)
        pids.append(process.pid)
        return process

    monkeypatch.setattr("worker.supervisor.start_runner", start)
    return pids


def test_a_paused_job_goes_on_in_another_attempt(
    stack: Stack, stopped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = stack.submit(pairs(20))
    with supervised(stack):
        until(lambda: stopped)
        ask(stack, job_id, "pause")
        time.sleep(2 * stack.settings.worker.heartbeat_s)
        os.kill(stopped[0], signal.SIGCONT)
    assert stack.job(job_id).status is JobStatus.PAUSED
    assert stack.outcomes(job_id) == [AttemptOutcome.PAUSED]
    monkeypatch.setattr("worker.supervisor.start_runner", start_runner)
    ask(stack, job_id, "resume")
    with supervised(stack):
        pass
    assert stack.job(job_id).status is JobStatus.SUCCEEDED
    assert stack.outcomes(job_id) == [AttemptOutcome.PAUSED, AttemptOutcome.SUCCEEDED]
    stack.assert_one_story(job_id)


def test_a_forced_cancel_does_not_wait_for_the_process(stack: Stack, stopped: list[int]) -> None:
    job_id = stack.submit(pairs(20))
    with supervised(stack):
        until(lambda: stopped)
        began = time.monotonic()
        ask(stack, job_id, "cancel", mode="force", keep_checkpoints=True)
    assert time.monotonic() - began < GRACE_S / 2
    assert stack.job(job_id).status is JobStatus.CANCELLED
    assert stack.outcomes(job_id) == [AttemptOutcome.CANCELLED]
    stack.assert_one_story(job_id)
