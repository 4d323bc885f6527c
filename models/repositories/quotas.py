"""What owners may use and have used; the limits hold in the transaction that would pass them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from core.errors import QuotaExceeded
from core.files import UploadStatus
from core.lifecycle import DatasetStatus, JobKind, JobStatus
from core.queue import QUEUE_OF_KIND, QueueName
from models.dataset import Dataset
from models.experiment import Checkpoint
from models.file import StoredFileRow, UploadPart, UploadSession
from models.job import Job
from models.owner import Owner
from models.quota import GpuUsage, Quota
from models.types import upsert

DEFAULT_SUBJECT = "default"
UNLIMITED = -1
_WAITS = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED)


class QuotaName(StrEnum):
    """What is limited."""

    RUNNING_JOBS = "running_jobs"
    QUEUED_JOBS = "queued_jobs"
    GPU_SECONDS_MONTH = "gpu_seconds_month"
    STORED_BYTES = "stored_bytes"
    DATASET_ROWS = "dataset_rows"
    UPLOAD_BYTES = "upload_bytes"


@dataclass(frozen=True)
class DayUsage:
    """Device seconds of one day and kind."""

    day: date
    kind: JobKind
    seconds: float


@dataclass(frozen=True)
class Stored:
    """What lies on the disk for an owner."""

    dataset_bytes: int
    file_bytes: int
    checkpoint_bytes: int
    rows: int

    @property
    def bytes(self) -> int:
        """All together."""
        return self.dataset_bytes + self.file_bytes + self.checkpoint_bytes


class QuotaRepository:
    """Reads and writes of limits and usage in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    # ------------------------------------------------------------------ limits

    def given(self, subject: str) -> dict[QuotaName, int | None]:
        """Return what is set for an owner, or for all with DEFAULT_SUBJECT."""
        row = self._session.get(Quota, subject, populate_existing=True)
        return {name: None if row is None else getattr(row, name.value) for name in QuotaName}

    def give(self, subject: str, limits: Mapping[QuotaName, int | None]) -> None:
        """Set some limits of an owner, or of all; None takes one back."""
        row = self._session.get(Quota, subject, with_for_update=True, populate_existing=True)
        if row is None:
            row = Quota(subject=subject)
            self._session.add(row)
        for name, value in limits.items():
            setattr(row, name.value, value)
        self._session.flush()

    def limits(self, owner_id: str) -> dict[QuotaName, int | None]:
        """Return what holds for an owner; None is no limit."""
        own, all_ = self.given(owner_id), self.given(DEFAULT_SUBJECT)
        effective = {name: all_[name] if own[name] is None else own[name] for name in QuotaName}
        return {name: None if v in (None, UNLIMITED) else v for name, v in effective.items()}

    def limit(self, owner_id: str, name: QuotaName) -> int | None:
        """Return one limit of an owner; None is no limit."""
        return self.limits(owner_id)[name]

    # ------------------------------------------------------------------- usage

    def running(self, owner_id: str) -> int:
        """Return how many jobs of an owner run."""
        return self._jobs(owner_id, (JobStatus.RUNNING,))

    def waiting(self, owner_id: str) -> int:
        """Return how many jobs of an owner wait for a worker or for their data."""
        return self._jobs(owner_id, _WAITS)

    def gpu_days(self, owner_id: str, start: date, end: date) -> list[DayUsage]:
        """Return the device seconds of an owner by day and kind, both days included."""
        rows = self._session.execute(
            select(GpuUsage)
            .where(GpuUsage.owner_id == owner_id, GpuUsage.day >= start, GpuUsage.day <= end)
            .order_by(GpuUsage.day, GpuUsage.kind)
        ).scalars()
        return [DayUsage(row.day, row.kind, row.seconds) for row in rows]

    def gpu_seconds_month(self, owner_id: str) -> float:
        """Return the device seconds of an owner since the month began (UTC)."""
        spent = select(func.coalesce(func.sum(GpuUsage.seconds), 0.0)).where(
            GpuUsage.owner_id == owner_id, GpuUsage.day >= month_start(datetime.now(UTC))
        )
        return float(self._session.execute(spent).scalar_one())

    def stored(self, owner_id: str) -> Stored:
        """Return what lies on the disk for an owner; versions of an upload share its bytes."""
        uploads = (
            select(func.max(Dataset.bytes).label("bytes"))
            .where(Dataset.owner_id == owner_id, Dataset.status != DatasetStatus.DELETED)
            .group_by(Dataset.upload_id)
            .subquery()
        )
        # A file that became a dataset is a second name of the dataset's bytes.
        kept = select(Dataset.id).where(
            Dataset.id == StoredFileRow.dataset_id, Dataset.status != DatasetStatus.DELETED
        )
        files = select(func.sum(StoredFileRow.bytes)).where(
            StoredFileRow.owner_id == owner_id, ~kept.exists()
        )
        parts = (
            select(func.sum(UploadPart.bytes))
            .join(UploadSession, UploadSession.id == UploadPart.upload_id)
            .where(UploadSession.owner_id == owner_id, UploadSession.status == UploadStatus.PENDING)
        )
        checkpoints = select(func.sum(Checkpoint.bytes)).where(Checkpoint.owner_id == owner_id)
        rows = select(func.sum(Dataset.counts["rows"].as_integer())).where(
            Dataset.owner_id == owner_id, Dataset.status != DatasetStatus.DELETED
        )
        datasets, file_bytes, part_bytes, checkpoint_bytes, count = (
            int(self._session.execute(one).scalar_one() or 0)
            for one in (select(func.sum(uploads.c.bytes)), files, parts, checkpoints, rows)
        )
        return Stored(datasets, file_bytes + part_bytes, checkpoint_bytes, count)

    def charge(self, job_id: str, seconds: float) -> None:
        """Add device seconds of a job to its owner's day."""
        job = self._session.execute(select(Job.owner_id, Job.kind).where(Job.id == job_id)).one()
        values = {
            "owner_id": job.owner_id, "kind": job.kind, "day": datetime.now(UTC).date(),
            "seconds": seconds,
        }  # fmt: skip
        self._session.execute(
            upsert(
                self._session, GpuUsage, values, key=("owner_id", "day", "kind"),
                added=("seconds",),
            )
        )  # fmt: skip

    # --------------------------------------------------------------- admission

    def admit_job(self, owner_id: str, kind: JobKind) -> None:
        """Refuse one more job of an owner who has too many waiting, or no device time left.

        Raises:
            QuotaExceeded: which limit, and when there is room again.
        """
        limits = self.limits(owner_id)
        waiting = limits[QuotaName.QUEUED_JOBS]
        if waiting is not None:
            self._lock(owner_id)
            _refuse(
                QuotaName.QUEUED_JOBS, waiting, self.waiting(owner_id), more=1,
                frees="when one of your waiting jobs starts or is cancelled",
            )  # fmt: skip
        seconds = limits[QuotaName.GPU_SECONDS_MONTH]
        if seconds is not None and QUEUE_OF_KIND[kind] is QueueName.GPU:
            _refuse(
                QuotaName.GPU_SECONDS_MONTH, seconds, self.gpu_seconds_month(owner_id), more=1,
                frees="when the month ends (UTC)", frees_at=next_month(datetime.now(UTC)),
            )  # fmt: skip

    def admit_bytes(self, owner_id: str, size_bytes: int) -> None:
        """Refuse an upload that is larger than the owner's may be, or that finds no room.

        Raises:
            QuotaExceeded: which limit, and when there is room again.
        """
        limits = self.limits(owner_id)
        upload = limits[QuotaName.UPLOAD_BYTES]
        if upload is not None:
            _refuse(
                QuotaName.UPLOAD_BYTES, upload, size_bytes, more=0,
                frees="never for this file: split it, or compress it",
            )  # fmt: skip
        stored = limits[QuotaName.STORED_BYTES]
        if stored is not None:
            self._lock(owner_id)
            _refuse(
                QuotaName.STORED_BYTES, stored, self.stored(owner_id).bytes, more=size_bytes,
                frees="when you delete datasets, files or checkpoints, or cancel uploads in parts",
            )  # fmt: skip

    def _lock(self, owner_id: str) -> None:
        """Let no other request of the owner be admitted before this transaction ends."""
        self._session.execute(select(Owner.id).where(Owner.id == owner_id).with_for_update())

    def _jobs(self, owner_id: str, states: tuple[JobStatus, ...]) -> int:
        counted = select(func.count()).where(
            Job.owner_id == owner_id, or_(*(Job.status == state for state in states))
        )
        return self._session.execute(counted).scalar_one()


def month_start(moment: datetime) -> date:
    """Return the first day of the month of a moment."""
    return moment.date().replace(day=1)


def next_month(moment: datetime) -> float:
    """Return when the month of a moment ends, in unix seconds."""
    year, month = divmod(moment.year * 12 + moment.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def _refuse(
    name: QuotaName,
    limit: int,
    used: float,
    *,
    more: int,
    frees: str,
    frees_at: float | None = None,
) -> None:
    if used + more > limit:
        raise QuotaExceeded(
            name.value, limit=limit, used=used, frees=frees, frees_at=frees_at, asked=more
        )
