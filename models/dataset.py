"""Uploaded preference data and what validation found."""

from typing import Any

from sqlalchemy import BigInteger, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import DatasetStatus
from models.base import Base, Identified, Owned
from models.types import EnumText, Epoch, Json


class Dataset(Identified, Owned, Base):
    __tablename__ = "dataset"
    __table_args__ = (UniqueConstraint("owner_id", "id"),)

    name: Mapped[str] = mapped_column(String(200))
    status: Mapped[DatasetStatus] = mapped_column(EnumText(DatasetStatus))
    job_id: Mapped[str] = mapped_column(String(48), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    policy: Mapped[dict[str, Any]] = mapped_column(Json)
    counts: Mapped[dict[str, Any] | None] = mapped_column(Json)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    failure: Mapped[dict[str, Any] | None] = mapped_column(Json)
    canonical_sha256: Mapped[str | None] = mapped_column(String(64))
    ready_at: Mapped[float | None] = mapped_column(Epoch)
