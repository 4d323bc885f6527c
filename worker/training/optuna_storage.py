"""Where studies live: a file beside the embedded database, or a schema of the same Postgres."""

from collections.abc import Iterator
from contextlib import contextmanager

import optuna

from core.settings import Settings
from models.study_storage import harden_sqlite, making_tables, study_url


@contextmanager
def open_storage(settings: Settings) -> Iterator[optuna.storages.RDBStorage]:
    """Open Optuna's storage, its tables made if missing; its connections are closed afterwards.

    Embedded: `optuna.db` in the data folder. Postgres: schema `optuna` of the main database, so
    that one backup holds both.
    """
    path = settings.root / "optuna.db"
    url = study_url(settings.database_url, sqlite_path=path)
    if url.get_backend_name() == "sqlite":
        options: dict[str, object] = {"connect_args": {"timeout": 30.0}}
    else:
        options = {"pool_pre_ping": True, "pool_recycle": 1800, "pool_size": 1, "max_overflow": 2}
    with making_tables(settings.database_url, sqlite_path=path):
        storage = optuna.storages.RDBStorage(
            url.render_as_string(hide_password=False), engine_kwargs=options
        )
    harden_sqlite(storage.engine)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()
