"""The test servers themselves: real, empty for each test, and gone afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from tests.servers import RedisServer, run_postgres

ROOT = Path(__file__).parents[2]


def _plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False


def test_each_test_gets_a_database_of_its_own(empty_postgres_url: str) -> None:
    with psycopg.connect(_plain(empty_postgres_url)) as connection:
        tables = connection.execute(
            "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
        ).fetchone()
        version = connection.execute("SHOW server_version_num").fetchone()
    assert tables == (0,)
    assert version is not None
    assert int(version[0]) >= 150000


def test_postgres_url_is_migrated(postgres_url: str) -> None:
    with psycopg.connect(_plain(postgres_url)) as connection:
        revision = connection.execute("SELECT version_num FROM kdpo_schema_version").fetchone()
    assert revision is not None


def test_redis_is_empty_at_first(redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    try:
        assert client.dbsize() == 0
        client.set("left-over", "1")
    finally:
        client.close()


@pytest.mark.parametrize("_again", [1, 2])
def test_redis_keys_of_another_test_are_gone(redis_url: str, _again: int) -> None:
    client = redis.Redis.from_url(redis_url)
    try:
        assert client.get("left-over") is None
        client.set("left-over", "1")
    finally:
        client.close()


def test_redis_keeps_acknowledged_keys_over_a_kill(redis_server: RedisServer) -> None:
    client = redis.Redis.from_url(redis_server.url)
    try:
        client.set("kept", "1")
        redis_server.kill()
        with pytest.raises(redis.exceptions.ConnectionError):
            client.get("kept")
        redis_server.start()
        assert client.get("kept") == b"1"
    finally:
        client.close()


def test_postgres_ends_with_its_context() -> None:
    with run_postgres() as url:
        data = Path(str(make_url(url).query["host"]))
        pid = int((data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not data.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_servers_die_with_a_killed_test_run(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from tests.servers import run_redis\n"
        "with run_redis() as server:\n"
        "    print(server.url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        client = redis.Redis.from_url(parent.stdout.readline().strip())
    try:
        assert _answers(client)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 60
        while _answers(client):
            assert time.monotonic() < deadline, "the server outlived the test run by 60 s"
            time.sleep(0.05)
    finally:
        client.close()
