"""Answers that are kept for repeated requests."""

from typing import Any

from sqlalchemy import Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Identified
from models.types import Epoch, Json


class Replay(Identified, Base):
    """A request that happens once for its key: running until a time, or answered.

    `job_id` is the job that it has made, written in the transaction that makes it, so that it is
    found again when the process dies before it has answered.
    """

    __tablename__ = "replay"
    __table_args__ = (
        UniqueConstraint("caller_id", "method", "path", "key"),
        Index("ix_replay_created_at", "created_at"),
    )

    caller_id: Mapped[str] = mapped_column(String(48))
    method: Mapped[str] = mapped_column(String(10))
    path: Mapped[str] = mapped_column(String(1024))
    key: Mapped[str] = mapped_column(String(255))
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    running_until: Mapped[float | None] = mapped_column(Epoch)
    job_id: Mapped[str | None] = mapped_column(String(48))
    status: Mapped[int | None] = mapped_column(Integer)
    headers: Mapped[dict[str, Any] | None] = mapped_column(Json)
    body: Mapped[str | None] = mapped_column(Text)
