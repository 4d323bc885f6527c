"""Who changed what, when, and from where."""

from sqlalchemy import Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Identified


class AuditEntry(Identified, Base):
    """One request that may have changed something; entries are only added, and swept when old."""

    __tablename__ = "audit_entry"
    __table_args__ = (
        Index("ix_audit_entry_owner", "owner_id", "id"),
        Index("ix_audit_entry_object", "object_id", "id"),
        Index("ix_audit_entry_created_at", "created_at"),
    )

    owner_id: Mapped[str] = mapped_column(String(48))
    key_id: Mapped[str | None] = mapped_column(String(48))
    operation: Mapped[str] = mapped_column(String(80))
    object_id: Mapped[str | None] = mapped_column(String(100))
    method: Mapped[str] = mapped_column(String(10))
    path: Mapped[str] = mapped_column(String(500))
    status: Mapped[int] = mapped_column(Integer)
    address: Mapped[str | None] = mapped_column(String(64))
    request_id: Mapped[str] = mapped_column(String(48))
