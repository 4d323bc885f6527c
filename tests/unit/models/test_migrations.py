"""One tree of migrations makes the tables of the code, on both databases, and can go back."""

from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect

from models.base import Base
from models.migrate import VERSION_TABLE, alembic_config, is_newest, upgrade
from models.session import make_engine


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return str(request.getfixturevalue("empty_postgres_url"))


def table_names(url: str) -> set[str]:
    engine = make_engine(url, pool_size=1)
    try:
        return set(inspect(engine).get_table_names()) - {VERSION_TABLE}
    finally:
        engine.dispose()


def test_there_is_one_newest_revision() -> None:
    heads = ScriptDirectory.from_config(alembic_config("sqlite://")).get_heads()
    assert len(heads) == 1


def test_upgrade_makes_every_table_and_may_be_repeated(empty_url: str) -> None:
    upgrade(empty_url)
    assert table_names(empty_url) == set(Base.metadata.tables)
    upgrade(empty_url)
    assert table_names(empty_url) == set(Base.metadata.tables)


def test_newest_is_told_from_older(empty_url: str) -> None:
    assert not is_newest(empty_url)
    upgrade(empty_url)
    assert is_newest(empty_url)
    command.downgrade(alembic_config(empty_url), "-1")
    assert not is_newest(empty_url)


def test_tables_of_the_code_are_those_of_the_migrations(empty_url: str) -> None:
    upgrade(empty_url)
    command.check(alembic_config(empty_url))  # raises when autogenerate finds a difference


def test_check_sees_a_difference(empty_url: str) -> None:
    upgrade(empty_url)
    engine: Engine = make_engine(empty_url, pool_size=1)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE worker ADD COLUMN planted INTEGER")
    engine.dispose()
    with pytest.raises(Exception, match="New upgrade operations"):
        command.check(alembic_config(empty_url))


def test_downgrade_leaves_nothing_and_upgrade_comes_back(empty_url: str) -> None:
    upgrade(empty_url)
    command.downgrade(alembic_config(empty_url), "base")
    assert table_names(empty_url) == set()
    upgrade(empty_url)
    assert table_names(empty_url) == set(Base.metadata.tables)


def test_datasets_of_the_first_schema_are_first_versions(empty_url: str) -> None:
    config = alembic_config(empty_url)
    command.upgrade(config, "20261123_initial")
    engine: Engine = make_engine(empty_url, pool_size=1)
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO owner (id, name, created_at) VALUES ('own_a', 'ada', 1.0)",
            "INSERT INTO dataset (id, owner_id, created_at, name, status, job_id, bytes, sha256,"
            " policy) VALUES ('ds_a', 'own_a', 1.0, 'd', 'ready', 'job_a', 1, 'x', '{}')",
            "INSERT INTO job (id, owner_id, created_at, kind, queue, priority, status, attention,"
            " spec, dataset_id, seed, metadata, attempt, failures, losses, run_after, gpu_seconds,"
            " event_seq, version) VALUES ('job_a', 'own_a', 1.0, 'dataset', 'cpu', 0, 'succeeded',"
            " '[]', '{}', 'ds_a', 0, '{}', 1, 0, 0, 1.0, 0.0, 0, 1)",
        ):
            connection.exec_driver_sql(statement)
    command.upgrade(config, "head")
    with engine.begin() as connection:
        row = connection.exec_driver_sql(
            "SELECT d.upload_id, d.version, d.parent_id FROM dataset d JOIN job j"
            " ON j.dataset_id = d.id"
        ).one()
    engine.dispose()
    assert tuple(row) == ("ds_a", 1, None)
    command.downgrade(config, "20261123_initial")
