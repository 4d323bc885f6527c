"""What a caller is, has used, and may use."""

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BeforeValidator, ConfigDict, Field
from sqlalchemy.orm import Session

from app.api_keys import KeyView, key_view
from app.deps import ID_PATTERN, Admin, AnyCaller, Config, Db
from app.responses import Schema
from core.errors import InvalidInput, NotFound
from core.lifecycle import JobKind
from core.spec import SpecModel
from models.owner import Owner
from models.repositories.owners import OwnerRepository
from models.repositories.quotas import (
    DEFAULT_SUBJECT,
    UNLIMITED,
    QuotaName,
    QuotaRepository,
    next_month,
)

router = APIRouter(tags=["usage"])

MAX_DAYS = 366
_DAYS = 30
_LARGEST = 2**53
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
OwnerId = Annotated[str, Path(pattern=ID_PATTERN)]
Limit = Annotated[int, Field(ge=0, le=_LARGEST)] | Literal["unlimited"] | None


def _as_written(given: object) -> object:
    """Refuse what pydantic takes for a day as well: seconds and times."""
    if isinstance(given, str) and _DAY.fullmatch(given) is None:
        raise ValueError("expected a day, such as 2026-01-31")
    return given


Day = Annotated[date, BeforeValidator(_as_written)]


class OwnerView(Schema):
    """Whose objects a caller sees."""

    object: Literal["owner"] = "owner"
    id: str
    name: str


class Me(Schema):
    """Who asks."""

    object: Literal["me"] = "me"
    owner: OwnerView
    key: KeyView | None = Field(description="null where the server asks for no keys")
    requests_per_minute: int | None = Field(description="null: no limit")


class GpuUsageView(Schema):
    """Device seconds of one day (UTC) and one kind of job."""

    day: date
    kind: JobKind
    gpu_seconds: float


class StoredView(Schema):
    """What lies on the disk of the server."""

    bytes: int
    dataset_bytes: int
    file_bytes: int
    checkpoint_bytes: int
    rows: int


class Usage(Schema):
    """What an owner has used."""

    object: Literal["usage"] = "usage"
    start: date
    end: date
    gpu_seconds: float
    data: list[GpuUsageView]
    stored: StoredView


class QuotaView(Schema):
    """One limit; `limit` null is none, `used` null where each object counts by itself."""

    name: QuotaName
    limit: int | None
    used: float | None
    frees_at: int | None = Field(description="when all of it is free again, where that is known")


class Quotas(Schema):
    """All limits of an owner."""

    object: Literal["quotas"] = "quotas"
    owner: str | None = Field(description="null: all that have no limits of their own")
    data: list[QuotaView]


class SetQuotas(SpecModel):
    """New limits; what is left out stays. null takes a limit back, so that the default holds."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"running_jobs": 2, "queued_jobs": 50, "stored_bytes": "unlimited"}]
        }
    )

    running_jobs: Limit = None
    queued_jobs: Limit = None
    gpu_seconds_month: Limit = None
    stored_bytes: Limit = None
    dataset_rows: Limit = None
    upload_bytes: Limit = None


@router.get("/me", operation_id="get_me")
def get_me(caller: AnyCaller, database: Db, settings: Config) -> Me:
    """Say who the caller is and what its key may do."""
    with database.reading() as session:
        owners = OwnerRepository(session)
        owner = owners.get(caller.owner_id)
        key = owners.find_key(caller.key_id)
        view = None if key is None else key_view(key, owner)
    rate = None if view is None else view.requests_per_minute
    return Me(
        owner=OwnerView(id=owner.id, name=owner.name),
        key=view,
        requests_per_minute=None if view is None else rate or settings.auth.requests_per_minute,
    )


@router.get("/usage", operation_id="get_usage")
def get_usage(
    caller: AnyCaller,
    database: Db,
    start: Annotated[Day | None, Query(description="first day, UTC; default: 30 days")] = None,
    end: Annotated[Day | None, Query(description="last day, UTC; default: today")] = None,
) -> Usage:
    """Return device seconds by day and kind of job, and what is stored now."""
    last = end or datetime.now(UTC).date()
    first = start or last - min(timedelta(days=_DAYS - 1), last - date.min)
    if not 0 <= (last - first).days < MAX_DAYS:
        raise InvalidInput(
            f"received {first} to {last}, expected 1 to {MAX_DAYS} days in that order",
            param="start",
        )
    with database.reading() as session:
        quotas = QuotaRepository(session)
        days = quotas.gpu_days(caller.owner_id, first, last)
        stored = quotas.stored(caller.owner_id)
    return Usage(
        start=first,
        end=last,
        gpu_seconds=sum(one.seconds for one in days),
        data=[GpuUsageView(day=d.day, kind=d.kind, gpu_seconds=d.seconds) for d in days],
        stored=StoredView(
            bytes=stored.bytes,
            dataset_bytes=stored.dataset_bytes,
            file_bytes=stored.file_bytes,
            checkpoint_bytes=stored.checkpoint_bytes,
            rows=stored.rows,
        ),
    )


@router.get("/quotas", operation_id="get_quotas")
def get_quotas(caller: AnyCaller, database: Db) -> Quotas:
    """Return the caller's limits and what of them is used."""
    with database.reading() as session:
        owner = OwnerRepository(session).get(caller.owner_id)
        return _quotas(QuotaRepository(session), owner.id, owner.name)


@router.patch("/quotas/default", operation_id="set_default_quotas")
def set_default_quotas(_admin: Admin, database: Db, body: SetQuotas) -> Quotas:
    """Set the limits of all owners that have none of their own.

    They hold from the next request and the next claim on; nothing that runs is stopped.
    """
    with database.transaction() as session:
        quotas = QuotaRepository(session)
        quotas.give(DEFAULT_SUBJECT, _given(body))
        return _quotas(quotas, DEFAULT_SUBJECT, None)


@router.get("/owners/{owner_id}/quotas", operation_id="get_owner_quotas")
def get_owner_quotas(_admin: Admin, database: Db, owner_id: OwnerId) -> Quotas:
    """Return the limits of one owner and what of them is used."""
    with database.reading() as session:
        owner = _owner(session, owner_id)
        return _quotas(QuotaRepository(session), owner.id, owner.name)


@router.patch("/owners/{owner_id}/quotas", operation_id="set_owner_quotas")
def set_owner_quotas(_admin: Admin, database: Db, owner_id: OwnerId, body: SetQuotas) -> Quotas:
    """Set limits of one owner; they go before those for all."""
    with database.transaction() as session:
        owner = _owner(session, owner_id)
        quotas = QuotaRepository(session)
        quotas.give(owner.id, _given(body))
        return _quotas(quotas, owner.id, owner.name)


def _owner(session: Session, owner_id: str) -> Owner:
    owner = OwnerRepository(session).find_id(owner_id)
    if owner is None:
        raise NotFound(f"no owner {owner_id!r}", hint="GET /v1/api_keys names the owners of keys")
    return owner


def _given(body: SetQuotas) -> dict[QuotaName, int | None]:
    """Return what the body says, and only that."""
    said = {name: getattr(body, name.value) for name in QuotaName}
    return {
        name: UNLIMITED if value == "unlimited" else value
        for name, value in said.items()
        if name.value in body.model_fields_set
    }


def _quotas(quotas: QuotaRepository, subject: str, owner: str | None) -> Quotas:
    """Return the view of the limits of an owner, or of those for all, which nobody uses."""
    limits = quotas.limits(subject)
    used: dict[QuotaName, float | None] = dict.fromkeys(QuotaName)
    if subject != DEFAULT_SUBJECT:
        used |= {
            QuotaName.RUNNING_JOBS: quotas.running(subject),
            QuotaName.QUEUED_JOBS: quotas.waiting(subject),
            QuotaName.GPU_SECONDS_MONTH: quotas.gpu_seconds_month(subject),
            QuotaName.STORED_BYTES: quotas.stored(subject).bytes,
        }
    month = int(next_month(datetime.now(UTC)))
    return Quotas(
        owner=owner,
        data=[
            QuotaView(
                name=name,
                limit=limits[name],
                used=used[name],
                frees_at=month if name is QuotaName.GPU_SECONDS_MONTH else None,
            )
            for name in QuotaName
        ],
    )
