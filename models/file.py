"""Uploaded files, and uploads that come in parts."""

from sqlalchemy import BigInteger, ForeignKey, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.files import FilePurpose, UploadStatus
from models.base import Base, Identified, Owned
from models.types import EnumText, Epoch


class StoredFileRow(Identified, Owned, Base):
    """A file under its id in the folder of files; `dataset_id` is what was made of it."""

    __tablename__ = "file"

    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[FilePurpose] = mapped_column(EnumText(FilePurpose))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("dataset.id"), index=True)
    expires_at: Mapped[float | None] = mapped_column(Epoch, index=True)


class UploadSession(Identified, Owned, Base):
    """A file that comes in parts; `bytes` is the size that was announced."""

    __tablename__ = "upload_session"

    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[FilePurpose] = mapped_column(EnumText(FilePurpose))
    mime_type: Mapped[str] = mapped_column(String(200))
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[UploadStatus] = mapped_column(EnumText(UploadStatus), index=True)
    expires_at: Mapped[float] = mapped_column(Epoch)
    file_ttl_s: Mapped[int | None] = mapped_column(Integer)
    file_id: Mapped[str | None] = mapped_column(String(48))


class UploadPart(Identified, Base):
    """One part; the same bytes sent again to the same upload are the same part."""

    __tablename__ = "upload_part"
    __table_args__ = (UniqueConstraint("upload_id", "sha256"),)

    upload_id: Mapped[str] = mapped_column(ForeignKey("upload_session.id"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
