"""Bring a database to the newest schema; the same call for SQLite and Postgres."""

from pathlib import Path

from alembic import command
from alembic.config import Config

import migrations


def alembic_config(url: str) -> Config:
    """Return Alembic's configuration for one database."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["database_url"] = url
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Run all migrations that are missing; nothing happens when there are none."""
    command.upgrade(alembic_config(url), revision)
