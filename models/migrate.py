"""Bring a database to the newest schema; the same call for SQLite and Postgres."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

import migrations
from models.session import make_engine

VERSION_TABLE = "kdpo_schema_version"
"""Another one than Alembic's default, so that a database may be shared."""


def alembic_config(url: str) -> Config:
    """Return Alembic's configuration for one database."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["database_url"] = url
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Run all migrations that are missing; nothing happens when there are none."""
    command.upgrade(alembic_config(url), revision)


def is_newest(url: str) -> bool:
    """Whether a database is at the newest revision."""
    newest = ScriptDirectory.from_config(alembic_config(url)).get_heads()
    engine = make_engine(url, pool_size=1)
    try:
        with engine.connect() as connection:
            told = {"version_table": VERSION_TABLE}
            found = MigrationContext.configure(connection, opts=told).get_current_heads()
    finally:
        engine.dispose()
    return set(found) == set(newest)
