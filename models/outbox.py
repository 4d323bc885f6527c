"""The relay: sends the wake-ups that committed transactions owe, at least once."""

from sqlalchemy import delete, select

from core.queue import WakeSender
from models.job import Outbox
from models.session import Database


def relay_once(database: Database, sender: WakeSender, *, limit: int = 200) -> int:
    """Send all owed wake-ups, one per queue, and delete them; return how many were owed.

    Nothing is sent inside a transaction: a slow broker must not hold a database lock. A crash
    between sending and deleting sends twice, which is harmless: a wake-up carries no job.

    Raises:
        Unavailable: the broker does not answer; nothing was deleted, the next round sends again.
    """
    with database.reading() as session:
        owed = list(
            session.execute(select(Outbox.id, Outbox.queue).order_by(Outbox.id).limit(limit)).all()
        )
    if not owed:
        return 0
    for queue in sorted({row.queue for row in owed}):
        sender.wake(queue)
    with database.transaction() as session:
        session.execute(delete(Outbox).where(Outbox.id.in_([row.id for row in owed])))
    return len(owed)
