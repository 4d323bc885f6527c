"""The audit log: entries are added, listed, and forgotten when they are old."""

from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from core.ids import IdPrefix, new_id
from models.audit import AuditEntry
from models.repositories.paging import Page, PageQuery, fetch_page
from models.types import db_now


@dataclass(frozen=True)
class Deed:
    """What one request did."""

    owner_id: str
    key_id: str | None
    operation: str
    object_id: str | None
    method: str
    path: str
    status: int
    address: str | None
    request_id: str


@dataclass(frozen=True)
class AuditFilter:
    """Which entries are asked for; None is all."""

    owner_id: str | None = None
    key_id: str | None = None
    operation: str | None = None
    object_id: str | None = None
    since: float | None = None
    until: float | None = None


class AuditRepository:
    """Reads and writes of audit entries in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, deed: Deed) -> None:
        """Write one entry."""
        self._session.add(
            AuditEntry(
                id=new_id(IdPrefix.AUDIT),
                owner_id=deed.owner_id,
                key_id=deed.key_id,
                operation=deed.operation[:80],
                object_id=None if deed.object_id is None else _shown(deed.object_id)[:100],
                method=deed.method[:10],
                path=_shown(deed.path)[:500],
                status=deed.status,
                address=None if deed.address is None else deed.address[:64],
                request_id=deed.request_id,
            )
        )

    def page(self, query: PageQuery, wanted: AuditFilter) -> Page[AuditEntry]:
        """Return one page of the entries that pass the filter."""
        statement = select(AuditEntry)
        for column, value in (
            (AuditEntry.owner_id, wanted.owner_id),
            (AuditEntry.key_id, wanted.key_id),
            (AuditEntry.operation, wanted.operation),
            (AuditEntry.object_id, wanted.object_id),
        ):
            if value is not None:
                statement = statement.where(column == value)
        if wanted.since is not None:
            statement = statement.where(AuditEntry.created_at >= wanted.since)
        if wanted.until is not None:
            statement = statement.where(AuditEntry.created_at < wanted.until)
        return fetch_page(self._session, statement, AuditEntry.id, query)

    def sweep(self, *, older_than_s: float) -> None:
        """Forget old entries."""
        self._session.execute(
            delete(AuditEntry).where(AuditEntry.created_at < db_now() - older_than_s)
        )


def _shown(text: str) -> str:
    """Return a text as any database takes it: paths are what clients say, NUL and all."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
