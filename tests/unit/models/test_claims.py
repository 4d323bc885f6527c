"""Owners take turns, limits hold under concurrency, bad and draining workers get nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from sqlalchemy import event, insert, select, text

from core.errors import QuotaExceeded
from core.ids import IdPrefix, new_id
from core.lifecycle import AttemptOutcome, JobKind, JobStatus
from core.queue import QueueName
from models.job import Job, JobAttempt, Worker
from models.owner import Owner
from models.repositories.jobs import Claim, JobRepository
from models.repositories.owners import OwnerRepository
from models.repositories.quotas import (
    DEFAULT_SUBJECT,
    UNLIMITED,
    QuotaName,
    QuotaRepository,
    next_month,
)
from models.repositories.workers import WorkerRepository
from models.session import Database
from models.types import db_now
from tests.unit.models.seeds import LEASE_S, Seeds

MANY = 20_000


def seeds_of(database: Database, name: str) -> Seeds:
    seeds = Seeds(database)
    with database.transaction() as session:
        seeds.owner_id = OwnerRepository(session).ensure(name).id
    return seeds


def limit(database: Database, subject: str, name: QuotaName, value: int | None) -> None:
    with database.transaction() as session:
        QuotaRepository(session).give(subject, {name: value})


def finish(database: Database, claim: Claim) -> None:
    with database.transaction() as session:
        JobRepository(session).finish(claim.fence, JobStatus.SUCCEEDED, message="done")


def lose(database: Database, claim: Claim) -> None:
    with database.transaction() as session:
        JobRepository(session).lose(
            claim.fence, message="killed", log_tail=[], max_losses=100, backoff_s=0.0
        )


# -------------------------------------------------------------------- fairness


def test_owners_take_turns_however_many_jobs_they_have(database: Database) -> None:
    ada, ben, cyd = (seeds_of(database, name) for name in ("ada", "ben", "cyd"))
    many = [ada.job() for _ in range(5)]
    two = [ben.job() for _ in range(2)]
    one = cyd.job(priority=9)
    taken = [ada.claimed().fence.job_id for _ in range(8)]
    assert sorted(taken[:3]) == sorted([many[0], two[0], one])
    assert sorted(taken[3:5]) == sorted([many[1], two[1]])
    assert taken[5:] == many[2:]


def test_a_new_owner_is_served_next_and_priority_is_an_owners_own(database: Database) -> None:
    ada, ben = seeds_of(database, "ada"), seeds_of(database, "ben")
    for _ in range(3):
        ada.job(priority=100)
    finish(database, ada.claimed())
    late = ben.job(priority=-100)
    assert ada.claimed().fence.job_id == late


def test_turns_are_counted_for_each_queue(database: Database) -> None:
    ada, ben = seeds_of(database, "ada"), seeds_of(database, "ben")
    ada.job(kind=JobKind.DATASET)
    assert ada.claimed(QueueName.CPU).owner_id == ada.owner_id
    ben.job()
    assert ada.claimed(QueueName.GPU).owner_id == ben.owner_id
    ada.job()
    ben.job()
    assert ada.claimed(QueueName.GPU).owner_id == ada.owner_id


def test_position_says_in_which_order_jobs_are_taken(database: Database) -> None:
    ada, ben, cyd = (seeds_of(database, name) for name in ("ada", "ben", "cyd"))
    ada.job()
    finish(database, ada.claimed())  # the next turn is not hers
    jobs = [ada.job() for _ in range(3)] + [ben.job() for _ in range(4)] + [cyd.job()]
    jobs += [ada.job(priority=1), cyd.job(priority=2)]
    with database.reading() as session:
        repository = JobRepository(session)
        said = {job: repository.queue_position(session.get_one(Job, job)) for job in jobs}
        assert repository.queue_positions([session.get_one(Job, job) for job in jobs]) == said
    order = [ada.claimed().fence.job_id for _ in jobs]
    assert [said[job] for job in order] == list(range(len(jobs)))
    with database.reading() as session:
        assert JobRepository(session).queue_position(session.get_one(Job, order[0])) is None


# ---------------------------------------------------------------------- limits


def test_running_limit_holds_back_one_owner_only(database: Database) -> None:
    ada, ben = seeds_of(database, "ada"), seeds_of(database, "ben")
    limit(database, ada.owner_id, QuotaName.RUNNING_JOBS, 1)
    first, second, other = ada.job(), ada.job(), ben.job()
    mine = ada.claimed()
    assert {mine.fence.job_id, ada.claimed().fence.job_id} == {first, other}
    assert ada.claim() is None
    finish(database, mine)
    assert ada.claimed().fence.job_id == second


def test_default_limit_yields_to_an_owners_own(database: Database) -> None:
    ada, ben = seeds_of(database, "ada"), seeds_of(database, "ben")
    limit(database, DEFAULT_SUBJECT, QuotaName.RUNNING_JOBS, 0)
    ada.job()
    ben.job()
    assert ada.claim() is None
    limit(database, ben.owner_id, QuotaName.RUNNING_JOBS, UNLIMITED)
    assert ada.claimed().owner_id == ben.owner_id
    assert ada.claim() is None
    limit(database, DEFAULT_SUBJECT, QuotaName.RUNNING_JOBS, None)
    assert ada.claimed().owner_id == ada.owner_id


def test_running_limit_holds_for_workers_that_claim_at_once(database: Database) -> None:
    ada = seeds_of(database, "ada")
    limit(database, ada.owner_id, QuotaName.RUNNING_JOBS, 2)
    for _ in range(12):
        ada.job()
    barrier = threading.Barrier(6)

    def take(worker: int) -> int:
        barrier.wait()
        return sum(ada.claim(worker_id=f"w{worker}") is not None for _ in range(3))

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(take, range(6))) == 2


def test_waiting_jobs_and_device_time_are_limited_at_creation(database: Database) -> None:
    ada = seeds_of(database, "ada")
    limit(database, ada.owner_id, QuotaName.QUEUED_JOBS, 2)
    ada.job()
    ada.job()
    with pytest.raises(QuotaExceeded, match=r"queued_jobs: 2 of 2 used") as refused:
        ada.job()
    assert (refused.value.limit, refused.value.used) == (2, 2)
    claim = ada.claimed()
    ada.job()  # one of the two runs now
    limit(database, ada.owner_id, QuotaName.QUEUED_JOBS, None)
    limit(database, ada.owner_id, QuotaName.GPU_SECONDS_MONTH, 100)
    with database.transaction() as session:
        JobRepository(session).add_gpu_seconds(claim.fence, 60.0)
        JobRepository(session).add_gpu_seconds(claim.fence, 39.5)
        quotas = QuotaRepository(session)
        assert quotas.gpu_seconds_month(ada.owner_id) == pytest.approx(99.5)
    with pytest.raises(QuotaExceeded, match="gpu_seconds_month") as refused:
        ada.job()
    assert refused.value.frees_at is not None
    ada.job(kind=JobKind.DATASET)  # reading data takes no device
    assert seeds_of(database, "ben").job()


def test_waiting_limit_holds_for_requests_at_once(database: Database) -> None:
    ada = seeds_of(database, "ada")
    limit(database, ada.owner_id, QuotaName.QUEUED_JOBS, 3)
    barrier = threading.Barrier(6)

    def create(_: int) -> bool:
        barrier.wait()
        try:
            ada.job()
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(create, range(6))) == 3


def test_months_end_on_their_first_day() -> None:
    for year, month, after in ((2026, 11, (2026, 12)), (2026, 12, (2027, 1)), (2027, 1, (2027, 2))):
        end = datetime.fromtimestamp(next_month(datetime(year, month, 15, tzinfo=UTC)), UTC)
        assert (end.year, end.month, end.day, end.hour) == (*after, 1, 0)


# ------------------------------------------------------------------ bad workers


def test_a_worker_that_lost_three_attempts_at_two_jobs_gets_none(
    database: Database, seeds: Seeds
) -> None:
    first, second = seeds.job(), seeds.job()
    lose(database, seeds.claimed())
    seeds.pause(first, 3600.0)
    for _ in range(2):
        lose(database, seeds.claimed())
    assert [len(seeds.attempts(job)) for job in (first, second)] == [1, 2]
    seeds.make_due()
    assert seeds.claim(worker_id="w") is None
    with database.reading() as session:
        held = WorkerRepository(session).quarantine("w", quarantine_s=600.0)
    assert held is not None
    assert 590 < held.seconds_left <= 600
    assert set(held.job_ids) == {first, second}
    other = seeds.claim(worker_id="healthy")
    assert other is not None
    seeds.pause(second, 3600.0)
    seeds.job()
    # When the time is over it gets one job; a success ends the story, a loss begins it anew.
    with database.transaction() as session:
        again = JobRepository(session).claim(
            QueueName.GPU, worker_id="w", lease_s=LEASE_S, quarantine_s=0.0
        )
    assert again is not None
    lose(database, again)
    assert seeds.claim(worker_id="w") is None


def test_a_success_ends_the_quarantine(database: Database, seeds: Seeds) -> None:
    for _ in range(5):
        seeds.job()
    for _ in range(3):
        lose(database, seeds.claimed())
    with database.transaction() as session:
        probe = JobRepository(session).claim(
            QueueName.GPU, worker_id="w", lease_s=LEASE_S, quarantine_s=0.0
        )
    assert probe is not None
    finish(database, probe)
    assert seeds.claim(worker_id="w") is not None


def test_one_job_that_kills_is_not_the_workers_fault(database: Database, seeds: Seeds) -> None:
    seeds.job()
    for _ in range(4):
        lose(database, seeds.claimed())
        seeds.make_due()
    assert seeds.claim(worker_id="w") is not None


def test_cancelled_and_preempted_attempts_say_nothing(database: Database, seeds: Seeds) -> None:
    for _ in range(6):
        seeds.job()
    for number in range(3):
        lose(database, seeds.claimed())
        with database.transaction() as session:
            preempted = JobRepository(session).claim(
                QueueName.GPU, worker_id="w", lease_s=LEASE_S, quarantine_s=0.0
            )
            assert preempted is not None
            JobRepository(session).requeue(
                preempted.fence, AttemptOutcome.PREEMPTED, delay_s=float(number), message="stop"
            )
    assert seeds.claim(worker_id="w") is None


def test_a_reaped_attempt_counts_as_lost(database: Database, seeds: Seeds) -> None:
    jobs = [seeds.job() for _ in range(3)]
    for _ in jobs:
        seeds.claimed()
    for job in jobs:
        seeds.expire(job)
    with database.transaction() as session:
        assert len(JobRepository(session).reap(max_losses=5, backoff_s=0.0)) == 3
    assert seeds.claim(worker_id="w") is None


def test_a_draining_worker_claims_nothing_more(database: Database, seeds: Seeds) -> None:
    seeds.job()
    seeds.job()
    with database.transaction() as session:
        WorkerRepository(session).beat(
            "w", host="h", pid=1, version="0", queues=[QueueName.GPU], draining=False
        )
    assert seeds.claim(worker_id="w") is not None
    with database.transaction() as session:
        assert not WorkerRepository(session).request_drain("w").takes_jobs
    with database.transaction() as session:  # its next sign of life does not undo it
        WorkerRepository(session).beat(
            "w", host="h", pid=1, version="0", queues=[QueueName.GPU], draining=False
        )
        assert not session.get_one(Worker, "w").takes_jobs
    assert seeds.claim(worker_id="w") is None
    assert seeds.claim(worker_id="other") is not None


# ------------------------------------------------------------------------ plans


def fill(database: Database, owners: int, jobs: int) -> None:
    ids = [new_id(IdPrefix.OWNER) for _ in range(owners)]
    with database.transaction() as session:
        session.execute(insert(Owner), [{"id": one, "name": one, "created_at": 1.0} for one in ids])
        for start in range(0, jobs, 5000):
            rows = [
                {
                    "id": f"ftjob-{n:08d}", "owner_id": ids[n % owners], "created_at": float(n),
                    "kind": JobKind.TRAINING, "queue": QueueName.GPU, "priority": n % 3,
                    "status": JobStatus.QUEUED, "attention": [], "spec": {}, "seed": 0,
                    "labels": {}, "attempt": 0, "failures": 0, "losses": 0, "run_after": 1.0,
                    "gpu_seconds": 0.0, "event_seq": 0, "version": 1,
                }
                for n in range(start, min(jobs, start + 5000))
            ]  # fmt: skip
            session.execute(insert(Job), rows)
        session.execute(text("ANALYZE"))


def claim_plan(database: Database) -> str:
    """Return how the database looks for the next job, with what it really did on Postgres."""
    sent: list[tuple[str, object]] = []

    def keep(_c: object, _k: object, statement: str, values: object, *_more: object) -> None:
        sent.append((statement, values))

    event.listen(database.engine, "before_cursor_execute", keep)
    with database.transaction() as session:
        assert JobRepository(session).claim(QueueName.GPU, worker_id="w", lease_s=1.0) is not None
    event.remove(database.engine, "before_cursor_execute", keep)
    statement, values = next(one for one in sent if "UPDATE job SET status" in one[0])
    is_sqlite = database.engine.dialect.name == "sqlite"
    explain = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN (ANALYZE, TIMING OFF) "
    with database.engine.connect() as connection:
        rows = connection.exec_driver_sql(explain + statement, values).all()  # type: ignore[arg-type]
        connection.rollback()
    return "\n".join(str(row[-1]) for row in rows)


def test_claim_reads_a_few_rows_of_many(database: Database) -> None:
    fill(database, owners=20, jobs=MANY)
    plan = claim_plan(database)
    assert "ix_job_claim" in plan
    if database.engine.dialect.name == "sqlite":
        assert "SCAN job" not in plan
        # Owners are sorted by their turns; the jobs of an owner come sorted out of the index.
        assert plan.count("USE TEMP B-TREE FOR ORDER BY") <= 1
        return
    assert "Seq Scan on job" not in plan
    locked = [line for line in plan.splitlines() if "LockRows" in line]
    assert locked
    assert all("loops=1)" in line for line in locked), plan


def test_claim_notes_the_attempt(database: Database, seeds: Seeds) -> None:
    claim = seeds.claim() if seeds.job() else None
    assert claim is not None
    with database.reading() as session:
        row = session.execute(select(JobAttempt, db_now())).one()
    assert row[0].worker_id == "w"
    assert row[1] - row[0].started_at < 60
