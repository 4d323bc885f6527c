"""Jobs that help a search, beside the end of the job that they help."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.lifecycle import AttemptOutcome, EventType, JobKind, JobStatus
from models.repositories.events import append_event
from models.repositories.jobs import Claim, Fence, JobRepository
from models.session import Database
from tests.unit.models.seeds import Seeds, is_gapless

BLOCKED_S = 0.7
"""Time for a transaction to come to a row that another one holds."""


def helped(database: Database, seeds: Seeds) -> tuple[Claim, Claim]:
    """A running job and a running one that helps it."""
    parent = seeds.claimed()
    with database.transaction() as session:
        JobRepository(session).create(
            owner_id=seeds.owner_id, kind=JobKind.SEARCH, spec={}, parent_id=parent.fence.job_id,
        )  # fmt: skip
    return parent, seeds.claimed()


def cancelled(jobs: JobRepository, owner_id: str, parent: Fence) -> None:
    jobs.request_cancel(owner_id, parent.job_id)


def failed(jobs: JobRepository, _owner_id: str, parent: Fence) -> None:
    jobs.finish(parent, JobStatus.FAILED, error={"code": "internal"}, message="no use")


def paused(jobs: JobRepository, owner_id: str, parent: Fence) -> None:
    jobs.request_pause(jobs.lock(owner_id, parent.job_id))
    jobs.requeue(parent, AttemptOutcome.PREEMPTED, delay_s=0.0, message="it is paused")


@pytest.mark.parametrize("move", [cancelled, failed, paused])
def test_a_helper_that_writes_about_its_parent_and_the_parents_end_do_not_deadlock(
    database: Database, seeds: Seeds, move: Callable[[JobRepository, str, Fence], None]
) -> None:
    seeds.job()
    parent, helper = helped(database, seeds)
    holds, told = threading.Event(), threading.Event()

    def works() -> None:
        with database.transaction() as session:
            JobRepository(session).guard(helper.fence)
            holds.set()
            told.wait(BLOCKED_S)
            append_event(session, parent.fence.job_id, EventType.TRIAL_COMPLETED, "A trial ends.")

    def ends() -> None:
        holds.wait()
        with database.transaction() as session:
            move(JobRepository(session), seeds.owner_id, parent.fence)
        told.set()

    with ThreadPoolExecutor(2) as pool:
        for outcome in (pool.submit(works), pool.submit(ends)):
            outcome.result()
    assert is_gapless(seeds.events(parent.fence.job_id))
    asked = seeds.get(helper.fence.job_id).cancel_requested_at is not None
    assert asked == (move is not cancelled), "a job that is asked to stop tells its helpers then"
