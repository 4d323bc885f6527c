"""Requests that happen once for their key: begun, kept alive, answered, forgotten."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.ids import IdPrefix, new_id
from core.lifecycle import JobKind
from models.job import Job
from models.replay import Replay
from models.types import db_now

KEPT_S = 86_400.0
"""How long an answer is kept for requests with its key."""

# The claim that the present request has on its key; threads of a request inherit it.
_CLAIM: ContextVar[str | None] = ContextVar("kdpo_replay_claim", default=None)


@contextmanager
def claimed(replay_id: str) -> Iterator[None]:
    """Let jobs that are made in this block be found by the claim's key, whatever happens later."""
    token = _CLAIM.set(replay_id)
    try:
        yield
    finally:
        _CLAIM.reset(token)


def note_made(session: Session, job: Job) -> None:
    """Note, in the transaction that makes a job, which request it is made for.

    A request that stores data and makes a job of them has made the job.
    """
    replay_id = _CLAIM.get()
    if replay_id is None:
        return
    statement = update(Replay).where(Replay.id == replay_id)
    if job.kind is JobKind.DATASET:
        statement = statement.where(Replay.job_id.is_(None))
    session.execute(statement.values(job_id=job.id).execution_options(synchronize_session=False))


@dataclass(frozen=True)
class ReplayScope:
    """Within what a key means one request: the caller's API key, the method and the path."""

    caller_id: str
    method: str
    path: str
    key: str


@dataclass(frozen=True)
class Found:
    """What is known about a key; `running` says that the first request is not answered yet."""

    id: str
    running: bool
    fingerprint: str | None
    job: Job | None
    status: int | None
    headers: dict[str, Any]
    body: str | None


class ReplayRepository:
    """Reads and writes of kept answers in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def begin(self, scope: ReplayScope, *, lease_s: float) -> str | None:
        """Claim a key and return the id of the claim; None when it is known already."""
        row = Replay(
            id=new_id(IdPrefix.REPLAY),
            caller_id=scope.caller_id,
            method=scope.method,
            path=scope.path,
            key=scope.key,
            running_until=db_now() + lease_s,
        )
        try:
            with self._session.begin_nested():
                self._session.add(row)
        except IntegrityError:
            return None
        return row.id

    def find(self, scope: ReplayScope, *, not_older_s: float) -> Found | None:
        """Return what is known about a key; what is older counts as unknown and is removed."""
        of_key = _of(scope)
        self._session.execute(
            delete(Replay).where(
                *of_key,
                Replay.created_at < db_now() - not_older_s,
                or_(Replay.running_until.is_(None), Replay.running_until < db_now()),
            )
        )
        statement = select(Replay, Replay.running_until > db_now()).where(*of_key)
        found = self._session.execute(statement).one_or_none()
        if found is None:
            return None
        row, running = found
        return Found(
            id=row.id,
            running=bool(running),
            fingerprint=row.fingerprint,
            job=None if row.job_id is None else self._session.get(Job, row.job_id),
            status=row.status,
            headers=row.headers or {},
            body=row.body,
        )

    def renew(self, replay_id: str, *, lease_s: float) -> None:
        """Say that the request is still worked on."""
        self._write(replay_id, running_until=db_now() + lease_s)

    def answer(
        self,
        replay_id: str,
        *,
        fingerprint: str,
        status: int,
        headers: dict[str, str],
        body: str | None,
    ) -> None:
        """Keep the answer for requests to come."""
        self._write(
            replay_id, running_until=None, fingerprint=fingerprint, status=status,
            headers=headers, body=body,
        )  # fmt: skip

    def release(self, replay_id: str) -> None:
        """Let the key be used again, unless the request has made a job before it failed."""
        self._session.execute(delete(Replay).where(Replay.id == replay_id, Replay.job_id.is_(None)))
        self._write(replay_id, running_until=None)

    def forget(self, scope: ReplayScope) -> None:
        """Let a key be used anew, whatever is known about it."""
        self._session.execute(delete(Replay).where(*_of(scope)))

    def sweep(self, *, older_than_s: float, limit: int = 1000) -> int:
        """Remove old answers; return how many."""
        old = (
            select(Replay.id)
            .where(Replay.created_at < db_now() - older_than_s)
            .order_by(Replay.created_at)
            .limit(limit)
        )
        removed = delete(Replay).where(Replay.id.in_(old)).returning(Replay.id)
        return len(self._session.execute(removed).all())

    def _write(self, replay_id: str, **values: Any) -> None:
        self._session.execute(
            update(Replay)
            .where(Replay.id == replay_id)
            .values(**values)
            .execution_options(synchronize_session=False)
        )


def _of(scope: ReplayScope) -> tuple[ColumnElement[bool], ...]:
    return (
        Replay.caller_id == scope.caller_id,
        Replay.method == scope.method,
        Replay.path == scope.path,
        Replay.key == scope.key,
    )
