"""What webhooks tell, and what becomes of a delivery."""

from enum import StrEnum
from typing import Any


class WebhookEventType(StrEnum):
    """Every type of event that a webhook can ask for; OpenAI's names where it has one."""

    JOB_SUCCEEDED = "fine_tuning.job.succeeded"
    JOB_FAILED = "fine_tuning.job.failed"
    JOB_CANCELLED = "fine_tuning.job.cancelled"
    JOB_PAUSED = "fine_tuning.job.paused"
    JOB_STALLED = "fine_tuning.job.stalled"
    RECOMMENDATION_COMPLETED = "recommendation.completed"
    RECOMMENDATION_FAILED = "recommendation.failed"
    EVALUATION_COMPLETED = "evaluation.completed"
    EVALUATION_FAILED = "evaluation.failed"
    STUDY_COMPLETED = "study.completed"
    DATASET_READY = "dataset.ready"
    DATASET_INVALID = "dataset.invalid"
    CHECKPOINT_CREATED = "checkpoint.created"
    CHECKPOINT_EXPIRING = "checkpoint.expiring"
    CHECKPOINT_EXPIRED = "checkpoint.expired"
    WEBHOOK_DISABLED = "webhook.disabled"
    WEBHOOK_TEST = "webhook.test"


class DeliveryStatus(StrEnum):
    """States of a delivery."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


MAX_TRIES = 10
_FIRST_S = 5.0
_LAST_S = 86_400.0


def retry_delay_s(tries: int, *, jitter: float) -> float | None:
    """Return how long to wait after so many tries; None when there is no further one.

    The pauses grow by one factor, d_k = 5 s * 17280^((k-1)/8), k = 1..9, from 5 s to 24 h; `jitter`
    in [0, 1) spreads each over 0.8 to 1.2 of itself.
    """
    if tries >= MAX_TRIES:
        return None
    growth: float = (_LAST_S / _FIRST_S) ** ((tries - 1) / (MAX_TRIES - 2))
    return _FIRST_S * growth * (0.8 + 0.4 * jitter)


def event_body(
    event_id: str, type_: WebhookEventType, object_id: str, *, created_at: int
) -> dict[str, Any]:
    """Return what is sent: thin, so that it tells a receiver where to look and no secrets."""
    return {
        "id": event_id,
        "object": "event",
        "type": type_.value,
        "created_at": created_at,
        "data": {"id": object_id},
    }
