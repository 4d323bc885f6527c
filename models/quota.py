"""What owners may use, what they have used, and whose turn it is."""

from datetime import date

from sqlalchemy import BigInteger, Date, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import JobKind
from core.queue import QueueName
from models.base import Base
from models.types import EnumText, Epoch


class Quota(Base):
    """Limits of one owner, or of all with `DEFAULT_SUBJECT`.

    NULL: as for all (for all: none); UNLIMITED: none, whatever holds for all.
    """

    __tablename__ = "quota"

    subject: Mapped[str] = mapped_column(String(48), primary_key=True)
    running_jobs: Mapped[int | None] = mapped_column(BigInteger)
    queued_jobs: Mapped[int | None] = mapped_column(BigInteger)
    gpu_seconds_month: Mapped[int | None] = mapped_column(BigInteger)
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    dataset_rows: Mapped[int | None] = mapped_column(BigInteger)
    upload_bytes: Mapped[int | None] = mapped_column(BigInteger)


class GpuUsage(Base):
    """Device seconds of one owner on one day (UTC) for one kind of job."""

    __tablename__ = "gpu_usage"

    owner_id: Mapped[str] = mapped_column(ForeignKey("owner.id"), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    kind: Mapped[JobKind] = mapped_column(EnumText(JobKind), primary_key=True)
    seconds: Mapped[float] = mapped_column(Epoch)


class QueueTurn(Base):
    """When a queue last gave a worker to one owner; the next goes to whom it was longest ago."""

    __tablename__ = "queue_turn"

    owner_id: Mapped[str] = mapped_column(ForeignKey("owner.id"), primary_key=True)
    queue: Mapped[QueueName] = mapped_column(EnumText(QueueName), primary_key=True)
    served_at: Mapped[float] = mapped_column(Epoch)
