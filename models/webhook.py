"""Webhooks and what they are owed: the outbox of events for other people's servers."""

from typing import Any

from sqlalchemy import ForeignKey, Index, Integer, String, text
from sqlalchemy.orm import Mapped, mapped_column

from core.webhook_events import DeliveryStatus, WebhookEventType
from models.base import Base, Identified, Owned
from models.types import EnumText, Epoch, Json, db_now


class Webhook(Identified, Owned, Base):
    """Where events go. `events` empty means all; the previous secret signs too until it ends."""

    __tablename__ = "webhook"

    url: Mapped[str] = mapped_column(String(2048))
    description: Mapped[str] = mapped_column(String(500))
    events: Mapped[list[str]] = mapped_column(Json)
    enabled: Mapped[bool] = mapped_column()
    disabled_reason: Mapped[str | None] = mapped_column(String(500))
    secret: Mapped[str] = mapped_column(String(100))
    previous_secret: Mapped[str | None] = mapped_column(String(100))
    previous_until: Mapped[float | None] = mapped_column(Epoch)


class WebhookDelivery(Identified, Owned, Base):
    """One event for one webhook, written with the event; `event_id` is the same for all of them.

    `due_at` is when it is tried next. A claim moves it ahead by the lease, so that a delivery whose
    worker died is tried again.
    """

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        Index("ix_webhook_delivery_webhook_id_id", "webhook_id", "id"),
        Index(
            "ix_webhook_delivery_due",
            "due_at",
            postgresql_where=text("status = 'pending'"),
            sqlite_where=text("status = 'pending'"),
        ),
    )

    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhook.id"))
    event_id: Mapped[str] = mapped_column(String(48))
    type: Mapped[WebhookEventType] = mapped_column(EnumText(WebhookEventType))
    object_id: Mapped[str] = mapped_column(String(64))
    status: Mapped[DeliveryStatus] = mapped_column(EnumText(DeliveryStatus))
    tries: Mapped[int] = mapped_column(Integer, insert_default=0)
    due_at: Mapped[float] = mapped_column(Epoch, insert_default=db_now())
    attempts: Mapped[list[dict[str, Any]]] = mapped_column(Json, insert_default=list)
    delivered_at: Mapped[float | None] = mapped_column(Epoch)
