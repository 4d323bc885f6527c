"""The supervisor in this process, its runner in another, and COMMITs whose fate is unknown."""

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import Session

from core.errors import Unavailable
from core.lifecycle import AttemptOutcome, JobStatus
from core.queue import QueueName
from models.session import Database
from tests.integration.workers import Stack, pairs, run_stack
from worker.supervisor import Supervisor

# This thread claims (1), then writes the end of the attempt (2); heartbeats have their own thread.
FINISH = 2


class FaultyDatabase(Database):
    """Raises once around the COMMIT that ends the first attempt."""

    def __init__(self, url: str, *, before: Exception | None, after: Exception | None) -> None:
        super().__init__(url, pool_size=3)
        self._before, self._after = before, after
        self._thread = threading.current_thread()
        self._count = 0

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        is_finish = False
        if threading.current_thread() is self._thread:
            self._count += 1
            is_finish = self._count == FINISH
        with super().transaction() as session:
            yield session
            if is_finish and self._before is not None:
                raise self._before
        if is_finish and self._after is not None:
            raise self._after


@pytest.fixture
def stack(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    with run_stack(tmp_path, database=sqlite_url, broker=None) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def drain(stack: Stack, *, before: Exception | None = None, after: Exception | None = None) -> str:
    """Submit a job, run it with a faulty database, return its id."""
    job_id = stack.submit(pairs(20))
    database = FaultyDatabase(stack.settings.database_url, before=before, after=after)
    try:
        Supervisor(stack.settings, database, worker_id="wrk_test").drain(QueueName.CPU)
    finally:
        database.dispose()
    return job_id


def test_commit_that_did_not_happen_is_repeated(stack: Stack) -> None:
    job_id = drain(stack, before=Unavailable("reset before COMMIT"))
    assert stack.job(job_id).status is JobStatus.SUCCEEDED
    assert stack.outcomes(job_id) == [AttemptOutcome.SUCCEEDED]
    stack.assert_one_story(job_id)


def test_commit_that_happened_is_not_repeated(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kdpo.supervisor"):
        job_id = drain(stack, after=Unavailable("reset after COMMIT"))
    assert stack.job(job_id).status is JobStatus.SUCCEEDED
    assert "already recorded as succeeded" in caplog.text
    stack.assert_one_story(job_id)


def test_outcome_that_cannot_be_stored_fails_the_job(stack: Stack) -> None:
    job_id = drain(stack, before=DataError("INSERT", {}, ValueError("a NUL in a text")))
    job = stack.job(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "internal"
    assert "could not be stored" in job.error["message"]
    stack.assert_one_story(job_id)


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("COMMIT", {}, Exception("failed to resolve host 'db'")),
        RuntimeError("something that nobody has thought of"),
    ],
)
def test_outcome_survives_an_unknown_error_of_the_database(stack: Stack, error: Exception) -> None:
    job_id = drain(stack, before=error)
    assert stack.job(job_id).status is JobStatus.SUCCEEDED
    assert stack.outcomes(job_id) == [AttemptOutcome.SUCCEEDED]
    stack.assert_one_story(job_id)


def test_runner_that_cannot_start_is_retried_then_failed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    job_id = drain(stack)
    job = stack.job(job_id)
    assert (job.status, job.attempt, job.failures) == (JobStatus.QUEUED, 1, 1)
    assert stack.outcomes(job_id) == [AttemptOutcome.RETRY]


def test_runner_that_finds_no_room_to_start_pauses_its_job(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("worker.process.subprocess.Popen", full)
        job_id = drain(stack)
    job = stack.job(job_id)
    assert (job.status, job.failures, job.losses) == (JobStatus.PAUSED, 0, 0)
    assert stack.outcomes(job_id) == [AttemptOutcome.PAUSED]
    assert job.error is not None
    assert "could not be started: No space left on device" in job.error["message"]


def test_draining_supervisor_claims_nothing(stack: Stack) -> None:
    job_id = stack.submit(pairs(20))
    supervisor = Supervisor(stack.settings, stack.database, worker_id="wrk_test")
    supervisor.stop()
    supervisor.drain(QueueName.CPU)
    assert stack.job(job_id).attempt == 0


def test_database_that_is_away_does_not_end_the_worker(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    try:
        Supervisor(stack.settings, database, worker_id="wrk_test").drain(QueueName.CPU)
    finally:
        database.dispose()
    assert "left for later" in caplog.text


def test_runner_does_not_import_from_the_folder_of_the_worker(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("core", "worker"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('poison')\n")
    monkeypatch.chdir(tmp_path)
    job_id = drain(stack)
    assert stack.job(job_id).status is JobStatus.SUCCEEDED, stack.logs()
