"""The database side of Optuna's own tables: their place, and one maker of them at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Engine, event, make_url, text
from sqlalchemy.schema import CreateSchema

from models.session import make_engine, sqlite_begin, sqlite_connect

SCHEMA = "optuna"
_LOCK_KEY = 0x6B64706F


def study_url(database_url: str, *, sqlite_path: Path) -> URL:
    """Where studies live: a file of their own, or the schema `optuna` of the same Postgres."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        return URL.create("sqlite", database=str(sqlite_path))
    return url.update_query_dict({"options": f"-csearch_path={SCHEMA}"})


@contextmanager
def making_tables(database_url: str, *, sqlite_path: Path) -> Iterator[None]:
    """Let one process at a time make tables; the schema is there within the block."""
    if make_url(database_url).get_backend_name() == "sqlite":
        sqlite_path.parent.mkdir(parents=True, exist_ok=True)
        with sqlite_path.with_name(f"{sqlite_path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        return
    engine = make_engine(database_url, pool_size=1)
    take = text("SELECT pg_advisory_xact_lock(:key)")
    try:
        with engine.begin() as connection:
            connection.execute(take, {"key": _LOCK_KEY})
            connection.execute(CreateSchema(SCHEMA, if_not_exists=True))
        with engine.begin() as connection:
            connection.execute(take, {"key": _LOCK_KEY})
            yield
    finally:
        engine.dispose()


def harden_sqlite(engine: Engine) -> None:
    """Give an engine that somebody else made the pragmas and transactions of ours."""
    if engine.dialect.name == "sqlite":
        engine.dispose()
        event.listen(engine, "connect", sqlite_connect)
        event.listen(engine, "begin", sqlite_begin)
