"""Declarative base: constraint names for migrations, and columns that many tables have."""

from sqlalchemy import ForeignKey, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models.types import Epoch, db_now


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Identified:
    """A public id that sorts by age, and when the row was made."""

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    created_at: Mapped[float] = mapped_column(Epoch, server_default=None, insert_default=db_now())


class Owned:
    """Whose row it is."""

    owner_id: Mapped[str] = mapped_column(String(48), ForeignKey("owner.id"), index=True)
