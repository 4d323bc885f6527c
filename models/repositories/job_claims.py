"""Which job a worker gets: owners take turns, and within an owner priority and age decide."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, Subquery, and_, bindparam, case, func, or_, select, update
from sqlalchemy.orm import aliased

from core.lifecycle import JobKind, JobStatus
from core.queue import QueueName
from models.job import Job, JobAttempt, Worker
from models.owner import Owner
from models.quota import QueueTurn, Quota
from models.repositories.job_moves import Fence, JobMoves
from models.repositories.job_requests import JobPulse
from models.repositories.quotas import DEFAULT_SUBJECT, UNLIMITED
from models.repositories.workers import WorkerRepository
from models.types import EnumText, db_now, upsert

_log = logging.getLogger("kdpo.queue")

QUARANTINE_S = 600.0


@dataclass(frozen=True)
class Claim:
    """A job that now belongs to one worker."""

    fence: Fence
    owner_id: str
    kind: JobKind


class JobClaims(JobMoves):
    """Takes jobs for workers, and says when the turn of a waiting one comes."""

    def claim(
        self,
        queue: QueueName,
        *,
        worker_id: str,
        lease_s: float,
        quarantine_s: float = QUARANTINE_S,
    ) -> Claim | None:
        """Take the next due job of a queue, or None; at most one worker gets each.

        The owner whom the queue served longest ago comes first, unless as many of the owner's jobs
        run as may; of the owner's jobs the one of the highest priority, then the oldest. A worker
        that is draining, or that lost its last jobs one after the other, gets none.
        """
        if not self._may_work(worker_id, quarantine_s):
            return None
        while True:
            with self._session.begin_nested() as attempt:
                row = self._take(queue, worker_id, lease_s)
                if row is None:
                    return None
                if self._keeps_limit(row.owner_id):
                    break
                # Two workers took the owner's last place at once; the next look sees the other's.
                attempt.rollback()
        turn = {"owner_id": row.owner_id, "queue": queue, "served_at": db_now()}
        self._session.execute(upsert(self._session, QueueTurn, turn, key=("owner_id", "queue")))
        self._session.add(JobAttempt(job_id=row.id, number=row.attempt, worker_id=worker_id))
        self._event_status(row.id, JobStatus.RUNNING, f"Attempt {row.attempt} has started.")
        return Claim(Fence(row.id, row.attempt), row.owner_id, row.kind)

    def queue_position(self, job: Job | JobPulse) -> int | None:
        """Return how many jobs are taken before a queued one if all owners may go on."""
        return self.queue_positions([job]).get(job.id)

    def queue_positions(self, jobs: Sequence[Job | JobPulse]) -> dict[str, int]:
        """Return of each queued one of the jobs how many are taken before it.

        Its owner's jobs before it, and of each other owner as many as that owner has turns until
        then: one for each of those, and one more for an owner whose turn is before this one's.
        """
        queued = {job.id: job for job in jobs if job.status is JobStatus.QUEUED}
        if not queued:
            return {}
        found: dict[str, int] = {}
        turns: dict[tuple[str, QueueName, float], list[tuple[int, int]]] = {}
        for job_id, ahead, delay in self._own_before(list(queued.values())):
            job = queued[job_id]
            # Those that are due have the same jobs of other owners before them.
            run_after = 0.0 if delay <= 0.0 else job.run_after
            key = (job.owner_id, job.queue, run_after)
            if key not in turns:
                turns[key] = self._others_waiting(*key)
            found[job_id] = ahead + sum(min(jobs, ahead + first) for jobs, first in turns[key])
        return found

    def _own_before(self, jobs: list[Job | JobPulse]) -> list[tuple[str, int, float]]:
        """Return of each job how many its owner has before it, and seconds until it is due.

        Many jobs are ranked at once; only for those that are not due yet others are counted.
        """
        ids = {job.id for job in jobs}
        found: list[tuple[str, int, float]] = []
        if len(ids) > 1:
            told = {"job_ids": list(ids), "owner_ids": list({job.owner_id for job in jobs})}
            ranks = self._session.execute(_own_ranks(), told)
            found = [(row[0], int(row[1]), 0.0) for row in ranks]
        rest = ids - {row[0] for row in found}
        if rest:
            rows = self._session.execute(_own_before(), {"job_ids": list(rest)})
            found += [(row[0], int(row[1]), float(row[2])) for row in rows]
        return found

    def _others_waiting(
        self, owner_id: str, queue: QueueName, run_after: float
    ) -> list[tuple[int, int]]:
        """Return how many jobs each other owner has waiting, and 1 where its turn is before."""
        told = {"owner_id": owner_id, "queue": queue, "run_after": run_after}
        return [(int(row[0]), int(row[1])) for row in self._session.execute(_others(), told)]

    def _may_work(self, worker_id: str, quarantine_s: float) -> bool:
        """Whether the worker may get a job."""
        worker = self._session.get(Worker, worker_id, populate_existing=True)
        if worker is not None and worker.drain_requested_at is not None:
            return False
        held = WorkerRepository(self._session).quarantine(worker_id, quarantine_s=quarantine_s)
        if held is None:
            return True
        _log.warning(
            "worker %s gets no job for %.0f s more: it lost its last %d attempts, at jobs %s",
            worker_id, held.seconds_left, held.losses, ", ".join(held.job_ids),
        )  # fmt: skip
        return False

    def _take(
        self, queue: QueueName, worker_id: str, lease_s: float
    ) -> Row[str, int, str, JobKind] | None:
        """Take a job in one statement.

        Owners with waiting jobs are found by one look-up in the index each, and tried in the order
        of their turns until one has a job to take. OFFSET keeps that order for the rows outside,
        and sorting there again would first try all owners and lock a job of each.
        """
        owners = self._owners_in_turn(queue)
        head = (
            select(Job.id)
            .where(
                Job.owner_id == owners.c.owner_id,
                Job.queue == queue,
                Job.status == _literal(JobStatus.QUEUED),
                Job.run_after <= db_now(),
            )
            .order_by(Job.priority.desc(), Job.created_at, Job.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .correlate(owners)
            .scalar_subquery()
        )
        heads = select(head.label("job_id")).select_from(owners).subquery("heads")
        next_id = (
            select(heads.c.job_id).where(heads.c.job_id.is_not(None)).limit(1).scalar_subquery()
        )
        taken = (
            update(Job)
            .where(Job.id == next_id, Job.status == JobStatus.QUEUED)
            .values(
                status=JobStatus.RUNNING,
                attempt=Job.attempt + 1,
                lease_owner=worker_id,
                lease_until=db_now() + lease_s,
                heartbeat_at=db_now(),
                started_at=func.coalesce(Job.started_at, db_now()),
                version=Job.version + 1,
            )
            .returning(Job.id, Job.attempt, Job.owner_id, Job.kind)
            .execution_options(synchronize_session=False)
        )
        return self._session.execute(taken).one_or_none()

    def _owners_in_turn(self, queue: QueueName) -> Subquery:
        """Return whose jobs wait in a queue and who may run one more, in the order of turns."""
        queued = (Job.queue == queue, Job.status == _literal(JobStatus.QUEUED))
        first = select(func.min(Job.owner_id).label("owner_id")).where(*queued)
        waiting = first.cte("waiting", recursive=True)
        following = (
            select(func.min(Job.owner_id))
            .where(*queued, Job.owner_id > waiting.c.owner_id)
            .correlate(waiting)
            .scalar_subquery()
        )
        waiting = waiting.union_all(select(following).where(waiting.c.owner_id.is_not(None)))
        owner_id = waiting.c.owner_id
        running = aliased(Job)
        runs = (
            select(func.count())
            .where(running.owner_id == owner_id, running.status == _literal(JobStatus.RUNNING))
            .correlate(waiting)
            .scalar_subquery()
        )
        limit = _running_limit(owner_id)
        turn = _served_at(owner_id, queue)
        return (
            select(owner_id, turn.label("turn"))
            .where(owner_id.is_not(None), or_(limit == UNLIMITED, runs < limit))
            .order_by(turn, owner_id)
            .offset(0)
            .subquery("owners")
        )

    def _keeps_limit(self, owner_id: str) -> bool:
        """Whether not too many of the owner's jobs run; no other worker changes it before the end.

        Only an owner with a limit is locked: the others' claims do not wait for each other.
        """
        limit = self._session.execute(select(_running_limit(owner_id))).scalar_one()
        if limit == UNLIMITED:
            return True
        self._session.execute(select(Owner.id).where(Owner.id == owner_id).with_for_update())
        runs = select(func.count()).where(
            Job.owner_id == owner_id, Job.status == _literal(JobStatus.RUNNING)
        )
        return bool(self._session.execute(runs).scalar_one() <= limit)


# The statements behind a queue position are asked with every poll of a queued job; to put one
# together takes longer than to run it.


@cache
def _own_before() -> Select[str, int, float]:
    """Of each of `job_ids`: how many its owner has before it, and seconds until it is due."""
    me = aliased(Job)
    before = (
        select(func.count())
        .where(
            Job.owner_id == me.owner_id,
            Job.queue == me.queue,
            Job.status == _literal(JobStatus.QUEUED),
            or_(Job.run_after <= db_now(), Job.run_after <= me.run_after),
            or_(
                Job.priority > me.priority,
                and_(
                    Job.priority == me.priority,
                    or_(
                        Job.created_at < me.created_at,
                        and_(Job.created_at == me.created_at, Job.id < me.id),
                    ),
                ),
            ),
        )
        .correlate(me)
        .scalar_subquery()
    )
    named = me.id.in_(bindparam("job_ids", expanding=True))
    return select(me.id, before, me.run_after - db_now()).where(named)


@cache
def _own_ranks() -> Select[str, int]:
    """Of those of `job_ids` that are due: how many jobs of `owner_ids` are before each."""
    order = (Job.priority.desc(), Job.created_at, Job.id)
    rank = func.row_number().over(partition_by=(Job.owner_id, Job.queue), order_by=order)
    ranked = (
        select(Job.id, (rank - 1).label("ahead"))
        .where(
            Job.owner_id.in_(bindparam("owner_ids", expanding=True)),
            Job.status == _literal(JobStatus.QUEUED),
            Job.run_after <= db_now(),
        )
        .subquery()
    )
    named = ranked.c.id.in_(bindparam("job_ids", expanding=True))
    return select(ranked.c.id, ranked.c.ahead).where(named)


@cache
def _others() -> Select[int, int]:
    """Jobs of other owners than `owner_id` due until `run_after`, and whose turn is before."""
    owner_id = bindparam("owner_id", type_=Job.owner_id.type)
    queue = bindparam("queue", type_=Job.queue.type)
    waiting = (
        select(Job.owner_id, func.count().label("jobs"))
        .where(
            Job.queue == queue,
            Job.status == _literal(JobStatus.QUEUED),
            or_(Job.run_after <= db_now(), Job.run_after <= bindparam("run_after")),
            Job.owner_id != owner_id,
        )
        .group_by(Job.owner_id)
        .subquery()
    )
    mine = _served_at(owner_id, queue)
    first = case(
        (func.coalesce(QueueTurn.served_at, 0.0) < mine, 1),
        (func.coalesce(QueueTurn.served_at, 0.0) > mine, 0),
        (waiting.c.owner_id < owner_id, 1),
        else_=0,
    )
    its_turn = and_(QueueTurn.owner_id == waiting.c.owner_id, QueueTurn.queue == queue)
    return select(waiting.c.jobs, first).outerjoin(QueueTurn, its_turn)


def _literal(status: JobStatus) -> Any:
    """Return the status as text in the statement: only then partial indexes are used."""
    return bindparam(None, status, type_=EnumText(JobStatus), literal_execute=True)


def _served_at(owner_id: Any, queue: Any) -> Any:
    """Return when the queue served an owner last, as SQL; 0 when it never did."""
    turn = aliased(QueueTurn)
    served = select(turn.served_at).where(turn.owner_id == owner_id, turn.queue == queue)
    return func.coalesce(served.correlate_except(turn).scalar_subquery(), 0.0)


def _running_limit(owner_id: Any) -> Any:
    """Return how many jobs of an owner may run, as SQL."""
    limits = []
    for subject in (owner_id, DEFAULT_SUBJECT):
        quota = aliased(Quota)
        limit = select(quota.running_jobs).where(quota.subject == subject)
        limits.append(limit.correlate_except(quota).scalar_subquery())
    return func.coalesce(*limits, UNLIMITED)
