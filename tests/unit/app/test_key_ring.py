"""Keys that are kept for a second: found again, forgotten, never put back after that."""

import threading

import anyio
import pytest

from app.key_ring import KeyRing
from app.keys import make_key
from models.repositories.owners import OwnerRepository
from models.session import Database

pytestmark = pytest.mark.anyio


def key_in(database: Database) -> tuple[str, str]:
    """A key's id and secret."""
    made = make_key("test")
    with database.transaction() as session:
        owners = OwnerRepository(session)
        row = owners.add_key(
            owner_id=owners.ensure("ada").id, name="k", prefix=made.prefix,
            secret_sha256=made.sha256, scopes=[],
        )  # fmt: skip
        return row.id, made.secret


def revoke(database: Database, key_id: str) -> None:
    with database.transaction() as session:
        assert OwnerRepository(session).revoke_key(key_id)


async def test_a_revoked_key_is_taken_until_it_is_forgotten(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    key_id, secret = key_in(database)
    ring = KeyRing(database)
    assert await ring.find("dk-test-unknown") is None
    first = await ring.find(secret)
    assert first is not None
    assert first.id == key_id
    revoke(database, key_id)
    assert await ring.find(secret) is first
    ring.forget()
    assert await ring.find(secret) is None
    database.dispose()


async def test_a_key_that_is_looked_up_while_it_is_revoked_is_not_kept(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    key_id, secret = key_in(database)
    ring = KeyRing(database)
    found, go_on = threading.Event(), threading.Event()
    look_up = ring._look_up

    def slowly(secret_sha256: str) -> object:
        key = look_up(secret_sha256)
        found.set()
        go_on.wait(10)
        return key

    monkeypatch.setattr(ring, "_look_up", slowly)
    async with anyio.create_task_group() as group:
        group.start_soon(ring.find, secret)
        await anyio.to_thread.run_sync(found.wait)
        revoke(database, key_id)
        ring.forget()
        go_on.set()
    assert await ring.find(secret) is None
    database.dispose()
