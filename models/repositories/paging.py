"""Keyset pages over sortable ids: `after`, `before`, `order`, `limit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from sqlalchemy import Select, literal, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from core.ids import made_at

T = TypeVar("T")


@dataclass(frozen=True)
class PageQuery:
    """Where a page begins and how long it is."""

    limit: int = 20
    after: str | None = None
    before: str | None = None
    order: Literal["asc", "desc"] = "desc"


@dataclass(frozen=True)
class Page(Generic[T]):
    """Rows of one page in the asked order."""

    rows: Sequence[T]
    has_more: bool


def fetch_page(
    session: Session, statement: Select[T], key: InstrumentedAttribute[str], query: PageQuery
) -> Page[T]:
    """Return the page next to a cursor; the cursor's row need not exist any more.

    `before` gives the rows that come directly before the cursor in the asked order.
    """
    descending = query.order == "desc"
    if query.after is not None:
        statement = statement.where(key < query.after if descending else key > query.after)
    if query.before is not None:
        statement = statement.where(key > query.before if descending else key < query.before)
    return _page(session, statement, (key,), query)


def fetch_page_by_age(
    session: Session,
    statement: Select[T],
    created_at: InstrumentedAttribute[float],
    key: InstrumentedAttribute[str],
    query: PageQuery,
) -> Page[T]:
    """Return a page as `fetch_page` does, of rows whose ids begin differently: by age, then id.

    A cursor whose row is gone stands where its id says that it was made.
    """
    descending = query.order == "desc"
    place = tuple_(created_at, key)
    for cursor, is_behind in ((query.after, True), (query.before, False)):
        if cursor is None:
            continue
        made = session.execute(select(created_at).where(key == cursor)).scalar_one_or_none()
        there = tuple_(literal(made_at(cursor) if made is None else made), literal(cursor))
        statement = statement.where(place < there if descending == is_behind else place > there)
    return _page(session, statement, (created_at, key), query)


def _page(
    session: Session,
    statement: Select[T],
    keys: Sequence[InstrumentedAttribute[str] | InstrumentedAttribute[float]],
    query: PageQuery,
) -> Page[T]:
    backwards = query.before is not None and query.after is None
    downwards = (query.order == "desc") != backwards
    ordered = [key.desc() if downwards else key.asc() for key in keys]
    rows = list(session.execute(statement.order_by(*ordered).limit(query.limit + 1)).scalars())
    has_more = len(rows) > query.limit
    rows = rows[: query.limit]
    return Page(rows=rows[::-1] if backwards else rows, has_more=has_more)
