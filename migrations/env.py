"""Alembic's environment: one tree for both databases, batch mode on SQLite."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON, UnaryExpression

import models
from models.migrate import VERSION_TABLE
from models.session import make_engine
from models.types import EnumText


def render_plain(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """Write a migration with plain types, so that it means the same when the code has moved on."""
    if kind == "type" and isinstance(item, EnumText):
        return "sa.String(length=40)"
    if kind == "type" and isinstance(item, JSON):
        autogen.imports.add("from sqlalchemy.dialects import postgresql")
        return 'sa.JSON().with_variant(postgresql.JSONB(), "postgresql")'
    return False


def is_compared(item: Any, _name: Any, kind: str, reflected: bool, other: Any) -> bool:
    """SQLite does not tell which way a column of an index runs; such an index only has to be."""
    has_directions = kind == "index" and any(
        isinstance(part, UnaryExpression) for part in item.expressions
    )
    return not (is_sqlite and has_directions and not reflected and other is not None)


url: str | None = context.config.attributes.get("database_url")
if url is None:
    raise SystemExit("run migrations with `kdpo migrate` or models.migrate.upgrade(url)")

engine = make_engine(url, pool_size=1)
with engine.connect() as connection:
    is_sqlite = connection.dialect.name == "sqlite"
    if is_sqlite:
        # Batch mode drops and makes tables that others refer to. The pragma has no effect inside a
        # transaction, and every statement of the connection begins one: ask the driver.
        connection.connection.cursor().execute("PRAGMA foreign_keys=OFF").close()
    context.configure(
        connection=connection,
        target_metadata=models.Base.metadata,
        render_as_batch=is_sqlite,
        version_table=VERSION_TABLE,
        compare_type=True,
        render_item=render_plain,
        include_object=is_compared,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Two processes that start at once must not both create the tables.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(752104)")
        context.run_migrations()
        if is_sqlite:
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise SystemExit(
                    f"the migration would leave {len(broken)} rows without their owner"
                )
engine.dispose()
