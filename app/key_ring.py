"""The API keys in use: a client that asks again within a second is not looked up again."""

import time

from starlette.concurrency import run_in_threadpool

from app.keys import hash_key
from models.owner import ApiKey
from models.repositories.owners import OwnerRepository
from models.session import Database

KEPT_S = 1.0
"""How long another process may go on taking a key that was revoked in this one."""
TOUCH_EVERY_S = 60.0
_MAX_KEPT = 1_000


class KeyRing:
    """Finds usable keys by their secret; belongs to one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._kept: dict[str, tuple[ApiKey, float]] = {}
        self._forgotten = 0

    async def find(self, secret: str) -> ApiKey | None:
        """Return the key unless it is unknown, revoked or expired; its use is noted once a minute.

        One that was found is taken for `KEPT_S` seconds more, or until it expires.
        """
        secret_sha256, now = hash_key(secret), time.monotonic()
        key, until = self._kept.get(secret_sha256, (None, 0.0))
        if key is None or until <= now or _has_expired(key):
            before = self._forgotten
            key = await run_in_threadpool(self._look_up, secret_sha256)
            if len(self._kept) >= _MAX_KEPT:
                self._kept = {sha: kept for sha, kept in self._kept.items() if kept[1] > now}
            if key is not None and self._forgotten == before:
                self._kept[secret_sha256] = (key, now + KEPT_S)
        return key

    def forget(self) -> None:
        """Look every key up again: one of them was revoked, perhaps while it was looked up.

        Like `find`, it is called on the event loop.
        """
        self._forgotten += 1
        self._kept = {}

    def _look_up(self, secret_sha256: str) -> ApiKey | None:
        with self._database.reading() as session:
            key = OwnerRepository(session).find_usable_key(secret_sha256)
        if key is None:
            return None
        if key.last_used_at is None or key.last_used_at < time.time() - TOUCH_EVERY_S:
            with self._database.transaction() as session:
                OwnerRepository(session).touch_key(key.id, older_than_s=TOUCH_EVERY_S)
        return key


def _has_expired(key: ApiKey) -> bool:
    return key.expires_at is not None and key.expires_at <= time.time()
