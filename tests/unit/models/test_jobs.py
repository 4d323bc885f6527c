"""Claims, fences, cancels, retries, losses: each move happens once or not at all."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from core.errors import Conflict, LeaseLost, NotFound, Unavailable
from core.lifecycle import (
    AttemptOutcome,
    DatasetStatus,
    EventType,
    JobKind,
    JobStatus,
    Phase,
)
from core.queue import QueueName
from core.settings import Settings
from models.maintenance import Maintenance
from models.outbox import relay_once
from models.repositories.datasets import DatasetRepository
from models.repositories.events import append_event, events_after, events_before
from models.repositories.jobs import Fence, JobRepository
from models.repositories.paging import PageQuery
from models.session import Database
from tests.unit.models.seeds import LEASE_S, Seeds, done_events, is_gapless

ERROR: dict[str, Any] = {"code": "internal", "message": "it broke", "hint": None}
THREADS = 8


class Sender:
    """Notes what is sent; away when told so."""

    def __init__(self) -> None:
        self.sent: list[QueueName] = []
        self.is_away = False

    def wake(self, queue: QueueName) -> None:
        if self.is_away:
            raise Unavailable("the broker is away")
        self.sent.append(queue)


# ------------------------------------------------------------------ claiming


def test_each_job_is_claimed_once_by_eight_threads(database: Database, seeds: Seeds) -> None:
    jobs = {seeds.job() for _ in range(24)}
    barrier = threading.Barrier(THREADS)

    def take_all(worker: int) -> list[str]:
        barrier.wait()
        mine = []
        while (claim := seeds.claim(worker_id=f"w{worker}")) is not None:
            mine.append(claim.fence.job_id)
        return mine

    with ThreadPoolExecutor(THREADS) as pool:
        taken = [job for mine in pool.map(take_all, range(THREADS)) for job in mine]
    # SKIP LOCKED may let a thread see no job while another holds the last one; the rest is here.
    while (claim := seeds.claim()) is not None:
        taken.append(claim.fence.job_id)
    assert sorted(taken) == sorted(jobs)
    assert all(seeds.attempts(job) == [(1, None)] for job in jobs)


def test_claims_go_by_priority_then_age_and_only_due(database: Database, seeds: Seeds) -> None:
    old, new, urgent = seeds.job(), seeds.job(), seeds.job(priority=5)
    other_queue = seeds.job(kind=JobKind.DATASET)
    assert [seeds.claimed().fence.job_id for _ in range(3)] == [urgent, old, new]
    assert seeds.claim() is None
    assert seeds.claimed(QueueName.CPU).fence == Fence(other_queue, 1)
    with database.transaction() as session:
        JobRepository(session).requeue(
            Fence(old, 1), AttemptOutcome.PREEMPTED, delay_s=60.0, message="later"
        )
    assert seeds.claim() is None
    seeds.make_due()
    assert seeds.claimed().fence == Fence(old, 2)


def test_started_at_is_that_of_the_first_attempt(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = seeds.claimed().fence
    first = seeds.get(job_id).started_at
    with database.transaction() as session:
        JobRepository(session).requeue(
            fence, AttemptOutcome.PREEMPTED, delay_s=0.0, message="again"
        )
    seeds.make_due()
    seeds.claimed()
    assert seeds.get(job_id).started_at == first


# -------------------------------------------------------------------- fences

WRITES: dict[str, Callable[[JobRepository, Fence], object]] = {
    "guard": lambda jobs, fence: jobs.guard(fence),
    "heartbeat": lambda jobs, fence: jobs.heartbeat(fence, lease_s=LEASE_S),
    "set_phase": lambda jobs, fence: jobs.set_phase(fence, Phase.TRAINING),
    "set_progress": lambda jobs, fence: jobs.set_progress(fence, {"done": 1}),
    "add_attention": lambda jobs, fence: jobs.add_attention(fence, "stalled"),
    "add_gpu_seconds": lambda jobs, fence: jobs.add_gpu_seconds(fence, 5.0),
    "progressed": lambda jobs, fence: jobs.progressed(fence),
    "load": lambda jobs, fence: jobs.load(fence),
    "finish": lambda jobs, fence: jobs.finish(fence, JobStatus.SUCCEEDED, message="done"),
    "requeue": lambda jobs, fence: jobs.requeue(
        fence, AttemptOutcome.PREEMPTED, delay_s=0.0, message="again"
    ),
    "fail": lambda jobs, fence: jobs.fail(
        fence, {**ERROR, "retryable": True}, max_retries=2, backoff_s=0.0
    ),
    "lose": lambda jobs, fence: jobs.lose(
        fence, message="gone", log_tail=[], max_losses=5, backoff_s=0.0
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_stale_fence_is_refused(name: str, database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    stale = seeds.claimed().fence
    seeds.expire(job_id)
    with database.transaction() as session:
        JobRepository(session).reap(max_losses=5, backoff_s=0.0)
    owner = seeds.claimed().fence
    before = vars(seeds.get(job_id)).copy()

    def stale_write() -> None:
        with database.transaction() as session:
            WRITES[name](JobRepository(session), stale)

    with pytest.raises(LeaseLost):
        stale_write()
    after = vars(seeds.get(job_id)).copy()
    assert {k: v for k, v in after.items() if k[0] != "_"} == {
        k: v for k, v in before.items() if k[0] != "_"
    }
    with database.transaction() as session:  # the owner may do the same
        WRITES[name](JobRepository(session), owner)


@pytest.mark.parametrize("name", WRITES)
def test_ended_job_is_not_written_to(name: str, database: Database, seeds: Seeds) -> None:
    seeds.job()
    fence = seeds.claimed().fence
    with database.transaction() as session:
        JobRepository(session).finish(fence, JobStatus.SUCCEEDED, message="done")

    def late_write() -> None:
        with database.transaction() as session:
            WRITES[name](JobRepository(session), fence)

    with pytest.raises(LeaseLost):
        late_write()
    assert seeds.attempts(fence.job_id) == [(1, AttemptOutcome.SUCCEEDED)]
    assert done_events(seeds.events(fence.job_id)) == 1


def test_exactly_one_of_two_finishes_counts(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = seeds.claimed().fence
    barrier = threading.Barrier(THREADS)

    def finish(number: int) -> bool:
        barrier.wait()
        try:
            with database.transaction() as session:
                JobRepository(session).finish(
                    fence, JobStatus.SUCCEEDED, result={"by": number}, message="done"
                )
        except LeaseLost:
            return False
        return True

    with ThreadPoolExecutor(THREADS) as pool:
        won = [n for n, ok in enumerate(pool.map(finish, range(THREADS))) if ok]
    assert len(won) == 1
    assert seeds.get(job_id).result == {"by": won[0]}
    assert done_events(seeds.events(job_id)) == 1


# --------------------------------------------------------------- ends of attempts


def test_retryable_error_is_retried_with_growing_pauses_then_final(
    database: Database, seeds: Seeds
) -> None:
    job_id = seeds.job()
    error = {**ERROR, "retryable": True}
    pauses = []
    for attempt in (1, 2, 3):
        fence = seeds.claimed().fence
        assert fence.attempt == attempt
        with database.transaction() as session:
            JobRepository(session).fail(fence, error, max_retries=2, backoff_s=100.0)
        job = seeds.get(job_id)
        if job.status is JobStatus.QUEUED:
            pauses.append(round(job.run_after - (job.heartbeat_at or 0.0), -1))
            seeds.make_due()
    job = seeds.get(job_id)
    assert (job.status, job.failures, job.losses) == (JobStatus.FAILED, 2, 0)
    assert job.error == error
    assert pauses == [100.0, 200.0]
    retry, failed = AttemptOutcome.RETRY, AttemptOutcome.FAILED
    assert seeds.attempts(job_id) == [(1, retry), (2, retry), (3, failed)]


def test_final_error_ends_the_job_at_once(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = _fence(seeds)
    with database.transaction() as session:
        JobRepository(session).fail(
            fence, {**ERROR, "retryable": False}, max_retries=2, backoff_s=1.0, exit_code=70
        )
    assert seeds.get(job_id).status is JobStatus.FAILED
    levels = [e.level for e in seeds.events(job_id) if e.data.get("status") == "failed"]
    assert levels == ["error"]


@pytest.mark.parametrize("way", ["reap", "lose"])
def test_losses_end_a_job_unless_it_progresses(way: str, database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()

    def lose() -> JobStatus:
        seeds.make_due()
        fence = seeds.claimed().fence
        seeds.expire(job_id)
        with database.transaction() as session:
            jobs = JobRepository(session)
            if way == "reap":
                (reaped,) = jobs.reap(max_losses=3, backoff_s=0.0)
                assert reaped.fence == fence
                return reaped.status
            return jobs.lose(fence, message="gone", log_tail=["bye"], max_losses=3, backoff_s=0.0)

    assert [lose(), lose()] == [JobStatus.QUEUED, JobStatus.QUEUED]
    seeds.make_due()
    fence = seeds.claimed().fence
    with database.transaction() as session:
        JobRepository(session).progressed(fence)
        JobRepository(session).requeue(
            fence, AttemptOutcome.PREEMPTED, delay_s=0.0, message="again"
        )
    assert [lose(), lose(), lose()] == [JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.FAILED]
    job = seeds.get(job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["retryable"]) == ("worker_lost", False)
    assert "3 attempts in a row" in job.error["message"]
    assert is_gapless(seeds.events(job_id))
    assert done_events(seeds.events(job_id)) == 1


def test_reaper_takes_only_expired_leases(database: Database, seeds: Seeds) -> None:
    expired, alive, waiting = seeds.job(), seeds.job(), seeds.job()
    seeds.claimed()
    seeds.claimed()
    seeds.expire(expired)
    with database.transaction() as session:
        reaped = JobRepository(session).reap(max_losses=5, backoff_s=0.0)
    assert [one.fence.job_id for one in reaped] == [expired]
    assert seeds.get(alive).status is JobStatus.RUNNING
    assert seeds.get(waiting).attempt == 0
    with database.transaction() as session:
        assert JobRepository(session).reap(max_losses=5, backoff_s=0.0) == []


def test_job_of_many_reapers_is_requeued_once(database: Database, seeds: Seeds) -> None:
    jobs = [seeds.job() for _ in range(6)]
    for job_id in jobs:
        seeds.claimed()
        seeds.expire(job_id)
    barrier = threading.Barrier(THREADS)

    def reap(_: int) -> list[str]:
        barrier.wait()
        with database.transaction() as session:
            return [r.fence.job_id for r in JobRepository(session).reap(max_losses=5, backoff_s=0)]

    with ThreadPoolExecutor(THREADS) as pool:
        reaped = [job for mine in pool.map(reap, range(THREADS)) for job in mine]
    assert sorted(reaped) == sorted(jobs)
    assert all(seeds.get(job_id).losses == 1 for job_id in jobs)


def test_dataset_whose_job_gave_up_is_invalid(database: Database, seeds: Seeds) -> None:
    dataset_id, _ = seeds.dataset_job()
    fence = seeds.claimed(QueueName.CPU).fence
    with database.transaction() as session:
        JobRepository(session).lose(
            fence, message="killed", log_tail=[], max_losses=1, backoff_s=0.0
        )
    with database.reading() as session:
        dataset = DatasetRepository(session).load(dataset_id)
    assert dataset.status is DatasetStatus.INVALID
    assert dataset.failure is not None
    assert dataset.failure["code"] == "worker_lost"


# ------------------------------------------------------------------ cancelling


def _cancel(seeds: Seeds, job_id: str) -> JobStatus:
    with seeds.database.transaction() as session:
        return JobRepository(session).request_cancel(seeds.owner_id, job_id).status


def _fence(seeds: Seeds) -> Fence:
    return seeds.claimed().fence


def test_cancel_of_a_queued_job_is_immediate_and_idempotent(
    database: Database, seeds: Seeds
) -> None:
    dataset_id, job_id = seeds.dataset_job()
    assert [_cancel(seeds, job_id), _cancel(seeds, job_id)] == [JobStatus.CANCELLED] * 2
    assert seeds.claim(QueueName.CPU) is None
    assert done_events(seeds.events(job_id)) == 1
    with database.reading() as session:
        assert DatasetRepository(session).load(dataset_id).status is DatasetStatus.INVALID


def test_cancel_of_a_running_job_travels_with_the_heartbeat(
    database: Database, seeds: Seeds
) -> None:
    job_id = seeds.job()
    fence = _fence(seeds)
    assert _cancel(seeds, job_id) is JobStatus.RUNNING
    with database.transaction() as session:
        jobs = JobRepository(session)
        assert jobs.heartbeat(fence, lease_s=LEASE_S).cancel_requested
        assert jobs.guard(fence).cancel_requested
        assert jobs.set_progress(fence, {}).cancel_requested
        jobs.finish(fence, JobStatus.CANCELLED, message="The job was cancelled.")
    assert _cancel(seeds, job_id) is JobStatus.CANCELLED


def test_cancel_during_a_requeue_is_not_lost(seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = _fence(seeds)
    with ThreadPoolExecutor(1) as pool:
        with seeds.database.transaction() as session:
            JobRepository(session).requeue(
                fence, AttemptOutcome.PREEMPTED, delay_s=0.0, message="again"
            )
            cancelled = pool.submit(_cancel, seeds, job_id)
            with pytest.raises(TimeoutError):
                cancelled.result(timeout=0.5)
        assert cancelled.result(timeout=30) is JobStatus.CANCELLED
    assert seeds.claim() is None


@pytest.mark.parametrize("name", ["requeue", "fail", "lose", "reap"])
def test_job_to_be_cancelled_is_never_queued_again(
    name: str, database: Database, seeds: Seeds
) -> None:
    job_id = seeds.job()
    fence = _fence(seeds)
    _cancel(seeds, job_id)
    seeds.expire(job_id)
    with database.transaction() as session:
        if name == "reap":
            JobRepository(session).reap(max_losses=5, backoff_s=0.0)
        else:
            WRITES[name](JobRepository(session), fence)
    assert seeds.get(job_id).status is JobStatus.CANCELLED
    ((_, outcome),) = seeds.attempts(job_id)
    lost = name in ("lose", "reap")
    assert outcome is (AttemptOutcome.LOST if lost else AttemptOutcome.CANCELLED)
    assert done_events(seeds.events(job_id)) == 1


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED])
def test_ended_job_cannot_be_cancelled(status: JobStatus, database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = _fence(seeds)
    with database.transaction() as session:
        JobRepository(session).finish(fence, status, message="over")
    with pytest.raises(Conflict, match=f"already {status.value}"):
        _cancel(seeds, job_id)


def test_foreign_job_is_not_found(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    with database.reading() as session, pytest.raises(NotFound):
        JobRepository(session).get("own_somebody", job_id)
    with database.reading() as session, pytest.raises(NotFound):
        JobRepository(session).get(seeds.owner_id, job_id, kind=JobKind.EXPORT)


# --------------------------------------------------------------- events, wake-ups


def test_events_have_no_gap_under_concurrency(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()

    def append(number: int) -> None:
        for step in range(10):
            with database.transaction() as session:
                append_event(session, job_id, EventType.JOB_METRICS, f"{number}.{step}")

    def append_and_roll_back(_: int) -> None:
        for _step in range(10):
            with suppress(ZeroDivisionError), database.transaction() as session:
                append_event(session, job_id, EventType.JOB_METRICS, "never")
                raise ZeroDivisionError

    with ThreadPoolExecutor(THREADS) as pool:
        kept = [pool.submit(append, number) for number in range(6)]
        undone = [pool.submit(append_and_roll_back, number) for number in range(2)]
        for future in (*kept, *undone):
            future.result()
    events = seeds.events(job_id)
    assert is_gapless(events)
    assert len(events) == 1 + 60
    assert seeds.get(job_id).event_seq == 61
    with database.reading() as session:
        assert [e.seq for e in events_after(session, job_id, 10, 3)] == [11, 12, 13]
        assert [e.seq for e in events_before(session, job_id, 10, 3)] == [9, 8, 7]
        assert [e.seq for e in events_before(session, job_id, None, 2)] == [61, 60]


def test_phase_makes_one_event_per_change(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = _fence(seeds)
    for phase in (Phase.TRAINING, Phase.TRAINING, Phase.SAVING):
        with database.transaction() as session:
            JobRepository(session).set_phase(fence, phase)
    phases = [e.data["phase"] for e in seeds.events(job_id) if e.type is EventType.JOB_PHASE]
    assert phases == ["training", "saving"]


def test_relay_sends_before_it_forgets(database: Database, seeds: Seeds) -> None:
    sender = Sender()
    seeds.job()
    seeds.job()
    seeds.dataset_job()
    sender.is_away = True
    with pytest.raises(Unavailable):
        relay_once(database, sender)
    assert len(seeds.owed()) == 3
    sender.is_away = False
    assert relay_once(database, sender) == 3
    assert sorted(sender.sent) == [QueueName.CPU, QueueName.GPU]
    assert (seeds.owed(), relay_once(database, sender)) == ([], 0)


def test_wake_up_of_a_paused_job_waits_until_it_is_due(database: Database, seeds: Seeds) -> None:
    seeds.job()
    sender = Sender()
    relay_once(database, sender)
    fence = _fence(seeds)
    with database.transaction() as session:
        JobRepository(session).fail(
            fence, {**ERROR, "retryable": True}, max_retries=1, backoff_s=60.0
        )
    assert relay_once(database, sender) == 0
    seeds.make_due()
    assert relay_once(database, sender) == 1
    assert sender.sent == [QueueName.GPU] * 2


def test_rolled_back_job_owes_nothing(database: Database, seeds: Seeds) -> None:
    with suppress(ZeroDivisionError), database.transaction() as session:
        JobRepository(session).create(owner_id=seeds.owner_id, kind=JobKind.TRAINING, spec={})
        raise ZeroDivisionError
    with database.reading() as session:
        assert JobRepository(session).page(seeds.owner_id, PageQuery()).rows == []
    assert seeds.owed() == []


def test_overdue_queues_are_those_with_a_forgotten_job(database: Database, seeds: Seeds) -> None:
    seeds.job()
    seeds.dataset_job()
    seeds.claimed(QueueName.CPU)
    seeds.make_due()
    with database.reading() as session:
        assert JobRepository(session).overdue_queues(older_than_s=0.5) == [QueueName.GPU]
        assert JobRepository(session).overdue_queues(older_than_s=60.0) == []


def test_upkeep_reaps_relays_and_survives_a_broker_that_is_away(
    database: Database, seeds: Seeds
) -> None:
    sender = Sender()
    maintenance = Maintenance(database, sender, Settings.model_validate({}))
    job_id = seeds.job()
    _fence(seeds)
    seeds.expire(job_id)
    sender.is_away = True
    maintenance.tick()
    assert seeds.get(job_id).status is JobStatus.QUEUED
    assert sender.sent == []
    sender.is_away = False
    maintenance.tick()
    assert sender.sent == [QueueName.GPU]


def test_queue_position_counts_jobs_ahead(database: Database, seeds: Seeds) -> None:
    jobs = [seeds.job(), seeds.job(), seeds.job(priority=1)]
    with database.reading() as session:
        repository = JobRepository(session)
        positions = [
            repository.queue_position(repository.get(seeds.owner_id, job_id)) for job_id in jobs
        ]
    assert positions == [1, 2, 0]


def test_queue_position_leaves_out_jobs_that_pause_for_longer(
    database: Database, seeds: Seeds
) -> None:
    first, second, third = (seeds.job() for _ in range(3))

    def positions() -> list[int | None]:
        with database.reading() as session:
            repository = JobRepository(session)
            jobs = [repository.get(seeds.owner_id, job_id) for job_id in (first, second, third)]
            at_once = repository.queue_positions(jobs)
            one_by_one = [repository.queue_position(job) for job in jobs]
            assert [at_once[job.id] for job in jobs] == one_by_one
            return one_by_one

    seeds.pause(first, 60.0)
    assert positions() == [0, 0, 1]
    seeds.pause(third, 90.0)
    assert positions() == [0, 0, 2], "by then the first is due again"
