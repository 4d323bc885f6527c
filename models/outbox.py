"""The relay: sends the wake-ups that committed transactions owe, at least once."""

from sqlalchemy import delete, select

from core.queue import WakeSender
from models.job import Job, Outbox
from models.session import Database
from models.types import db_now


def relay_once(database: Database, sender: WakeSender, *, limit: int = 200) -> int:
    """Send the wake-ups of due jobs, one per queue, and delete them; return how many were owed.

    Nothing is sent inside a transaction: a slow broker must not hold a database lock. A crash
    between sending and deleting sends twice, which is harmless: a wake-up carries no job.

    Raises:
        Unavailable: the broker does not answer; nothing was deleted, the next round sends again.
    """
    due = (
        select(Outbox.id, Outbox.queue)
        .join(Job, Job.id == Outbox.job_id)
        .where(Job.run_after <= db_now())
        .order_by(Outbox.id)
        .limit(limit)
    )
    with database.reading() as session:
        owed = list(session.execute(due).all())
    if not owed:
        return 0
    for queue in sorted({row.queue for row in owed}):
        sender.wake(queue)
    with database.transaction() as session:
        session.execute(delete(Outbox).where(Outbox.id.in_([row.id for row in owed])))
    return len(owed)
