"""The contract between API and workers: a queue name wakes a worker, the database has the job."""

from enum import StrEnum
from typing import Protocol

from core.lifecycle import JobKind


class QueueName(StrEnum):
    """Queues by the machine they need: `cpu` parses data, `gpu` runs the model."""

    CPU = "cpu"
    GPU = "gpu"


class TaskName(StrEnum):
    """Names of Celery tasks; the API sends by name and never imports the worker."""

    WAKE = "kdpo.wake"


QUEUE_OF_KIND: dict[JobKind, QueueName] = {
    JobKind.DATASET: QueueName.CPU,
    JobKind.RECOMMENDATION: QueueName.GPU,
    JobKind.TRAINING: QueueName.GPU,
    JobKind.EXPORT: QueueName.GPU,
    JobKind.EVALUATION: QueueName.GPU,
    JobKind.SEARCH: QueueName.GPU,
}


class WakeSender(Protocol):
    """Sends a hint that a queue may have work; at least once, carries no job."""

    def wake(self, queue: QueueName) -> None:
        """Send the hint.

        Raises:
            Unavailable: the broker does not answer.
        """
