"""Which errors of a database mean that it is away, full, or that the statement is wrong."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from core.errors import KdpoError, StorageFull, Unavailable
from models.session import Database, is_table_missing, is_value_refused


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'small.db'}", pool_size=1)
    with database.transaction() as session:
        session.execute(text("CREATE TABLE t (data TEXT)"))
    yield database
    database.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://nobody@no-such-host.invalid/none",
        "postgresql+psycopg://nobody@127.0.0.1:1/none",
        "postgresql+psycopg://nobody@/none?host=/nonexistent",
        "sqlite:////proc/none.db",
    ],
)
def test_database_that_cannot_be_reached_is_unavailable(url: str) -> None:
    database = Database(url, pool_size=1)
    try:
        with pytest.raises(Unavailable), database.reading() as session:
            session.execute(text("SELECT 1"))
    finally:
        database.dispose()


def test_locked_sqlite_is_unavailable(small: Database) -> None:
    with closing(sqlite3.connect(str(small.engine.url.database), isolation_level=None)) as other:
        with small.reading() as session:
            session.execute(text("PRAGMA busy_timeout=0"))
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable), small.transaction() as session:
            session.execute(text("INSERT INTO t VALUES ('x')"))


def test_full_sqlite_is_storage_full(small: Database) -> None:
    with small.reading() as session:
        session.execute(text("PRAGMA max_page_count=4"))
    with pytest.raises(StorageFull), small.transaction() as session:
        session.execute(text("INSERT INTO t VALUES (:data)"), {"data": "x" * 100_000})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.errors.DiskFull(), StorageFull),
        (psycopg.errors.AdminShutdown(), Unavailable),
        (psycopg.errors.DeadlockDetected(), Unavailable),
        (psycopg.OperationalError("failed to resolve host 'db'"), Unavailable),
        (psycopg.InterfaceError("bad pipeline state"), Unavailable),
    ],
)
def test_states_of_postgres(
    error: psycopg.Error, expected: type[KdpoError], small: Database
) -> None:
    wrapped = DBAPIError.instance("SELECT 1", {}, error, psycopg.Error)
    with pytest.raises(expected), small.reading():
        raise wrapped


def test_wrong_statements_stay_what_they_are(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught, database.reading() as session:
        # A name with "locked" and "connection" in it: the text of a message decides nothing.
        session.execute(text("SELECT * FROM locked_connection"))
    assert is_table_missing(caught.value)
    assert not is_value_refused(caught.value)


def test_value_that_postgres_refuses_is_told_from_an_outage(postgres_url: str) -> None:
    database = Database(postgres_url, pool_size=1)
    try:
        with pytest.raises(DBAPIError) as caught, database.transaction() as session:
            session.execute(text("SELECT CAST(:value AS text)"), {"value": "a\0b"})
    finally:
        database.dispose()
    assert is_value_refused(caught.value)
    assert not is_table_missing(caught.value)
