"""Uploaded preference data and what validation found."""

from typing import Any

from sqlalchemy import BigInteger, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import DatasetStatus
from models.base import Base, Identified, Owned
from models.types import EnumText, Epoch, Json


class Dataset(Identified, Owned, Base):
    """One reading of an upload under one policy.

    `upload_id` names the stored bytes, and with them all versions: it is the id of version 1.
    `files` are the published ones: path, bytes, sha256. `source` is what was asked for when no
    bytes were sent, `origin` what that was resolved to; `bytes` and `sha256` follow when it came.
    """

    __tablename__ = "dataset"
    __table_args__ = (UniqueConstraint("owner_id", "id"), UniqueConstraint("upload_id", "version"))

    name: Mapped[str] = mapped_column(String(200))
    status: Mapped[DatasetStatus] = mapped_column(EnumText(DatasetStatus))
    job_id: Mapped[str] = mapped_column(String(48), index=True)
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    source: Mapped[dict[str, Any] | None] = mapped_column(Json)
    origin: Mapped[dict[str, Any] | None] = mapped_column(Json)
    policy: Mapped[dict[str, Any]] = mapped_column(Json)
    counts: Mapped[dict[str, Any] | None] = mapped_column(Json)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    failure: Mapped[dict[str, Any] | None] = mapped_column(Json)
    upload_id: Mapped[str] = mapped_column(String(48))
    version: Mapped[int] = mapped_column(Integer)
    parent_id: Mapped[str | None] = mapped_column(String(48))
    files: Mapped[list[dict[str, Any]]] = mapped_column(Json, insert_default=list)
    canonical_sha256: Mapped[str | None] = mapped_column(String(64))
    ready_at: Mapped[float | None] = mapped_column(Epoch)
