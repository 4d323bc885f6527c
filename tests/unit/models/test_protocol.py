"""The job protocol against a model of it: any order of calls, by owners and by the dead.

The invariants are those of the design (RELIABILITY 5), by their numbers.
"""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, select

from core.errors import Conflict, LeaseLost
from core.lifecycle import JOB_TRANSITIONS, AttemptOutcome, JobStatus
from core.queue import QueueName
from models.job import Job
from models.outbox import relay_once
from models.repositories.jobs import Fence, JobRepository
from models.session import Database
from tests.unit.models.seeds import LEASE_S, Seeds, done_events, is_gapless

MAX_LOSSES = 2
MAX_RETRIES = 1


@dataclass
class ModelJob:
    """What the job should look like."""

    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    cancel: bool = False
    effects: int = 0
    seen: list[JobStatus] = field(default_factory=lambda: [JobStatus.QUEUED])

    def become(self, status: JobStatus) -> None:
        self.status = status
        self.seen.append(status)
        self.effects += status.is_terminal

    def give_back(self) -> None:
        self.become(JobStatus.CANCELLED if self.cancel else JobStatus.QUEUED)

    def lose(self) -> None:
        if not self.cancel and self.losses + 1 >= MAX_LOSSES:
            self.losses += 1
            self.become(JobStatus.FAILED)
            return
        if not self.cancel:
            self.losses += 1
        self.give_back()


class Hints:
    def __init__(self) -> None:
        self.count = 0

    def wake(self, queue: QueueName) -> None:
        self.count += 1


def _do_not_flush(connection: sqlite3.Connection, _entry: object) -> None:
    connection.execute("PRAGMA synchronous=OFF").close()


class Protocol(RuleBasedStateMachine):
    """Calls come from whoever owns a job and from whoever once did."""

    url_template = ""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kdpo-protocol-"))
        (self.folder / "kdpo.db").write_bytes(Path(self.url_template).read_bytes())
        self.database = Database(f"sqlite:///{self.folder / 'kdpo.db'}", pool_size=2)
        # No power fails here, and flushing every COMMIT would cost most of the examples.
        event.listen(self.database.engine, "connect", _do_not_flush)
        self.seeds = Seeds(self.database)
        self.model: dict[str, ModelJob] = {}
        self.fences: list[Fence] = []

    def teardown(self) -> None:
        self.database.dispose()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------- the moves

    @initialize()
    def begin(self) -> None:
        self.submit()

    @rule()
    def submit(self) -> None:
        if len(self.model) < 3:
            self.model[self.seeds.job()] = ModelJob()

    @rule()
    def claim(self) -> None:
        self.seeds.make_due()
        claim = self.seeds.claim()
        queued = [job_id for job_id, job in self.model.items() if job.status is JobStatus.QUEUED]
        assert (claim is None) == (not queued)
        if claim is None:
            return
        job = self.model[claim.fence.job_id]
        job.attempt += 1
        job.become(JobStatus.RUNNING)
        assert claim.fence.attempt == job.attempt  # I4
        self.fences.append(claim.fence)

    def owns(self, fence: Fence) -> bool:
        job = self.model[fence.job_id]
        return job.status is JobStatus.RUNNING and job.attempt == fence.attempt

    def fence(self, data: st.DataObject) -> Fence:
        """Draw an owner or any fence ever given out; most of those are stale."""
        owners = [fence for fence in self.fences if self.owns(fence)]
        any_fence = st.sampled_from([Fence(next(iter(self.model)), 0), *self.fences])
        return data.draw(st.one_of(st.sampled_from(owners), any_fence) if owners else any_fence)

    def write(self, fence: Fence, method: str, *arguments: Any, **named: Any) -> bool:
        """Call a fenced method; it must work for the owner and for nobody else."""
        try:
            with self.database.transaction() as session:
                getattr(JobRepository(session), method)(fence, *arguments, **named)
        except LeaseLost:
            assert not self.owns(fence)
            return False
        assert self.owns(fence)
        return True

    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        fence = self.fence(data)
        self.write(fence, "heartbeat", lease_s=LEASE_S)

    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        fence = self.fence(data)
        if self.write(fence, "progressed"):
            self.model[fence.job_id].losses = 0

    @rule(data=st.data(), status=st.sampled_from([JobStatus.SUCCEEDED, JobStatus.CANCELLED]))
    def finish(self, data: st.DataObject, status: JobStatus) -> None:
        fence = self.fence(data)
        if self.write(fence, "finish", status, result={"by": fence.attempt}, message="over"):
            self.model[fence.job_id].become(status)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        fence = self.fence(data)
        if self.write(fence, "requeue", AttemptOutcome.PREEMPTED, delay_s=0.0, message="again"):
            self.model[fence.job_id].give_back()

    @rule(data=st.data(), retryable=st.booleans())
    def fail(self, data: st.DataObject, retryable: bool) -> None:
        fence = self.fence(data)
        error = {"code": "internal", "message": "it broke", "retryable": retryable}
        if not self.write(fence, "fail", error, max_retries=MAX_RETRIES, backoff_s=9.0):
            return
        job = self.model[fence.job_id]
        if not retryable or job.failures >= MAX_RETRIES:
            job.become(JobStatus.FAILED)
            return
        if not job.cancel:
            job.failures += 1
        job.give_back()

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        fence = self.fence(data)
        if self.write(
            fence, "lose", message="gone", log_tail=[], max_losses=MAX_LOSSES, backoff_s=9.0
        ):
            self.model[fence.job_id].lose()

    @rule(data=st.data())
    def lease_runs_out(self, data: st.DataObject) -> None:
        running = [j for j, job in self.model.items() if job.status is JobStatus.RUNNING]
        if running:
            self.seeds.expire(data.draw(st.sampled_from(running)))

    @rule()
    def reap(self) -> None:
        with self.database.transaction() as session:
            reaped = JobRepository(session).reap(max_losses=MAX_LOSSES, backoff_s=9.0)
        for one in reaped:
            assert self.owns(one.fence)
            self.model[one.fence.job_id].lose()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[job_id]
        try:
            with self.database.transaction() as session:
                JobRepository(session).request_cancel(self.seeds.owner_id, job_id)
        except Conflict:
            assert job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED)
            return
        assert job.status not in (JobStatus.SUCCEEDED, JobStatus.FAILED)
        if job.status is JobStatus.QUEUED:
            job.cancel = True
            job.become(JobStatus.CANCELLED)
        elif job.status is JobStatus.RUNNING:
            job.cancel = True

    @rule()
    def relay(self) -> None:
        hints, owed = Hints(), bool(self.seeds.owed())
        self.seeds.make_due()
        relay_once(self.database, hints)
        assert hints.count == owed
        assert self.seeds.owed() == []

    # ------------------------------------------------------------ invariants

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        with self.database.reading() as session:
            rows = {row.id: row for row in session.execute(select(Job)).scalars()}
        assert rows.keys() == self.model.keys()  # I1: what was accepted is there
        for job_id, job in self.model.items():
            row = rows[job_id]
            assert (row.status, row.attempt) == (job.status, job.attempt)
            assert (row.failures, row.losses) == (job.failures, job.losses)
            assert (row.cancel_requested_at is not None) == job.cancel
            running = row.status is JobStatus.RUNNING
            assert (row.lease_until is not None) == running  # I6, I7: running can expire
            assert (row.lease_owner is not None) == running
            assert (row.finished_at is not None) == row.status.is_terminal

    @invariant()
    def history_is_legal(self) -> None:
        for job_id, job in self.model.items():
            for source, target in zip(job.seen, job.seen[1:], strict=False):
                assert target in JOB_TRANSITIONS[source]  # I2, and I5: no way out of the end
            events = self.seeds.events(job_id)
            assert is_gapless(events)
            assert done_events(events) == job.effects <= 1  # I3
            told = [e.data["status"] for e in events if "status" in e.data]
            assert told == [status.value for status in job.seen]
            attempts = self.seeds.attempts(job_id)
            assert [number for number, _ in attempts] == list(range(1, job.attempt + 1))  # I4
            is_open = [outcome is None for _, outcome in attempts]
            assert is_open[:-1] == [False] * max(0, len(attempts) - 1)
            assert any(is_open) == (job.status is JobStatus.RUNNING)

    @invariant()
    def queued_jobs_can_be_found(self) -> None:
        """I7: a queued job is seen by the sweep, even when nothing owes it a wake-up."""
        self.seeds.make_due()
        with self.database.reading() as session:
            overdue = JobRepository(session).overdue_queues(older_than_s=0.5)
        assert bool(overdue) == any(j.status is JobStatus.QUEUED for j in self.model.values())


@pytest.fixture
def _template(_sqlite_template: Path) -> Iterator[None]:
    Protocol.url_template = str(_sqlite_template)
    yield
    Protocol.url_template = ""


@pytest.mark.usefixtures("_template")
def test_any_order_of_calls_keeps_the_invariants() -> None:
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=30,
            derandomize=True,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
