"""Celery as kdpo uses it: it wakes this process for a queue, and nothing else."""

from collections.abc import Callable

from celery import Celery
from kombu.exceptions import OperationalError

from core.broker import broker_unavailable, celery_config, make_broker_folders
from core.queue import QueueName, TaskName
from core.settings import Settings
from worker.tasks import register_tasks

OnWake = Callable[[QueueName], None]


def make_celery(settings: Settings, on_wake: OnWake | None = None) -> Celery:
    """Return the configured app; without `on_wake` it can send wake-ups and not handle them."""
    celery = Celery("kdpo", set_as_current=False)
    celery.conf.update(celery_config(settings))
    register_tasks(celery, on_wake or _nobody_home)
    make_broker_folders(settings)
    return celery


class CelerySender:
    """The WakeSender of workers."""

    def __init__(self, celery: Celery, settings: Settings) -> None:
        self._celery = celery
        self._settings = settings

    def wake(self, queue: QueueName) -> None:
        """Send the hint that a queue may have work.

        Raises:
            Unavailable: the broker does not answer.
        """
        try:
            make_broker_folders(self._settings)
            self._celery.send_task(
                TaskName.WAKE.value, kwargs={"queue": queue.value}, queue=queue.value,
                retry=False, ignore_result=True,
            )  # fmt: skip
        except (OperationalError, OSError) as error:
            raise broker_unavailable(error) from error


def _nobody_home(queue: QueueName) -> None:
    raise RuntimeError(f"woken for queue {queue.value}; this process only sends wake-ups")
