"""A pause keeps everything and counts as nothing; a resume happens once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from core.errors import Conflict, LeaseLost
from core.lifecycle import AttemptOutcome, Attention, DatasetStatus, EventType, JobStatus
from core.queue import QueueName
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import Fence, JobRepository
from models.session import Database
from tests.unit.models.seeds import LEASE_S, Seeds, done_events, is_gapless

ERROR: dict[str, Any] = {"code": "disk_full", "message": "no room", "hint": "make some"}
DATA = {"folder": "/data", "free_bytes": 7}


def pause(database: Database, fence: Fence) -> JobStatus:
    with database.transaction() as session:
        return JobRepository(session).pause(fence, ERROR, data=DATA, exit_code=74)


def resume(database: Database, job_id: str, seeds: Seeds) -> JobStatus:
    with database.transaction() as session:
        jobs = JobRepository(session)
        return jobs.resume(jobs.get(seeds.owner_id, job_id)).status


def test_pause_and_resume(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = seeds.claimed().fence
    with database.transaction() as session:
        JobRepository(session).add_attention(fence, Attention.LOSS_DIVERGING.value)
    assert pause(database, fence) is JobStatus.PAUSED
    job = seeds.get(job_id)
    assert (job.status, job.error, job.phase) == (JobStatus.PAUSED, ERROR, None)
    assert job.attention == ["loss_diverging", "low_disk"]
    assert (job.failures, job.losses, job.lease_owner, job.lease_until) == (0, 0, None, None)
    assert job.finished_at is None
    assert seeds.attempts(job_id) == [(1, AttemptOutcome.PAUSED)]
    event = seeds.events(job_id)[-1]
    assert event.type is EventType.JOB_STATUS
    assert event.message == "The job is paused: no room. make some."
    assert event.data == {"status": "paused", "code": "disk_full", **DATA}
    assert seeds.claim() is None
    with database.transaction() as session:
        assert JobRepository(session).reap(max_losses=1, backoff_s=0.0) == []
        assert JobRepository(session).overdue_queues(older_than_s=-1.0) == []

    owed = len(seeds.owed())
    assert resume(database, job_id, seeds) is JobStatus.QUEUED
    job = seeds.get(job_id)
    assert (job.error, job.attention) == (None, ["loss_diverging"])
    assert len(seeds.owed()) == owed + 1
    assert seeds.claimed().fence == Fence(job_id, 2)
    assert is_gapless(seeds.events(job_id))
    assert done_events(seeds.events(job_id)) == 0


def test_a_pause_needs_the_fence(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = seeds.claimed().fence
    pause(database, fence)
    resume(database, job_id, seeds)
    seeds.claimed()
    for stale in (fence, Fence(job_id, 3)):
        with pytest.raises(LeaseLost):
            pause(database, stale)
    assert seeds.get(job_id).status is JobStatus.RUNNING


def test_a_job_that_was_to_be_cancelled_is_not_paused(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = seeds.claimed().fence
    with database.transaction() as session:
        JobRepository(session).request_cancel(seeds.owner_id, job_id)
    assert pause(database, fence) is JobStatus.CANCELLED
    assert seeds.attempts(job_id) == [(1, AttemptOutcome.CANCELLED)]
    with pytest.raises(Conflict, match="has already cancelled"):
        resume(database, job_id, seeds)


def test_a_paused_job_can_be_cancelled(database: Database, seeds: Seeds) -> None:
    dataset_id, job_id = seeds.dataset_job()
    pause(database, seeds.claimed(QueueName.CPU).fence)
    with database.transaction() as session:
        JobRepository(session).request_cancel(seeds.owner_id, job_id)
    assert seeds.get(job_id).status is JobStatus.CANCELLED
    assert done_events(seeds.events(job_id)) == 1
    with database.reading() as session:
        dataset = DatasetRepository(session).load(dataset_id)
    assert dataset.status is DatasetStatus.INVALID
    assert dataset.failure is not None
    assert dataset.failure["code"] == "cancelled"


def test_the_dataset_of_a_paused_validation_says_what_it_waits_for(
    database: Database, seeds: Seeds
) -> None:
    dataset_id, job_id = seeds.dataset_job()
    pause(database, seeds.claimed(QueueName.CPU).fence)
    expected = {"category": "storage_full", "errors": [], **ERROR}
    for failure in (expected, None):
        with database.reading() as session:
            dataset = DatasetRepository(session).load(dataset_id)
        assert (dataset.status, dataset.failure) == (DatasetStatus.VALIDATING, failure)
        resume(database, job_id, seeds)


def test_of_many_resumes_one_counts(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    pause(database, seeds.claimed().fence)
    before, barrier = len(seeds.events(job_id)), threading.Barrier(6)

    def at_once(_: int) -> JobStatus:
        barrier.wait()
        return resume(database, job_id, seeds)

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(at_once, range(6))) == {JobStatus.QUEUED}
    assert len(seeds.events(job_id)) == before + 1
    with database.transaction() as session:
        jobs = JobRepository(session)
        assert jobs.claim(QueueName.GPU, worker_id="w", lease_s=LEASE_S) is not None
        assert jobs.claim(QueueName.GPU, worker_id="w", lease_s=LEASE_S) is None
