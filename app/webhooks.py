"""Webhooks: set them up, rotate their secrets, look at what was delivered, send it again."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field, StringConstraints

from app.conditional import CONDITIONAL_RESPONSES
from app.deps import (
    ID_PATTERN,
    TEXT_PATTERN,
    Config,
    Db,
    IfMatch,
    Lists,
    PageOf,
    ReadsJobs,
    WritesJobs,
)
from app.job_verbs import NoOptions
from app.responses import (
    NO_STORE,
    ListOf,
    Schema,
    check_if_match,
    conditional,
    json_response,
    unix,
    with_etag,
)
from core.spec import SpecModel
from core.webhook_events import DeliveryStatus, WebhookEventType
from core.webhook_signing import new_secret
from core.webhook_targets import webhook_target
from models.repositories.webhooks import WebhookRepository
from models.webhook import Webhook, WebhookDelivery

router = APIRouter(prefix="/webhooks", tags=["webhooks"])

DAY_S = 86_400
WebhookId = Annotated[str, Path(pattern=ID_PATTERN)]
Url = Annotated[
    str, StringConstraints(min_length=8, max_length=2048), Field(description="https, a listed host")
]
Events = Annotated[
    list[WebhookEventType],
    Field(max_length=len(WebhookEventType), description="types to be told of; empty: all"),
]
Description = Annotated[str, StringConstraints(max_length=500, pattern=TEXT_PATTERN)]


class CreateWebhook(SpecModel):
    """Where to send which events."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "url": "https://hooks.example.com/kdpo",
                    "events": ["fine_tuning.job.succeeded", "fine_tuning.job.failed"],
                }
            ]
        }
    )

    url: Url
    events: Events = Field(default_factory=list)
    description: Description = ""


class UpdateWebhook(SpecModel):
    """What to change; what is not given stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"enabled": True}]})

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = Field(
        default=None, description="true: what is still owed is tried again, from the next event on"
    )


class RotateSecret(SpecModel):
    """How long the secret before stays good."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"overlap_s": 3600}]})

    overlap_s: int = Field(
        default=DAY_S, ge=0, le=7 * DAY_S, description="both secrets sign meanwhile"
    )


class WebhookView(Schema):
    """A webhook; its secret is shown only by the request that makes it."""

    id: str
    object: Literal["webhook"] = "webhook"
    created_at: int
    url: str
    description: str
    events: list[WebhookEventType]
    enabled: bool
    disabled_reason: str | None


class NewWebhook(WebhookView):
    """A webhook with a secret that was made just now and is shown only here."""

    secret: str


class TryView(Schema):
    """One try to deliver."""

    at: int
    status_code: int | None
    error: str | None
    duration_ms: int


class DeliveryView(Schema):
    """One event for one webhook; `event_id` is the header `webhook-id`."""

    id: str
    object: Literal["webhook.delivery"] = "webhook.delivery"
    webhook_id: str
    event_id: str
    type: WebhookEventType
    object_id: str
    created_at: int
    status: DeliveryStatus
    tries: int
    next_try_at: int | None
    delivered_at: int | None
    attempts: list[TryView]


@router.post("", operation_id="create_webhook", status_code=201, response_model=NewWebhook)
def create_webhook(
    caller: WritesJobs, database: Db, settings: Config, body: CreateWebhook
) -> Response:
    """Make a webhook; keep the secret of the answer, it is shown only now."""
    webhook_target(body.url, settings.webhooks)
    with database.transaction() as session:
        row = WebhookRepository(session).create(
            owner_id=caller.owner_id,
            url=body.url,
            description=body.description,
            events=_names(body.events),
            secret=new_secret(),
            at_most=settings.webhooks.max_per_owner,
        )
    headers = {"Location": f"/v1/webhooks/{row.id}", **NO_STORE}
    return json_response(_with_secret(row), status=201, headers=headers)


@router.get("", operation_id="list_webhooks")
def list_webhooks(
    caller: ReadsJobs, database: Db, query: PageOf, lists: Lists
) -> ListOf[WebhookView]:
    """List webhooks, newest first."""
    with database.reading() as session:
        page = WebhookRepository(session).page(caller.owner_id, query)
        views = [_view(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{webhook_id}",
    operation_id="get_webhook",
    response_model=WebhookView,
    responses=CONDITIONAL_RESPONSES,
)
def get_webhook(
    request: Request, caller: ReadsJobs, database: Db, webhook_id: WebhookId
) -> Response:
    """Return one webhook; `disabled_reason` says why it is off."""
    with database.reading() as session:
        row = WebhookRepository(session).get(caller.owner_id, webhook_id)
    return conditional(request, _view(row))


@router.patch("/{webhook_id}", operation_id="update_webhook", response_model=WebhookView)
def update_webhook(
    caller: WritesJobs,
    database: Db,
    settings: Config,
    webhook_id: WebhookId,
    body: UpdateWebhook,
    if_match: IfMatch = None,
) -> Response:
    """Change a webhook, or switch it on or off."""
    if body.url is not None:
        webhook_target(body.url, settings.webhooks)
    with database.transaction() as session:
        webhooks = WebhookRepository(session)
        row = webhooks.get(caller.owner_id, webhook_id, lock=True)
        check_if_match(if_match, _view(row))
        row.url = row.url if body.url is None else body.url
        row.events = row.events if body.events is None else _names(body.events)
        row.description = row.description if body.description is None else body.description
        if body.enabled is not None and body.enabled != row.enabled:
            webhooks.enable(row, enabled=body.enabled)
    return with_etag(_view(row))


@router.delete(
    "/{webhook_id}",
    operation_id="delete_webhook",
    status_code=204,
    responses={204: {"description": "Deleted, with its log and what was owed to it"}},
)
def delete_webhook(caller: WritesJobs, database: Db, webhook_id: WebhookId) -> None:
    """Delete a webhook, its log, and what was owed to it."""
    with database.transaction() as session:
        WebhookRepository(session).delete(caller.owner_id, webhook_id)


@router.post(
    "/{webhook_id}/rotate_secret", operation_id="rotate_webhook_secret", response_model=NewWebhook
)
def rotate_webhook_secret(
    caller: WritesJobs, database: Db, webhook_id: WebhookId, body: RotateSecret
) -> Response:
    """Make another secret; until `overlap_s` is over, deliveries carry both signatures."""
    with database.transaction() as session:
        webhooks = WebhookRepository(session)
        row = webhooks.get(caller.owner_id, webhook_id, lock=True)
        webhooks.rotate(row, new_secret(), overlap_s=body.overlap_s)
    return json_response(_with_secret(row), headers=NO_STORE)


@router.post("/{webhook_id}/test", operation_id="test_webhook", status_code=202)
def send_test_event(
    caller: WritesJobs, database: Db, webhook_id: WebhookId, _body: NoOptions | None = None
) -> DeliveryView:
    """Send an event of type `webhook.test`; the log says what came of it."""
    with database.transaction() as session:
        webhooks = WebhookRepository(session)
        row = webhooks.get(caller.owner_id, webhook_id, lock=True)
        return _delivery(webhooks.test(row))


@router.get("/{webhook_id}/deliveries", operation_id="list_webhook_deliveries")
def list_webhook_deliveries(
    caller: ReadsJobs,
    database: Db,
    query: PageOf,
    lists: Lists,
    webhook_id: WebhookId,
    status: Annotated[DeliveryStatus | None, Query()] = None,
) -> ListOf[DeliveryView]:
    """List what was and is to be delivered, newest first, with every try."""
    with database.reading() as session:
        page = WebhookRepository(session).delivery_page(
            caller.owner_id, webhook_id, query, status=status
        )
        views = [_delivery(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.post(
    "/deliveries/{delivery_id}/redeliver",
    operation_id="redeliver_webhook_delivery",
    status_code=202,
)
def redeliver_webhook_delivery(
    caller: WritesJobs,
    database: Db,
    delivery_id: Annotated[str, Path(pattern=ID_PATTERN)],
    _body: NoOptions | None = None,
) -> DeliveryView:
    """Send an event once more, under its own event id: a receiver can tell that it is the same."""
    with database.transaction() as session:
        return _delivery(WebhookRepository(session).redeliver(caller.owner_id, delivery_id))


def _names(events: list[WebhookEventType]) -> list[str]:
    return sorted({event.value for event in events})


def _view(row: Webhook) -> WebhookView:
    return WebhookView(
        id=row.id,
        created_at=int(row.created_at),
        url=row.url,
        description=row.description,
        events=[WebhookEventType(name) for name in row.events],
        enabled=row.enabled,
        disabled_reason=row.disabled_reason,
    )


def _with_secret(row: Webhook) -> NewWebhook:
    return NewWebhook(**_view(row).model_dump(), secret=row.secret)


def _delivery(row: WebhookDelivery) -> DeliveryView:
    pending = row.status is DeliveryStatus.PENDING
    return DeliveryView(
        id=row.id,
        webhook_id=row.webhook_id,
        event_id=row.event_id,
        type=row.type,
        object_id=row.object_id,
        created_at=int(row.created_at),
        status=row.status,
        tries=row.tries,
        next_try_at=int(row.due_at) if pending else None,
        delivered_at=unix(row.delivered_at),
        attempts=[TryView.model_validate(one) for one in row.attempts],
    )
