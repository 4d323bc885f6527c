"""Delivers what webhooks are owed; any number of workers may do it at once, each takes its own."""

import logging
import random
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import orjson

from core.settings import Settings
from core.webhook_events import DeliveryStatus, event_body
from core.webhook_signing import signed_headers
from models.repositories.webhooks import Due, WebhookRepository
from models.session import Database
from worker.webhook_sender import post

_log = logging.getLogger("kdpo.webhooks")

PERIOD_S = 1.0
_AT_ONCE = 8
_LEASE_MARGIN_S = 30.0


class Deliveries:
    """Rounds of deliveries. Nothing is sent inside a transaction."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings.webhooks
        self._database = database

    def run(self) -> None:
        """Send all that is due now.

        Raises:
            Unavailable: the database does not answer; what was claimed is due after its lease.
        """
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="webhook") as pool:
            while True:
                # Whoever hangs holds one place, and the others go on.
                due = self._claim(_AT_ONCE - len(running))
                running |= {pool.submit(self._deliver, one) for one in due}
                if not running:
                    return
                ended, running = wait(running, PERIOD_S, return_when=FIRST_COMPLETED)
                for one in ended:
                    one.result()

    def _claim(self, limit: int) -> list[Due]:
        if not limit:
            return []
        lease_s = self._settings.timeout_s + _LEASE_MARGIN_S
        with self._database.transaction() as session:
            return list(WebhookRepository(session).claim(lease_s=lease_s, limit=limit))

    def _deliver(self, due: Due) -> None:
        body = orjson.dumps(
            event_body(due.event_id, due.type, due.object_id, created_at=int(due.created_at))
        )
        headers = signed_headers(
            due.secrets, body, event_id=due.event_id, timestamp=int(time.time())
        )
        attempt = post(due.url, body, headers, self._settings)
        jitter = random.random()  # noqa: S311 - spreads retries, hides nothing
        with self._database.transaction() as session:
            status = WebhookRepository(session).settle(due, attempt, jitter=jitter)
        if status is not DeliveryStatus.DELIVERED:
            _log.warning("delivery %s, try %d: %s", due.id, due.tries, attempt.error)
