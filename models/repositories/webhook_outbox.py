"""The outbox of webhooks: deliveries are written in the transaction of the event that they tell."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.ids import IdPrefix, new_id
from core.lifecycle import DatasetStatus, EventType, JobKind, JobStatus
from core.webhook_events import DeliveryStatus, WebhookEventType
from models.dataset import Dataset
from models.experiment import StudyRow
from models.webhook import Webhook, WebhookDelivery

_OF_TRAINING = {
    JobStatus.SUCCEEDED.value: WebhookEventType.JOB_SUCCEEDED,
    JobStatus.FAILED.value: WebhookEventType.JOB_FAILED,
    JobStatus.CANCELLED.value: WebhookEventType.JOB_CANCELLED,
    JobStatus.PAUSED.value: WebhookEventType.JOB_PAUSED,
}
_OF_RECOMMENDATION = {
    JobStatus.SUCCEEDED.value: WebhookEventType.RECOMMENDATION_COMPLETED,
    JobStatus.FAILED.value: WebhookEventType.RECOMMENDATION_FAILED,
}
_OF_EVALUATION = {
    JobStatus.SUCCEEDED.value: WebhookEventType.EVALUATION_COMPLETED,
    JobStatus.FAILED.value: WebhookEventType.EVALUATION_FAILED,
}
_OF_WARNING = {
    "checkpoint_expiring": WebhookEventType.CHECKPOINT_EXPIRING,
    "checkpoint_expired": WebhookEventType.CHECKPOINT_EXPIRED,
}

Told = tuple[WebhookEventType, str]


def announce(
    session: Session,
    owner_id: str,
    job_id: str,
    kind: JobKind,
    type_: EventType,
    data: dict[str, Any],
    *,
    event_id: str,
) -> None:
    """Owe the owner's webhooks what an event of a job means to them, if it means anything."""
    told = _told(session, job_id, kind, type_, data)
    if told is not None:
        owe(session, owner_id, told[0], told[1], event_id=event_id)


def owe(
    session: Session, owner_id: str, type_: WebhookEventType, object_id: str, *, event_id: str
) -> None:
    """Write a delivery for each webhook of the owner that asks for this type."""
    hooks = select(Webhook.id, Webhook.events).where(
        Webhook.owner_id == owner_id, Webhook.enabled.is_(True)
    )
    for hook in session.execute(hooks).all():
        if not hook.events or type_.value in hook.events:
            session.add(delivery_of(hook.id, owner_id, type_, object_id, event_id=event_id))
    session.flush()


def delivery_of(
    webhook_id: str, owner_id: str, type_: WebhookEventType, object_id: str, *, event_id: str
) -> WebhookDelivery:
    """Return a delivery that is due at once."""
    return WebhookDelivery(
        id=new_id(IdPrefix.DELIVERY),
        owner_id=owner_id,
        webhook_id=webhook_id,
        event_id=event_id,
        type=type_,
        object_id=object_id,
        status=DeliveryStatus.PENDING,
    )


def _told(
    session: Session, job_id: str, kind: JobKind, type_: EventType, data: dict[str, Any]
) -> Told | None:
    match type_, kind:
        case EventType.JOB_STATUS, JobKind.TRAINING:
            lost = data.get("outcome") == "lost"
            told = WebhookEventType.JOB_STALLED if lost else _OF_TRAINING.get(data["status"])
            return None if told is None else (told, job_id)
        case EventType.JOB_STATUS, JobKind.RECOMMENDATION | JobKind.EVALUATION:
            ends = _OF_RECOMMENDATION if kind is JobKind.RECOMMENDATION else _OF_EVALUATION
            ended = ends.get(data["status"])
            return None if ended is None else (ended, job_id)
        case EventType.JOB_STATUS, JobKind.DATASET:
            return _dataset(session, job_id, JobStatus(data["status"]))
        case EventType.RECOMMENDATION_UPDATED, JobKind.TRAINING:
            return WebhookEventType.RECOMMENDATION_COMPLETED, str(data["recommendation_id"])
        case EventType.JOB_STEP, JobKind.TRAINING:
            return _study(session, job_id, data)
        case EventType.JOB_CHECKPOINT, _:
            return WebhookEventType.CHECKPOINT_CREATED, str(data["checkpoint_id"])
        case EventType.JOB_WARNING, _:
            warned = _OF_WARNING.get(str(data.get("code")))
            return None if warned is None else (warned, str(data["checkpoint_id"]))
        case _:
            return None


def _dataset(session: Session, job_id: str, status: JobStatus) -> Told | None:
    """Return what the end of a validation means; of a dry run nothing."""
    if not status.is_terminal:
        return None
    validated = select(Dataset.id, Dataset.status).where(Dataset.job_id == job_id)
    dataset = session.execute(validated).one_or_none()
    if dataset is None:
        return None
    if dataset.status.is_usable:
        return WebhookEventType.DATASET_READY, dataset.id
    # A validation that did not get to a verdict makes its dataset invalid right after this.
    if dataset.status in (DatasetStatus.INVALID, DatasetStatus.VALIDATING):
        return WebhookEventType.DATASET_INVALID, dataset.id
    return None


def _study(session: Session, job_id: str, data: dict[str, Any]) -> Told | None:
    if (data.get("step"), data.get("status")) != ("search", "succeeded"):
        return None
    found = select(StudyRow.id).where(StudyRow.job_id == job_id)
    study_id = session.execute(found).scalar_one_or_none()
    return None if study_id is None else (WebhookEventType.STUDY_COMPLETED, study_id)
