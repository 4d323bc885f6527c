"""Owners and their API keys."""

from sqlalchemy import Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Identified, Owned
from models.types import Epoch, Json


class Owner(Identified, Base):
    __tablename__ = "owner"

    name: Mapped[str] = mapped_column(String(200), unique=True)


class ApiKey(Identified, Owned, Base):
    """A key is stored as its SHA-256; the key itself is shown once when it is made."""

    __tablename__ = "api_key"

    name: Mapped[str] = mapped_column(String(200))
    prefix: Mapped[str] = mapped_column(String(40))
    secret_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]] = mapped_column(Json)
    expires_at: Mapped[float | None] = mapped_column(Epoch)
    last_used_at: Mapped[float | None] = mapped_column(Epoch)
    revoked_at: Mapped[float | None] = mapped_column(Epoch)
    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
