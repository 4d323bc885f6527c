"""`python -m worker.main --queue cpu`: one worker process, one job at a time."""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from celery import Celery, signals

from core.broker import make_broker_folders
from core.errors import StorageFull, Unavailable
from core.ids import IdPrefix, new_id
from core.logs import configure_logging
from core.queue import QueueName
from core.settings import Settings
from models.maintenance import Maintenance
from models.session import Database
from worker.celery_app import CelerySender, make_celery
from worker.cleanup import PERIOD_S as CLEANUP_S
from worker.cleanup import Cleanup
from worker.deliveries import PERIOD_S as DELIVERIES_S
from worker.deliveries import Deliveries
from worker.expiry import PERIOD_S as EXPIRY_S
from worker.expiry import Expiry
from worker.maintenance import Loop, WorkerUpkeep
from worker.supervisor import Supervisor

_log = logging.getLogger("kdpo.worker")

# After the runner's own grace: time to write down how it ended.
_EXIT_MARGIN_S = 5.0
_RESTART_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the named queues until a signal or the end of the parent; return the exit code."""
    arguments = _parse(argv)
    queues = list(dict.fromkeys(QueueName(name) for name in arguments.queue))
    settings = Settings()
    configure_logging(settings.log_level)
    database = Database(settings.database_url, pool_size=settings.db.pool_size)
    worker_id = new_id(IdPrefix.WORKER)
    supervisor = Supervisor(settings, database, worker_id=worker_id)
    celery = make_celery(settings, supervisor.drain)
    sender = CelerySender(celery, settings)
    upkeep = WorkerUpkeep(
        settings, database, sender, supervisor, worker_id=worker_id, queues=queues
    )
    maintenance = Maintenance(database, sender, settings)
    limits = settings.worker
    loops = [
        Loop("upkeep", maintenance.tick, period_s=min(maintenance.period_s, limits.reap_s)),
        Loop("worker-row", upkeep.show_alive, period_s=limits.heartbeat_s),
        Loop("sweep", upkeep.sweep, period_s=limits.sweep_s),
        Loop("cleanup", Cleanup(settings, database).run, period_s=CLEANUP_S),
        Loop("expiry", Expiry(settings, database).run, period_s=EXPIRY_S),
        Loop("deliveries", Deliveries(settings, database).run, period_s=DELIVERIES_S),
        Loop("broker-folders", lambda: make_broker_folders(settings), period_s=1.0),
    ]
    if arguments.parent_pipe:
        threading.Thread(
            target=_follow_parent, args=(limits.kill_grace_s + _EXIT_MARGIN_S,),
            name="parent", daemon=True,
        ).start()  # fmt: skip
    for loop in loops:
        loop.start()
    try:
        upkeep.wake_self()
    except Unavailable as error:
        _log.warning("the broker does not answer yet: %s", error.message)
    try:
        return _serve(celery, supervisor, queues, settings)
    finally:
        supervisor.close()
        for loop in loops:
            loop.stop()
        with suppress(Unavailable, StorageFull):  # the row is forgotten later anyway
            upkeep.say_goodbye()
        database.dispose()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="worker.main", description="Run kdpo jobs.")
    parser.add_argument(
        "--queue", action="append", required=True, choices=[queue.value for queue in QueueName],
        help="serve this queue; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--parent-pipe", action="store_true",
        help="stop when standard input ends: the process that started this one is gone",
    )  # fmt: skip
    return parser.parse_args(argv)


def _serve(
    celery: Celery, supervisor: Supervisor, queues: Sequence[QueueName], settings: Settings
) -> int:
    """Run Celery's solo pool in this thread: signals arrive while a job runs."""

    def on_shutdown(**_: object) -> None:
        supervisor.stop()

    def on_ready(**_: object) -> None:
        # Celery would run itself anew on SIGHUP; a closed terminal means stop.
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def keep_logging(**_: object) -> None:
        """Being connected is enough: Celery then leaves logging as it is."""

    signals.worker_shutting_down.connect(on_shutdown, weak=False)
    signals.worker_ready.connect(on_ready, weak=False)
    signals.setup_logging.connect(keep_logging, weak=False)
    names = [queue.value for queue in queues]
    while True:
        worker = celery.Worker(
            hostname=f"kdpo-{'-'.join(names)}@{socket.gethostname()}",
            pool="solo",
            concurrency=1,
            queues=names,
            loglevel=settings.log_level,
            quiet=True,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        worker.start()
        exit_code: int = worker.exitcode or 0
        if supervisor.draining or exit_code == 0:
            return exit_code
        # Celery gives up on some faults of a broker, such as a folder that was deleted.
        _log.error("the broker's consumer ended with code %d; it starts again", exit_code)
        time.sleep(_RESTART_S)


def _follow_parent(grace_s: float) -> None:
    """Stop with the process at the other end of standard input, by force if it takes too long."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    _log.info("the parent is gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
