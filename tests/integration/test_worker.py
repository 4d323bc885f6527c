"""The lease protocol with real processes, databases and brokers, and with parts of it killed."""

import io
import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
import redis
from pyarrow import parquet as pq
from sqlalchemy import delete, select, update

from core.lifecycle import AttemptOutcome, DatasetStatus, JobStatus
from core.queue import QueueName
from models.job import Job, Outbox, Worker
from models.outbox import relay_once
from tests.integration.workers import LEASE_S, Stack, is_alive, pairs, run_stack, wait_for

pytestmark = pytest.mark.timeout(120)

SMALL = pairs(40)
# Seconds of parsing: enough to be hit in the middle.
LARGE = pairs(20_000)

# What needs a database and a broker is much the same on both; `make soak` runs the embedded ones.
soaked_embedded = pytest.mark.parametrize(
    "stack",
    [pytest.param("sqlite+files", marks=pytest.mark.soak), "postgres+redis"],
    indirect=True,
)


def _params(request: pytest.FixtureRequest, kind: str) -> tuple[str, str | None]:
    if kind == "sqlite+files":
        return str(request.getfixturevalue("sqlite_url")), None
    return (
        str(request.getfixturevalue("postgres_url")),
        str(request.getfixturevalue("redis_url")),
    )


@pytest.fixture(params=["sqlite+files", "postgres+redis"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    database, broker = _params(request, request.param)
    with run_stack(tmp_path, database=database, broker=broker) as running:
        yield running


@pytest.fixture
def embedded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    database, broker = _params(request, "sqlite+files")
    with run_stack(tmp_path, database=database, broker=broker) as running:
        yield running


def wipe_broker(stack: Stack) -> None:
    if stack.settings.broker.url is None:
        shutil.rmtree(stack.settings.broker_dir)
        return
    client = redis.Redis.from_url(stack.settings.broker_url)
    client.flushall()
    client.close()


def test_upload_becomes_a_dataset(stack: Stack) -> None:
    job_id = stack.submit(SMALL)
    stack.start()
    job = stack.ended(job_id)
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    dataset = stack.dataset(job_id)
    assert dataset.status.is_usable
    assert dataset.failure is None
    assert dataset.counts == {"rows": 40, "rejected": 0, "pairs": 40, "prompts": 40}
    assert job.result == {
        "dataset_id": dataset.id, "status": dataset.status.value, "counts": dataset.counts,
    }  # fmt: skip
    folder = stack.settings.artifact_dir / "datasets" / dataset.id
    assert len((folder / "canonical.jsonl").read_bytes().splitlines()) == 40
    table = pq.read_table(folder / "canonical.parquet")
    assert table.column("id").to_pylist() == [
        orjson.loads(line)["id"] for line in (folder / "canonical.jsonl").read_bytes().splitlines()
    ]
    assert {file["path"]: file["bytes"] for file in dataset.files} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    upload = stack.settings.upload_dir / dataset.id
    assert upload.read_bytes() == SMALL, "kept for other versions"
    stack.assert_one_story(job_id)


def test_useless_upload_is_an_invalid_dataset_and_no_failed_job(embedded: Stack) -> None:
    job_id = embedded.submit(b"not json\n" * 20)
    embedded.start()
    assert embedded.ended(job_id).status is JobStatus.SUCCEEDED
    dataset = embedded.dataset(job_id)
    assert dataset.status is DatasetStatus.INVALID
    assert dataset.failure is not None
    assert dataset.failure["code"] == "dataset_invalid"
    assert dataset.failure["errors"][0]["count"] == 20


def test_parquet_in_a_tar_is_read_within_the_limits_of_the_parser(embedded: Stack) -> None:
    table, packed = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in SMALL.splitlines()]), table)
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        info = tarfile.TarInfo("data/train.parquet")
        info.size = len(table.getvalue())
        archive.addfile(info, io.BytesIO(table.getvalue()))
    job_id = embedded.submit(packed.getvalue())
    embedded.start(extra={"KDPO_DATA__PARSER_MEMORY_BYTES": str(1024**3)})
    assert embedded.ended(job_id).status is JobStatus.SUCCEEDED
    dataset = embedded.dataset(job_id)
    assert (dataset.failure, (dataset.counts or {})["pairs"]) == (None, 40)
    assert (dataset.report or {})["detected"]["container"] == "tar.xz"


@pytest.mark.parametrize(
    ("setting", "limit"),
    # Less than the interpreter has already: the next page or the next second is too much.
    [("KDPO_DATA__PARSER_MEMORY_BYTES", "1048576"), ("KDPO_DATA__PARSER_CPU_S", "1")],
)
def test_parser_beyond_its_limits_is_an_invalid_dataset(
    embedded: Stack, setting: str, limit: str
) -> None:
    job_id = embedded.submit(LARGE)
    embedded.start(extra={setting: limit})
    assert embedded.ended(job_id).status is JobStatus.SUCCEEDED
    failure = embedded.dataset(job_id).failure
    assert failure is not None
    assert failure["code"] == "too_large"
    assert setting in failure["hint"]
    assert embedded.outcomes(job_id) == [AttemptOutcome.SUCCEEDED]


def test_killed_worker_loses_nothing_and_leaves_nobody(stack: Stack) -> None:
    job_id = stack.submit(LARGE)
    worker = stack.start()
    stack.in_the_middle(job_id)
    runner = stack.runner(worker)
    worker.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    wait_for("the orphan to die", lambda: not is_alive(runner), timeout_s=2)
    stack.start()
    job = stack.ended(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert stack.outcomes(job_id) == [AttemptOutcome.LOST, AttemptOutcome.SUCCEEDED]
    assert stack.dataset(job_id).status.is_usable
    stack.assert_one_story(job_id)
    second_start = next(e for e in stack.events(job_id) if e.message == "Attempt 2 has started.")
    first_start = next(e for e in stack.events(job_id) if e.message == "Attempt 1 has started.")
    assert second_start.created_at - first_start.created_at > LEASE_S
    assert time.monotonic() - killed_at < 40


@soaked_embedded
def test_broker_that_lost_everything_costs_no_job(stack: Stack) -> None:
    waiting = stack.submit(SMALL)
    with_message = relay_once(stack.database, stack.sender())
    assert with_message == 1
    wipe_broker(stack)
    stack.start()
    assert stack.ended(waiting).status is JobStatus.SUCCEEDED

    wipe_broker(stack)  # under a worker that waits for messages
    after = stack.submit(SMALL)
    assert stack.ended(after).status is JobStatus.SUCCEEDED


@soaked_embedded
def test_lost_wake_up_is_sent_again(stack: Stack) -> None:
    stack.start()
    wait_for("the worker", lambda: _live_workers(stack))
    first = stack.submit(SMALL)
    stack.ended(first)
    with stack.database.transaction() as session:
        # As if the message had been sent and had vanished: nobody owes it any more.
        session.execute(
            update(Job).where(Job.id == first).values(status=JobStatus.QUEUED, finished_at=None)
        )
        session.execute(delete(Outbox))
    wait_for("the second attempt", lambda: stack.job(first).attempt == 2, timeout_s=10)
    assert stack.ended(first).status is JobStatus.SUCCEEDED


def _live_workers(stack: Stack) -> list[str]:
    with stack.database.reading() as session:
        return list(session.execute(select(Worker.id)).scalars())


@soaked_embedded
def test_many_messages_run_a_job_once(stack: Stack) -> None:
    sender = stack.sender()
    stack.start()
    stack.start()
    jobs = [stack.submit(SMALL) for _ in range(3)]
    for _ in range(15):
        sender.wake(QueueName.CPU)
    for job_id in jobs:
        job = stack.ended(job_id)
        assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 1)
        stack.assert_one_story(job_id)


@soaked_embedded
def test_sigterm_gives_the_job_back_without_penalty(stack: Stack) -> None:
    job_id = stack.submit(LARGE)
    worker = stack.start()
    stack.in_the_middle(job_id)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    job = stack.job(job_id)
    assert job.status is JobStatus.QUEUED, stack.logs()
    assert (job.attempt, job.failures, job.losses) == (1, 0, 0)
    assert stack.outcomes(job_id) == [AttemptOutcome.PREEMPTED]
    assert _live_workers(stack) == []
    stack.start()
    assert stack.ended(job_id).status is JobStatus.SUCCEEDED
    stack.assert_one_story(job_id)


def test_worker_leaves_with_its_parent(embedded: Stack) -> None:
    job_id = embedded.submit(LARGE)
    worker = embedded.start(parent_pipe=True)
    embedded.in_the_middle(job_id)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(20) == 0
    assert embedded.outcomes(job_id) == [AttemptOutcome.PREEMPTED]


@soaked_embedded
def test_cancel_ends_the_process_first(stack: Stack) -> None:
    job_id = stack.submit(LARGE)
    worker = stack.start()
    stack.in_the_middle(job_id)
    runner = stack.runner(worker)
    assert stack.cancel(job_id).status is JobStatus.RUNNING
    job = stack.ended(job_id, timeout_s=10)
    assert not is_alive(runner)
    assert job.status is JobStatus.CANCELLED
    assert stack.outcomes(job_id) == [AttemptOutcome.CANCELLED]
    assert stack.dataset(job_id).status is DatasetStatus.INVALID
    stack.assert_one_story(job_id)


@soaked_embedded
def test_worker_without_database_kills_its_job_before_the_lease_ends(stack: Stack) -> None:
    job_id = stack.submit(LARGE)
    worker = stack.start()
    stack.in_the_middle(job_id)
    runner = stack.runner(worker)
    with stack.database.transaction() as session:
        # Holds SQLite's write lock, or the job's row on Postgres: heartbeats hang.
        session.execute(update(Job).where(Job.id == job_id).values(priority=0))
        locked_at = time.monotonic()
        wait_for("the self-fence", lambda: not is_alive(runner), timeout_s=LEASE_S)
        assert time.monotonic() - locked_at > 0.5
    assert stack.ended(job_id).status is JobStatus.SUCCEEDED
    assert stack.outcomes(job_id) == [AttemptOutcome.LOST, AttemptOutcome.SUCCEEDED]


def test_attempt_that_lost_its_job_is_stopped_and_writes_nothing(embedded: Stack) -> None:
    job_id = embedded.submit(LARGE)
    worker = embedded.start()
    embedded.in_the_middle(job_id)
    runner = embedded.runner(worker)
    with embedded.database.transaction() as session:  # as if somebody else had taken it over
        session.execute(update(Job).where(Job.id == job_id).values(attempt=7))
    wait_for("the old attempt to end", lambda: not is_alive(runner), timeout_s=3)
    job = embedded.job(job_id)
    assert (job.status, job.attempt) == (JobStatus.RUNNING, 7)
    dataset = embedded.dataset(job_id)
    assert dataset.status is DatasetStatus.VALIDATING
    assert not (embedded.settings.artifact_dir / "datasets" / dataset.id).exists()


def test_job_that_kills_its_process_ends_as_worker_lost(embedded: Stack) -> None:
    job_id = embedded.submit(LARGE)
    worker = embedded.start(extra={"KDPO_WORKER__MAX_LOSSES": "2"})
    for attempt in (1, 2):
        embedded.in_the_middle(job_id, attempt=attempt)
        os.kill(embedded.runner(worker), signal.SIGKILL)
    job = embedded.ended(job_id, timeout_s=10)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "2 attempts in a row" in job.error["message"]
    assert "code -9" in job.error["message"]
    assert job.error["retryable"] is False
    assert embedded.outcomes(job_id) == [AttemptOutcome.LOST] * 2
    assert embedded.dataset(job_id).failure == {
        "category": "run_aborted", "code": "worker_lost", "message": job.error["message"],
        "hint": job.error["hint"], "errors": [],
    }  # fmt: skip
    embedded.assert_one_story(job_id)


def test_missing_upload_fails_the_job_with_a_reason(embedded: Stack) -> None:
    job_id = embedded.submit(SMALL)
    (embedded.settings.upload_dir / embedded.dataset(job_id).id).unlink()
    embedded.start()
    job = embedded.ended(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "dataset_invalid"
    assert job.error["phase"] is None
    assert job.error["attempt"] == 1
    assert any("Traceback" in line for line in job.error["log_tail"])
    assert embedded.dataset(job_id).status is DatasetStatus.INVALID
