"""Events: appended under the job's row lock, so that `seq` has no gaps and no doubles."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session

from core.errors import NotFound
from core.ids import IdPrefix, new_id
from core.lifecycle import EventType, JobStatus, Phase
from models.job import Event, Job
from models.repositories.webhook_outbox import announce
from models.types import db_now

# SQLite nests the terms of an OR and allows some thousand parameters.
_JOBS_AT_ONCE = 200
_LEAST_SHARE = 10

Cursor = tuple[str, int]
"""A job, and the last of its events that somebody has."""


@dataclass(frozen=True)
class Pulse:
    """What a follower of a job looks at to see whether anything has happened."""

    event_seq: int
    version: int
    status: JobStatus
    phase: Phase | None
    progress: dict[str, Any] | None


def append_event(
    session: Session,
    job_id: str,
    type_: EventType,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> int:
    """Append one event in the caller's transaction and return its `seq`."""
    numbered = (
        update(Job)
        .where(Job.id == job_id)
        .values(event_seq=Job.event_seq + 1)
        .returning(Job.event_seq, Job.owner_id, Job.attempt, Job.kind)
        .execution_options(synchronize_session=False)
    )
    row = session.execute(numbered).one_or_none()
    if row is None:
        raise NotFound(f"no job {job_id!r}")
    event_id = new_id(IdPrefix.EVENT)
    session.add(
        Event(
            id=event_id,
            owner_id=row.owner_id,
            job_id=job_id,
            seq=row.event_seq,
            attempt=row.attempt,
            type=type_,
            level=level,
            message=message[:2000],
            data=data or {},
            created_at=db_now(),
        )
    )
    session.flush()
    announce(session, row.owner_id, job_id, row.kind, type_, data or {}, event_id=event_id)
    return int(row.event_seq)


def events_after(session: Session, job_id: str, seq: int, limit: int) -> list[Event]:
    """Return events of a job after a sequence number, oldest first."""
    statement = (
        select(Event)
        .where(Event.job_id == job_id, Event.seq > seq)
        .order_by(Event.seq)
        .limit(limit)
    )
    return list(session.execute(statement).scalars())


def events_before(session: Session, job_id: str, seq: int | None, limit: int) -> list[Event]:
    """Return events of a job before a sequence number (or the last ones), newest first."""
    statement = select(Event).where(Event.job_id == job_id)
    if seq is not None:
        statement = statement.where(Event.seq < seq)
    statement = statement.order_by(Event.seq.desc()).limit(limit)
    return list(session.execute(statement).scalars())


def seq_of(session: Session, job_id: str, event_id: str) -> int:
    """Return the sequence number of one of the job's events.

    Raises:
        NotFound: the job has no such event.
    """
    statement = select(Event.seq).where(Event.job_id == job_id, Event.id == event_id)
    seq = session.execute(statement).scalar_one_or_none()
    if seq is None:
        raise NotFound(f"job {job_id} has no event {event_id!r}", param="after")
    return seq


def pulses(session: Session, job_ids: Collection[str]) -> dict[str, Pulse]:
    """Return the pulses of those of the jobs that exist."""
    found: dict[str, Pulse] = {}
    rest = iter(job_ids)
    while some := list(islice(rest, _JOBS_AT_ONCE)):
        statement = select(
            Job.id, Job.event_seq, Job.version, Job.status, Job.phase, Job.progress
        ).where(Job.id.in_(some))
        found |= {row[0]: Pulse(*row[1:]) for row in session.execute(statement)}
    return found


def new_events(
    session: Session, cursors: Collection[Cursor], *, limit: int
) -> dict[Cursor, list[Event]]:
    """Return the next events behind each of many cursors, oldest first and without a gap.

    All together they are about `limit`, and each cursor has the same share of it, so that one far
    behind takes nothing from the others.
    """
    share = max(_LEAST_SHARE, limit // max(1, len(cursors)))
    of_job: dict[str, list[Event]] = {}
    rest = iter(cursors)
    while some := list(islice(rest, _JOBS_AT_ONCE)):
        wanted = (
            and_(Event.job_id == job_id, Event.seq > seq, Event.seq <= seq + share)
            for job_id, seq in some
        )
        for event in session.execute(select(Event).where(or_(*wanted))).scalars():
            of_job.setdefault(event.job_id, []).append(event)
    found: dict[Cursor, list[Event]] = {}
    for job_id, seq in cursors:
        known = {event.seq: event for event in of_job.get(job_id, ())}
        found[job_id, seq] = [known[n] for n in range(seq + 1, seq + share + 1) if n in known]
    return found
