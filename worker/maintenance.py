"""What a worker does beside its jobs: shows that it lives, and wakes itself for forgotten work."""

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version

from core.errors import StorageFull, Unavailable
from core.queue import QueueName, WakeSender
from core.settings import Settings
from models.repositories.jobs import JobRepository
from models.repositories.workers import WorkerRepository
from models.session import Database
from worker.supervisor import Supervisor

_log = logging.getLogger("kdpo.worker")

_FORGET_AFTER_LEASES = 10


class Loop(threading.Thread):
    """Calls a function again and again until told to stop; an error is logged, never the end."""

    def __init__(self, name: str, function: Callable[[], None], *, period_s: float) -> None:
        super().__init__(name=name, daemon=True)
        self._function = function
        self._period_s = period_s
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._function()
            except (Unavailable, StorageFull) as error:
                _log.warning("%s is put off: %s", self.name, error.message)
            except Exception:
                _log.exception("%s failed and goes on", self.name)
            self._stopped.wait(self._period_s)

    def stop(self) -> None:
        self._stopped.set()


class WorkerUpkeep:
    """The row of this worker and the sweep for jobs whose wake-up was lost."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        sender: WakeSender,
        supervisor: Supervisor,
        *,
        worker_id: str,
        queues: Sequence[QueueName],
    ) -> None:
        self._limits = settings.worker
        self._database = database
        self._sender = sender
        self._supervisor = supervisor
        self._worker_id = worker_id
        self._queues = list(queues)

    def show_alive(self) -> None:
        """Renew the worker's row, forget rows of workers that died long ago."""
        with self._database.transaction() as session:
            workers = WorkerRepository(session)
            workers.beat(
                self._worker_id,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=version("kdpo"),
                queues=self._queues,
                draining=self._supervisor.draining,
            )
            workers.sweep(older_than_s=_FORGET_AFTER_LEASES * self._limits.lease_s)

    def wake_self(self) -> None:
        """Wake the own queues: jobs may be waiting from before this worker was there."""
        for queue in self._queues:
            self._sender.wake(queue)

    def sweep(self) -> None:
        """Wake queues with a job that is due for so long that its wake-up must be lost."""
        if self._supervisor.busy or self._supervisor.draining:
            return
        with self._database.reading() as session:
            overdue = JobRepository(session).overdue_queues(older_than_s=self._limits.sweep_s)
        for queue in overdue:
            if queue in self._queues:
                self._sender.wake(queue)

    def say_goodbye(self) -> None:
        """Remove the worker's row."""
        with self._database.transaction() as session:
            WorkerRepository(session).remove(self._worker_id)
