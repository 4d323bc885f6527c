"""Health check of a worker container: this host's worker has been seen in the database lately."""

import socket
import sys

from core.settings import Settings
from models.repositories.workers import WorkerRepository
from models.session import Database


def is_healthy(settings: Settings, host: str) -> bool:
    """Whether a worker of `host` has reported within one lease."""
    database = Database(settings.database_url, pool_size=1)
    try:
        with database.reading() as session:
            live = WorkerRepository(session).live(within_s=settings.worker.lease_s)
            return any(worker.host == host for worker in live)
    finally:
        database.dispose()


if __name__ == "__main__":
    sys.exit(0 if is_healthy(Settings(), socket.gethostname()) else 1)
