import gc
import os
import uuid
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from tests.servers import RedisServer, ServerMissing, run_postgres, run_redis

_TESTS = Path(__file__).parent


def _without(missing: ServerMissing) -> NoReturn:
    """A server that is missing fails under CI and skips with its reason on a laptop."""
    if os.environ.get("CI"):
        pytest.fail(f"CI is set and {missing}", pytrace=False)
    pytest.skip(str(missing))


def _execute(admin_url: str, statement: str) -> None:
    url = make_url(admin_url).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as admin:
        admin.execute(statement.encode())


def _named(admin_url: str, database: str) -> str:
    url = make_url(admin_url).set(database=database, drivername="postgresql+psycopg")
    return url.render_as_string(hide_password=False)


# Files whose tests start processes; those that take longest come first, so that the cores end
# together.
_LONG = ("e2e", "integration/test_search", "integration/test_schema", "integration")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(_TESTS).as_posix()
        return next((n for n, long in enumerate(_LONG) if path.startswith(long)), len(_LONG))

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import without garbage collections: modules stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _only_new_garbage() -> None:
    """Leave what is there out of garbage collections: with all modules each takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Admin URL of a real Postgres: `TEST_DATABASE_URL`, or a server of our own."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield make_url(given).set(drivername="postgresql+psycopg").render_as_string(False)
        return
    with ExitStack() as stack:
        try:
            url = stack.enter_context(run_postgres())
        except ServerMissing as missing:
            _without(missing)
        yield url


@pytest.fixture(scope="session")
def _postgres_template(postgres_server: str) -> Iterator[str]:
    """Name of a database at the newest migration; tests get clones of it."""
    from models.migrate import upgrade

    name = f"kdpo_template_{uuid.uuid4().hex[:12]}"
    _execute(postgres_server, f"CREATE DATABASE {name}")
    upgrade(_named(postgres_server, name))
    yield name
    _execute(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of a fresh Postgres database without tables."""
    name = f"kdpo_{uuid.uuid4().hex[:12]}"
    _execute(postgres_server, f"CREATE DATABASE {name}")
    yield _named(postgres_server, name)
    _execute(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_server: str, _postgres_template: str) -> Iterator[str]:
    """URL of a fresh Postgres database at the newest migration."""
    name = f"kdpo_{uuid.uuid4().hex[:12]}"
    _execute(postgres_server, f"CREATE DATABASE {name} TEMPLATE {_postgres_template}")
    yield _named(postgres_server, name)
    _execute(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models.migrate import upgrade

    file = tmp_path_factory.mktemp("sqlite-template") / "template.db"
    upgrade(f"sqlite:///{file}")
    left_over = [p.name for p in file.parent.iterdir() if p != file]
    assert not left_over, f"upgrade() left its connection open: {left_over}"
    return file


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """URL of a fresh SQLite file at the newest migration."""
    file = tmp_path / "kdpo.db"
    file.write_bytes(_sqlite_template.read_bytes())
    return f"sqlite:///{file}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of a fresh migrated database, once on SQLite and once on Postgres."""
    url = request.getfixturevalue(f"{request.param}_url")
    assert isinstance(url, str)
    return url


def _own_redis_database(url: str) -> str:
    """The n-th database after the given one for the n-th process of the tests: they empty it."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    with redis.Redis.from_url(url) as client:
        number = int(client.connection_pool.connection_kwargs.get("db", 0)) + int(worker[2:])
    return urlsplit(url)._replace(path=f"/{number}", query="").geturl()


@pytest.fixture(scope="session")
def _redis_shared() -> Iterator[str]:
    given = os.environ.get("TEST_REDIS_URL")
    if given:
        yield _own_redis_database(given)
        return
    with ExitStack() as stack:
        try:
            server = stack.enter_context(run_redis())
        except ServerMissing as missing:
            _without(missing)
        yield server.url


@pytest.fixture
def redis_url(_redis_shared: str) -> str:
    """URL of a Redis database that has just been emptied."""
    client = redis.Redis.from_url(_redis_shared)
    try:
        client.flushdb()
    finally:
        client.close()
    return _redis_shared


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis of the test's own, to be killed and started again."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(run_redis())
        except ServerMissing as missing:
            _without(missing)
        yield server
