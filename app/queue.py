"""Sends wake-ups to workers by the name of a task; what a job is stays in the database."""

import logging

from celery import Celery
from kombu.exceptions import OperationalError

from core.broker import broker_unavailable, celery_config, make_broker_folders
from core.errors import StorageFull, Unavailable
from core.queue import QueueName, TaskName
from core.settings import Settings
from models.outbox import relay_once
from models.session import Database

_log = logging.getLogger("kdpo.queue")

# Files and sockets both fail with OSError; kombu wraps what its transports call recoverable.
_BROKER_ERRORS = (OperationalError, OSError)
_RETRY = {"max_retries": 1, "interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.2}


class CeleryQueue:
    """The WakeSender of the API."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._celery = Celery("kdpo", set_as_current=False)
        self._celery.conf.update(celery_config(settings))

    def wake(self, queue: QueueName) -> None:
        """Send the hint that a queue may have work.

        Raises:
            Unavailable: the broker does not answer.
        """
        try:
            make_broker_folders(self._settings)
            self._celery.send_task(
                TaskName.WAKE.value, kwargs={"queue": queue.value}, queue=queue.value,
                retry=True, retry_policy=_RETRY, ignore_result=True,
            )  # fmt: skip
        except _BROKER_ERRORS as error:
            raise broker_unavailable(error) from error

    def check(self) -> None:
        """Reach the broker once.

        Raises:
            Unavailable: the broker does not answer.
        """
        try:
            make_broker_folders(self._settings)
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=3)
        except _BROKER_ERRORS as error:
            raise broker_unavailable(error) from error

    def close(self) -> None:
        """Close all connections to the broker."""
        self._celery.close()


def relay_now(database: Database, queue: CeleryQueue) -> None:
    """Send what a request has just committed; when that fails, the outbox keeps it for later."""
    try:
        relay_once(database, queue)
    except (Unavailable, StorageFull) as error:
        # The request is committed: whatever hinders the wake-up must not make it fail.
        _log.warning("a wake-up waits in the outbox: %s", error.message)
