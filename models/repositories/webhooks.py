"""Webhooks: what owners set, and the way of a delivery from due to delivered or given up."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from core.errors import Conflict, NotFound
from core.ids import IdPrefix, new_id
from core.webhook_events import DeliveryStatus, WebhookEventType, retry_delay_s
from models.owner import Owner
from models.repositories.paging import Page, PageQuery, fetch_page
from models.repositories.webhook_outbox import delivery_of, owe
from models.types import db_now
from models.webhook import Webhook, WebhookDelivery

DAY_S = 86_400.0


@dataclass(frozen=True)
class Due:
    """A delivery that one worker has taken; `tries` is its fence."""

    id: str
    tries: int
    url: str
    secrets: tuple[str, ...]
    event_id: str
    type: WebhookEventType
    object_id: str
    created_at: float


@dataclass(frozen=True)
class Attempt:
    """What came of one try; `gone`: the receiver says that it wants no more (410)."""

    ok: bool
    status: int | None
    error: str | None
    duration_ms: int
    gone: bool = False


class WebhookRepository:
    """Reads and writes of webhooks in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    # -------------------------------------------------------------- by owners

    def create(
        self,
        *,
        owner_id: str,
        url: str,
        description: str,
        events: list[str],
        secret: str,
        at_most: int,
    ) -> Webhook:
        """Insert a webhook.

        Raises:
            Conflict: the owner has as many as one may have.
        """
        # Two requests at once must not both make the last one.
        self._session.execute(select(Owner.id).where(Owner.id == owner_id).with_for_update())
        count = select(func.count()).select_from(Webhook).where(Webhook.owner_id == owner_id)
        if self._session.execute(count).scalar_one() >= at_most:
            raise Conflict(
                f"you have {at_most} webhooks, which is the limit here",
                code="too_many_webhooks",
                hint="delete one that is not used: GET /v1/webhooks",
            )
        row = Webhook(
            id=new_id(IdPrefix.WEBHOOK),
            owner_id=owner_id,
            url=url,
            description=description,
            events=events,
            enabled=True,
            secret=secret,
        )
        self._session.add(row)
        self._session.flush()
        self._session.refresh(row)
        return row

    def get(self, owner_id: str, webhook_id: str, *, lock: bool = False) -> Webhook:
        """Return the owner's webhook; `lock` until the end of the transaction.

        Raises:
            NotFound: no such webhook, or somebody else's.
        """
        found = select(Webhook).where(Webhook.id == webhook_id, Webhook.owner_id == owner_id)
        if lock:
            found = found.with_for_update()
        row = self._session.execute(found).scalar_one_or_none()
        if row is None:
            raise NotFound(f"no webhook {webhook_id!r}", hint="GET /v1/webhooks lists them")
        return row

    def page(self, owner_id: str, query: PageQuery) -> Page[Webhook]:
        """Return one page of the owner's webhooks."""
        statement = select(Webhook).where(Webhook.owner_id == owner_id)
        return fetch_page(self._session, statement, Webhook.id, query)

    def delete(self, owner_id: str, webhook_id: str) -> None:
        """Delete a webhook and its log.

        Raises:
            NotFound: no such webhook.
        """
        row = self.get(owner_id, webhook_id, lock=True)
        self._session.execute(
            delete(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
        )
        self._session.delete(row)
        self._session.flush()

    def enable(self, row: Webhook, *, enabled: bool) -> None:
        """Switch a locked webhook; what was still owed to it is tried when it is on again."""
        row.enabled = enabled
        row.disabled_reason = None if enabled else "switched off by its owner"

    def rotate(self, row: Webhook, secret: str, *, overlap_s: float) -> None:
        """Give a locked webhook another secret; the one before signs too for `overlap_s`."""
        row.previous_secret, row.previous_until = row.secret, db_now() + overlap_s
        row.secret = secret
        self._session.flush()

    def test(self, row: Webhook) -> WebhookDelivery:
        """Owe a webhook an event that means nothing."""
        delivery = delivery_of(
            row.id, row.owner_id, WebhookEventType.WEBHOOK_TEST, row.id,
            event_id=new_id(IdPrefix.EVENT),
        )  # fmt: skip
        return self._added(delivery)

    def delivery_page(
        self,
        owner_id: str,
        webhook_id: str,
        query: PageQuery,
        *,
        status: DeliveryStatus | None = None,
    ) -> Page[WebhookDelivery]:
        """Return one page of the log of a webhook.

        Raises:
            NotFound: no such webhook.
        """
        self.get(owner_id, webhook_id)
        statement = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
        if status is not None:
            statement = statement.where(WebhookDelivery.status == status)
        return fetch_page(self._session, statement, WebhookDelivery.id, query)

    def redeliver(self, owner_id: str, delivery_id: str) -> WebhookDelivery:
        """Owe an event once more, under the same event id; return the new delivery.

        Raises:
            NotFound: no such delivery, or somebody else's.
            Conflict: its webhook is switched off.
        """
        row = self._session.get(WebhookDelivery, delivery_id)
        if row is None or row.owner_id != owner_id:
            raise NotFound(
                f"no delivery {delivery_id!r}", hint="GET /v1/webhooks/{id}/deliveries lists them"
            )
        if not self.get(owner_id, row.webhook_id, lock=True).enabled:
            raise Conflict(
                f"webhook {row.webhook_id} is switched off",
                code="webhook_disabled",
                hint=f"PATCH /v1/webhooks/{row.webhook_id} with enabled true",
            )
        again = delivery_of(
            row.webhook_id, row.owner_id, row.type, row.object_id, event_id=row.event_id
        )
        again.created_at = row.created_at  # of the event: it is part of what is signed
        return self._added(again)

    def _added(self, delivery: WebhookDelivery) -> WebhookDelivery:
        self._session.add(delivery)
        self._session.flush()
        self._session.refresh(delivery)
        return delivery

    # ------------------------------------------------------------- by workers

    def claim(self, *, lease_s: float, limit: int) -> Sequence[Due]:
        """Take deliveries that are due; each is due again after the lease, should this one die.

        Webhooks take turns, so that one that has many waits for itself only.
        """
        is_due = (
            WebhookDelivery.status == DeliveryStatus.PENDING,
            WebhookDelivery.due_at <= db_now(),
        )
        turn = func.row_number().over(
            partition_by=WebhookDelivery.webhook_id,
            order_by=(WebhookDelivery.due_at, WebhookDelivery.id),
        )
        turns = (
            select(WebhookDelivery.id, WebhookDelivery.due_at, turn.label("turn"))
            .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
            .where(*is_due, Webhook.enabled.is_(True))
            .subquery()
        )
        due = (
            select(WebhookDelivery, Webhook)
            .join(turns, turns.c.id == WebhookDelivery.id)
            .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
            .where(*is_due)
            .order_by(turns.c.turn, turns.c.due_at)
            .limit(limit)
            .with_for_update(skip_locked=True, of=WebhookDelivery)
        )
        now = self._session.execute(select(db_now())).scalar_one()
        taken = []
        for row, hook in self._session.execute(due).all():
            row.due_at, row.tries = now + lease_s, row.tries + 1
            secrets = [hook.secret]
            if hook.previous_secret is not None and (hook.previous_until or 0.0) > now:
                secrets.append(hook.previous_secret)
            taken.append(
                Due(
                    row.id,
                    row.tries,
                    hook.url,
                    tuple(secrets),
                    row.event_id,
                    row.type,
                    row.object_id,
                    row.created_at,
                )
            )
        self._session.flush()
        return taken

    def settle(self, due: Due, attempt: Attempt, *, jitter: float) -> DeliveryStatus | None:
        """Write down what came of a try; None when the delivery is not this worker's any more.

        What failed is due again after a growing pause. After the last try, or when the receiver
        wants no more, its webhook is switched off, unless others have got through meanwhile.
        """
        found = select(WebhookDelivery).where(WebhookDelivery.id == due.id).with_for_update()
        row = self._session.execute(found).scalar_one_or_none()
        if row is None or row.status is not DeliveryStatus.PENDING or row.tries != due.tries:
            return None
        now = self._session.execute(select(db_now())).scalar_one()
        shown = {
            "at": int(now),
            "status_code": attempt.status,
            "error": attempt.error,
            "duration_ms": attempt.duration_ms,
        }
        row.attempts = [*row.attempts, shown]
        delay = retry_delay_s(row.tries, jitter=jitter)
        if attempt.ok:
            row.status, row.delivered_at = DeliveryStatus.DELIVERED, now
        elif attempt.gone or delay is None:
            row.status = DeliveryStatus.FAILED
            self._give_up(row, attempt)
        else:
            row.due_at = now + delay
        self._session.flush()
        return row.status

    def forget(self, *, older_than_days: float) -> int:
        """Delete old entries of the log; what is still owed stays. Return how many went."""
        old = delete(WebhookDelivery).where(
            WebhookDelivery.status != DeliveryStatus.PENDING,
            WebhookDelivery.created_at < db_now() - older_than_days * DAY_S,
        )
        return len(self._session.execute(old.returning(WebhookDelivery.id)).all())

    def _give_up(self, row: WebhookDelivery, attempt: Attempt) -> None:
        hook = self._session.get(Webhook, row.webhook_id, with_for_update=True)
        since = row.attempts[0]["at"]
        got_through = select(func.count()).where(
            WebhookDelivery.webhook_id == row.webhook_id, WebhookDelivery.delivered_at >= since
        )
        works = self._session.execute(got_through).scalar_one() > 0
        if hook is None or not hook.enabled or (works and not attempt.gone):
            return
        what = attempt.error or f"it answered {attempt.status}"
        hook.enabled = False
        hook.disabled_reason = f"after {row.tries} tries of delivery {row.id}: {what}"[:500]
        owe(
            self._session, hook.owner_id, WebhookEventType.WEBHOOK_DISABLED, hook.id,
            event_id=new_id(IdPrefix.EVENT),
        )  # fmt: skip
