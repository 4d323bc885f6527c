"""The one Celery task. It carries a queue's name; which job runs, the database decides."""

from collections.abc import Callable

from celery import Celery

from core.queue import QueueName, TaskName


def register_tasks(celery: Celery, on_wake: Callable[[QueueName], None]) -> None:
    """Bind the wake-up to what handles it, in this app only: Celery shares tasks among apps."""

    @celery.task(name=TaskName.WAKE.value, ignore_result=True, shared=False)
    def wake(queue: str) -> None:
        on_wake(QueueName(queue))
