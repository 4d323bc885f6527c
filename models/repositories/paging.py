"""Keyset pages over sortable ids: `after`, `before`, `order`, `limit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

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
    backwards = query.before is not None and query.after is None
    downwards = descending != backwards
    statement = statement.order_by(key.desc() if downwards else key.asc()).limit(query.limit + 1)
    rows = list(session.execute(statement).scalars())
    has_more = len(rows) > query.limit
    rows = rows[: query.limit]
    return Page(rows=rows[::-1] if backwards else rows, has_more=has_more)
