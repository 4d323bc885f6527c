"""Everything that differs between SQLite and Postgres; no other file asks for the dialect."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Generic, TypeVar

from sqlalchemy import JSON, Dialect, Double, Executable, String
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

E = TypeVar("E", bound=StrEnum)

Json = JSON().with_variant(JSONB(), "postgresql")
Epoch = Double


class db_now(FunctionElement[float]):  # noqa: N801 - it is written like a function of SQL
    """Unix seconds of the database's clock; leases compare against this one only."""

    type = Double()
    inherit_cache = True


@compiles(db_now, "postgresql")
def _now_postgresql(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())"


@compiles(db_now, "sqlite")
def _now_sqlite(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    # unixepoch('subsec') is NULL before SQLite 3.42; a NULL lease would never expire.
    return "((julianday('now') - 2440587.5) * 86400.0)"


class EnumText(TypeDecorator[E], Generic[E]):
    """A StrEnum stored as its text; unknown text in the database is an error."""

    impl = String(40)
    cache_ok = True

    def __init__(self, enum: type[E]) -> None:
        super().__init__()
        self.enum = enum

    def process_bind_param(self, value: E | None, dialect: Dialect) -> str | None:
        return None if value is None else self.enum(value).value

    def process_result_value(self, value: Any, dialect: Dialect) -> E | None:
        return None if value is None else self.enum(value)


def upsert(
    session: Session,
    table: type[DeclarativeBase],
    values: Mapping[str, Any],
    *,
    key: Sequence[str],
    added: Sequence[str] = (),
) -> Executable:
    """Return the insert of a row that changes the one of the same key, if there is one.

    It takes over the values, and adds to those columns that `added` names.
    """
    is_postgres = session.get_bind().dialect.name == "postgresql"
    statement = (postgresql.insert if is_postgres else sqlite.insert)(table).values(**values)
    new = statement.excluded
    changes: dict[str, Any] = {name: new[name] for name in values if name not in key}
    columns = table.__table__.c
    changes |= {name: columns[name] + new[name] for name in added}
    return statement.on_conflict_do_update(index_elements=list(key), set_=changes)
