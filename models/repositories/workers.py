"""Live workers."""

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from core.queue import QueueName
from models.job import Worker
from models.types import db_now


class WorkerRepository:
    """Reads and writes of worker rows in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def beat(
        self,
        worker_id: str,
        *,
        host: str,
        pid: int,
        version: str,
        queues: list[QueueName],
        draining: bool,
    ) -> None:
        """Note that a worker lives."""
        row = self._session.get(Worker, worker_id)
        if row is None:
            row = Worker(
                id=worker_id, host=host, pid=pid, version=version, queues=[q.value for q in queues]
            )
            self._session.add(row)
        row.seen_at = db_now()
        row.draining = draining
        self._session.flush()

    def live(self, *, within_s: float) -> list[Worker]:
        """Return workers seen lately."""
        statement = select(Worker).where(Worker.seen_at > db_now() - within_s).order_by(Worker.id)
        return list(self._session.execute(statement).scalars())

    def remove(self, worker_id: str) -> None:
        """Forget a worker that has stopped."""
        self._session.execute(delete(Worker).where(Worker.id == worker_id))

    def sweep(self, *, older_than_s: float) -> None:
        """Forget workers that died without a word."""
        self._session.execute(delete(Worker).where(Worker.seen_at < db_now() - older_than_s))
