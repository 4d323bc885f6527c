"""Engine and transactions; the only place that commits."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    InterfaceError,
    InvalidatePoolError,
    OperationalError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from core.errors import StorageFull, Unavailable

_SQLITE_AWAY = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
    }
)
_POSTGRES_DISK_FULL = "53100"
_POSTGRES_NO_TABLE = "42P01"
# A server that went away meanwhile is noticed before it is asked; asking each time costs a round
# trip for each request.
_PING_IDLE_S = 1.0
_LEFT_AT = "kdpo.left_at"


def make_engine(url: str, *, pool_size: int = 10) -> Engine:
    """Create the engine; SQLite in WAL mode with BEGIN IMMEDIATE, so that no update is lost."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        engine = create_engine(
            parsed, pool_size=pool_size, max_overflow=pool_size, pool_recycle=1800,
            hide_parameters=True,
        )  # fmt: skip
        _ping_idle_connections(engine)
        return engine
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed, pool_size=pool_size, max_overflow=pool_size, hide_parameters=True,
        connect_args={"timeout": 30.0},
    )  # fmt: skip
    event.listen(engine, "connect", sqlite_connect)
    event.listen(engine, "begin", sqlite_begin)
    return engine


def _ping_idle_connections(engine: Engine) -> None:
    """Ask connections that have lain in the pool for a while whether they are alive."""

    def left(_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        entry.info[_LEFT_AT] = time.monotonic()

    def taken(
        connection: DBAPIConnection, entry: ConnectionPoolEntry, _proxy: PoolProxiedConnection
    ) -> None:
        left_at = entry.info.get(_LEFT_AT)
        if left_at is None or time.monotonic() - left_at < _PING_IDLE_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # The pool then makes new connections in the place of all that are older.
            raise InvalidatePoolError("a connection that lay idle is dead") from error

    event.listen(engine, "checkin", left)
    event.listen(engine, "checkout", taken)


def sqlite_connect(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """Set the pragmas of a new connection; transactions are begun by `sqlite_begin`."""
    if not isinstance(connection, sqlite3.Connection):
        raise TypeError(f"expected sqlite3.Connection, got {type(connection).__name__}")
    connection.isolation_level = None
    for pragma in (
        "busy_timeout=30000",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def sqlite_begin(connection: Connection) -> None:
    """Begin a transaction, taking the write lock at once unless it only reads."""
    # A deferred transaction that reads and then writes fails with BUSY_SNAPSHOT at once.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


class Database:
    """Hands out transactions on one engine; made once per process, never across a fork."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self.engine = make_engine(url, pool_size=pool_size)
        self._reader = self.engine.execution_options(read_only=True)
        if self.engine.dialect.name != "sqlite":
            # Statements see what was committed before each of them, as in a transaction at READ
            # COMMITTED, and those of BEGIN and ROLLBACK are saved.
            self._reader = self._reader.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commit when the block ends, roll back when it raises.

        Raises:
            Unavailable: the database cannot be reached.
            StorageFull: the disk of an embedded database is full.
        """
        with self._translated(), Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that only reads; objects stay usable after the block."""
        with self._translated(), Session(self._reader, expire_on_commit=False) as session:
            yield session
            session.expunge_all()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if is_disk_full(error):
                raise StorageFull(
                    "the database has no room left on its disk", hint="free space and try again"
                ) from error
            if is_away(error):
                raise Unavailable("the database does not answer; try again shortly") from error
            raise
        except PoolTimeout as error:
            raise Unavailable("all database connections are in use; try again shortly") from error

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def is_disk_full(error: DBAPIError) -> bool:
    """Whether the database could not write for want of room."""
    primary = _sqlite_code(error)
    if primary is not None:
        return primary == sqlite3.SQLITE_FULL
    return _sqlstate(error) == _POSTGRES_DISK_FULL


def is_away(error: DBAPIError) -> bool:
    """Whether the same statement may pass later: the database, not the statement, is at fault."""
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return _sqlite_code(error) in _SQLITE_AWAY
    # Of psycopg, these two classes are all about the connection and the server's state.
    return isinstance(error, OperationalError | InterfaceError)


def is_table_missing(error: DBAPIError) -> bool:
    """Whether the database has not been migrated."""
    if isinstance(error.orig, sqlite3.Error):
        # SQLite has no code of its own for it.
        return str(error.orig).startswith("no such table")
    return _sqlstate(error) == _POSTGRES_NO_TABLE


def is_value_refused(error: Exception) -> bool:
    """Whether a value can never be stored, so that writing it again is of no use."""
    if isinstance(error, DBAPIError):
        return isinstance(error, DataError)
    return isinstance(error, StatementError)


def _sqlite_code(error: DBAPIError) -> int | None:
    """Return the primary result code, which is the low byte of an extended one."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)
