"""How long checkpoints stay: pins, ends, warnings ahead, deletion."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, exists, or_, select, update
from sqlalchemy.orm import Session, aliased

from core.errors import Conflict
from core.lifecycle import EventType, JobKind, JobStatus
from models.experiment import Checkpoint
from models.job import Job
from models.repositories.events import append_event
from models.repositories.experiments import ExperimentRepository
from models.types import db_now

WARN_HOURS = (72, 24)
BEST = "final"
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
_ENDED = [status for status in JobStatus if status.is_terminal]


@dataclass(frozen=True)
class Gone:
    """A deleted checkpoint whose folder is still to be removed."""

    id: str
    path: str


class CheckpointRepository:
    """Writes that decide how long checkpoints stay, in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def lock(self, owner_id: str, checkpoint_id: str) -> Checkpoint:
        """Return the owner's checkpoint; nobody else changes or deletes it in this transaction.

        Raises:
            NotFound: no such checkpoint, or somebody else's, or a deleted one.
        """
        self._session.get(Checkpoint, checkpoint_id, with_for_update=True, populate_existing=True)
        return ExperimentRepository(self._session).checkpoint(owner_id, checkpoint_id)

    def find(self, checkpoint_id: str) -> Checkpoint | None:
        """Return a checkpoint of any owner unless it is deleted."""
        row = self._session.get(Checkpoint, checkpoint_id)
        return None if row is None or row.deleted_at is not None else row

    def change(
        self, row: Checkpoint, *, title: str | None, pinned: bool, ends: float | None
    ) -> None:
        """Set the owner's label, the pin and the end of a locked checkpoint."""
        if ends != row.expires_at:
            row.warned_h = None
        row.title, row.pinned, row.expires_at = title, pinned, ends
        self._session.flush()

    def delete(self, owner_id: str, checkpoint_id: str) -> None:
        """Forget a checkpoint: nobody is shown it, and the cleanup removes its folder.

        Raises:
            NotFound: no such checkpoint.
            Conflict: a job that has not ended makes or reads it.
        """
        row = self.lock(owner_id, checkpoint_id)
        user = self._user(row)
        if user is not None:
            raise Conflict(
                f"checkpoint {checkpoint_id} is in use: job {user} has not ended",
                code="checkpoint_in_use",
                hint=f"wait for it, or POST /v1/jobs/{user}/cancel",
            )
        self._drop(row)

    def set_ends(self, *, days: float) -> int:
        """Give an end to old checkpoints that are neither best, last of their job, nor pinned.

        It is never nearer than the first warning. Return how many got one.
        """
        newer = aliased(Checkpoint)
        lead_s = max(WARN_HOURS) * HOUR_S
        has_newer = exists().where(
            newer.job_id == Checkpoint.job_id, newer.id > Checkpoint.id, newer.deleted_at.is_(None)
        )
        old = (
            update(Checkpoint)
            .where(
                Checkpoint.deleted_at.is_(None),
                Checkpoint.pinned.is_(False),
                Checkpoint.expires_at.is_(None),
                Checkpoint.label != BEST,
                Checkpoint.created_at < db_now() - (days * DAY_S - lead_s),
                has_newer,
            )
            .values(expires_at=db_now() + lead_s, warned_h=None)
            .returning(Checkpoint.id)
            .execution_options(synchronize_session=False)
        )
        return len(self._session.execute(old).all())

    def warn(self, *, limit: int = 100) -> int:
        """Write the warning events that are due; return how many."""
        written = 0
        for hours in sorted(WARN_HOURS):
            due = (
                select(Checkpoint)
                .where(
                    *_will_end(),
                    Checkpoint.expires_at > db_now(),
                    Checkpoint.expires_at <= db_now() + hours * HOUR_S,
                    or_(Checkpoint.warned_h.is_(None), Checkpoint.warned_h > hours),
                )
                .order_by(Checkpoint.expires_at)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            for row in self._session.execute(due).scalars():
                row.warned_h = hours
                self._tell(row, "checkpoint_expiring", f"expires within {hours} hours")
                written += 1
        return written

    def expire(self, *, limit: int = 100) -> list[str]:
        """Delete checkpoints whose time is over, unless they are in use; return their ids."""
        due = (
            select(Checkpoint)
            .where(*_will_end(), Checkpoint.expires_at <= db_now())
            .order_by(Checkpoint.expires_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        gone = []
        for row in list(self._session.execute(due).scalars()):
            if self._user(row) is None:
                self._tell(row, "checkpoint_expired", "has expired and is deleted")
                self._drop(row)
                gone.append(row.id)
        return gone

    def gone(self, *, limit: int = 100) -> Sequence[Gone]:
        """Return deleted checkpoints whose folder may still be there."""
        deleted = select(Checkpoint.id, Checkpoint.path).where(
            Checkpoint.deleted_at.is_not(None), Checkpoint.path != ""
        )
        rows = self._session.execute(deleted.order_by(Checkpoint.id).limit(limit))
        return [Gone(row.id, row.path) for row in rows]

    def forget_folder(self, checkpoint_id: str) -> None:
        """Note that the folder of a deleted checkpoint is removed."""
        self._session.get_one(Checkpoint, checkpoint_id).path = ""

    def _user(self, row: Checkpoint) -> str | None:
        """Return a job that has not ended and makes or reads the checkpoint."""
        reads = Job.kind.in_((JobKind.EXPORT, JobKind.EVALUATION)) & (
            Job.spec["checkpoint_id"].as_string() == row.id
        )
        using = (
            select(Job.id)
            .where(
                Job.owner_id == row.owner_id,
                Job.status.not_in(_ENDED),
                or_(Job.id == row.job_id, reads),
            )
            .order_by(Job.id)
            .limit(1)
        )
        return self._session.execute(using).scalar_one_or_none()

    def _drop(self, row: Checkpoint) -> None:
        row.deleted_at = db_now()
        row.files, row.bytes = [], 0
        self._session.flush()

    def _tell(self, row: Checkpoint, code: str, what: str) -> None:
        name = row.title or row.label
        append_event(
            self._session, row.job_id, EventType.JOB_WARNING,
            f"Checkpoint `{name}` ({row.id}) {what}.", level="warn",
            data={"code": code, "checkpoint_id": row.id, "expires_at": row.expires_at},
        )  # fmt: skip


def _will_end() -> tuple[ColumnElement[bool], ...]:
    return (
        Checkpoint.deleted_at.is_(None),
        Checkpoint.pinned.is_(False),
        Checkpoint.expires_at.is_not(None),
    )
