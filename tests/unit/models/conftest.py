from collections.abc import Iterator

import pytest

from models.session import Database
from tests.unit.models.seeds import Seeds


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database, once on SQLite and once on Postgres."""
    database = Database(database_url, pool_size=10)
    yield database
    database.dispose()


@pytest.fixture
def seeds(database: Database) -> Seeds:
    return Seeds(database)
