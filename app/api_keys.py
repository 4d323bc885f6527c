"""API keys: made by administrators, shown once, revoked for good."""

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field, field_validator
from pydantic.config import JsonDict
from starlette.concurrency import run_in_threadpool

from app.deps import ID_PATTERN, TEXT_PATTERN, Admin, Config, Db, Lists, PageOf
from app.key_ring import KeyRing
from app.keys import Scope, make_key
from app.responses import NO_STORE, ListOf, Schema, json_response, unix
from core.errors import InvalidInput, NotFound
from core.spec import SpecModel
from models.owner import ApiKey, Owner
from models.repositories.owners import OwnerRepository
from models.session import Database

router = APIRouter(prefix="/api_keys", tags=["keys"])

KeyId = Annotated[str, Path(pattern=ID_PATTERN)]
OwnerName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
PerMinute = Annotated[int, Field(ge=1, le=1_000_000_000)]
_EXAMPLE: JsonDict = {
    "name": "notebook of Ada",
    "owner": "ada",
    "scopes": ["datasets:read", "datasets:write", "jobs:read", "jobs:write", "artifacts:read"],
    "expires_at": 1830297600,
    "requests_per_minute": 600,
}


class CreateKey(SpecModel):
    """What a new key may do, for whom, and until when."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    name: OwnerName = Field(description="what the key is for")
    owner: OwnerName = Field(description="whose objects it sees; made if there is none")
    scopes: list[Scope] = Field(min_length=1, max_length=len(Scope))
    expires_at: int | None = Field(default=None, ge=0, le=253_402_300_799, description="unix time")
    requests_per_minute: PerMinute | None = Field(
        default=None, description="null: as many as all keys"
    )

    @field_validator("scopes")
    @classmethod
    def _sorted(cls, scopes: list[Scope]) -> list[Scope]:
        return sorted(set(scopes))


class KeyView(Schema):
    """A key without its secret."""

    object: Literal["api_key"] = "api_key"
    id: str
    name: str
    prefix: str
    owner: str
    owner_id: str
    scopes: list[Scope]
    requests_per_minute: int | None
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    revoked_at: int | None


class NewKeyView(KeyView):
    """A key that has just been made; `secret` is shown only now."""

    secret: str


def key_view(key: ApiKey, owner: Owner) -> KeyView:
    """Return the view of a key."""
    return KeyView(
        id=key.id,
        name=key.name,
        prefix=key.prefix,
        owner=owner.name,
        owner_id=owner.id,
        scopes=[Scope(scope) for scope in key.scopes],
        requests_per_minute=key.requests_per_minute,
        created_at=int(key.created_at),
        expires_at=unix(key.expires_at),
        last_used_at=unix(key.last_used_at),
        revoked_at=unix(key.revoked_at),
    )


@router.get("", operation_id="list_api_keys")
def list_api_keys(
    _admin: Admin,
    database: Db,
    query: PageOf,
    lists: Lists,
    owner: Annotated[str | None, Query(max_length=200, pattern=TEXT_PATTERN)] = None,
) -> ListOf[KeyView]:
    """List the keys of all owners, or of the one that is named, newest first."""
    with database.reading() as session:
        page = OwnerRepository(session).key_page(query, owner_name=owner)
        views = [key_view(key, of) for key, of in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.post("", operation_id="create_api_key", status_code=201, response_model=NewKeyView)
def create_api_key(_admin: Admin, database: Db, settings: Config, body: CreateKey) -> Response:
    """Make a key; the answer is the only place where its secret is ever shown.

    `admin` is for the whole service: such a key sees workers, the audit log and the keys of all
    owners, and datasets, jobs and artifacts of its own owner only.
    """
    if body.expires_at is not None and body.expires_at <= time.time():
        raise InvalidInput(
            f"expires_at is {body.expires_at}, which is past; expected a later unix time",
            param="expires_at",
        )
    new = make_key(settings.environment)
    with database.transaction() as session:
        owners = OwnerRepository(session)
        owner = owners.ensure(body.owner)
        key = owners.add_key(
            owner_id=owner.id,
            name=body.name,
            prefix=new.prefix,
            secret_sha256=new.sha256,
            scopes=[scope.value for scope in body.scopes],
            expires_at=body.expires_at,
            requests_per_minute=body.requests_per_minute,
        )
        session.refresh(key)
        view = key_view(key, owner)
    made = NewKeyView(**view.model_dump(), secret=new.secret)
    return json_response(made, status=201, headers=NO_STORE)


@router.delete(
    "/{key_id}",
    operation_id="revoke_api_key",
    status_code=204,
    responses={204: {"description": "Revoked: within a second no request with it passes any more"}},
)
async def revoke_api_key(request: Request, _admin: Admin, database: Db, key_id: KeyId) -> None:
    """Revoke a key for good; its row stays for the audit log.

    It opens nothing more on this process at once, on other ones of the server within a second.
    """
    await run_in_threadpool(_revoke, database, key_id)
    ring: KeyRing = request.app.state.keys
    ring.forget()


def _revoke(database: Database, key_id: str) -> None:
    with database.transaction() as session:
        if not OwnerRepository(session).revoke_key(key_id):
            raise NotFound(f"no usable key {key_id!r}", hint="GET /v1/api_keys lists them")
