"""What endpoints ask for: settings, database, queue, the caller, a page, how long to wait.

What does not wait for anything is `async`: FastAPI takes a thread for each other one.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from fastapi import Depends, Header, Query, Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query as QueryParam
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.key_ring import KeyRing
from app.keys import Scope
from app.limits import note_caller, spend
from app.queue import CeleryQueue
from app.responses import ListOf, list_of, next_page
from core.errors import ErrorDetail, InvalidInput, NotPermitted, Unauthenticated, UnsupportedMedia
from core.settings import LOOPBACK_HOSTS, Settings
from models.owner import ApiKey
from models.repositories.paging import PageQuery
from models.session import Database

T = TypeVar("T")
DEFAULT_OWNER = "default"
# What reaches the database: Postgres refuses NUL in any text.
ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
TEXT_PATTERN = r"^[^\x00]*$"
# What a filter by metadata looks like: `metadata[team]=a`.
ANY_METADATA = "metadata[key]"
METADATA_NAME = re.compile(r"metadata\[([^\]\[\x00]{1,64})\]")
_WAIT = re.compile(r"\s*wait\s*=\s*\"?(\d{1,6})\"?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Caller:
    """Who asks, with which key, and what they may do; without keys the owner stands for it."""

    owner_id: str
    key_id: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Whether the caller has the scope."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def must(self, scope: Scope) -> None:
        """Refuse a caller without the scope.

        Raises:
            NotPermitted: the key lacks it.
        """
        if not self.may(scope):
            raise NotPermitted(
                f"this API key lacks the scope {scope.value!r}",
                hint=f"use a key with it: kdpo keys create --scope {scope.value}",
            )


async def get_settings(request: Request) -> Settings:
    """Return the settings that the application was made with."""
    settings: Settings = request.app.state.settings
    return settings


async def get_database(request: Request) -> Database:
    """Return the database of the application."""
    database: Database = request.app.state.database
    return database


async def get_queue(request: Request) -> CeleryQueue:
    """Return the queue of the application."""
    queue: CeleryQueue = request.app.state.queue
    return queue


Config = Annotated[Settings, Depends(get_settings)]
Db = Annotated[Database, Depends(get_database)]
Queue = Annotated[CeleryQueue, Depends(get_queue)]

_bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer dk-…`")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def authenticate(request: Request, credentials: Credentials) -> Caller:
    """Return who asks.

    Raises:
        Unauthenticated: there is no key, or it is unknown, revoked or expired.
        TooManyRequests: the key has asked too often.
        NotPermitted: keys are off, and a web page of somebody else asks.
    """
    settings: Settings = request.app.state.settings
    if not settings.auth.required:
        refuse_foreign_pages(request, settings)
        owner_id: str = request.app.state.default_owner_id
        note_caller(request, owner_id=owner_id, key_id=None)
        return Caller(owner_id, owner_id, frozenset({Scope.ADMIN}))
    if credentials is None:
        raise Unauthenticated(
            "no API key: expected the header `Authorization: Bearer dk-…`",
            code="missing_api_key",
            hint="`kdpo keys create` makes a key",
        )
    key = await paid_key(request, credentials.credentials)
    if key is None:
        raise Unauthenticated(
            "the API key is unknown, revoked or expired", hint="`kdpo keys list` shows the keys"
        )
    return Caller(key.owner_id, key.id, frozenset(key.scopes))


async def paid_key(request: Request, secret: str) -> ApiKey | None:
    """Return a usable key, one of its requests taken; None where there is no such key.

    Raises:
        TooManyRequests: the key has asked too often.
    """
    ring: KeyRing = request.app.state.keys
    settings: Settings = request.app.state.settings
    key = await ring.find(secret)
    if key is not None:
        rate = key.requests_per_minute or settings.auth.requests_per_minute
        await spend(request, owner_id=key.owner_id, key_id=key.id, per_minute=rate)
    return key


def refuse_foreign_pages(request: Request, settings: Settings) -> None:
    """Refuse what a browser of this machine sends for a page of somebody else.

    Without keys only the address protects the server, and a browser reaches it: by a form, or by a
    name of the page's own that is made to point here (DNS rebinding).

    Raises:
        NotPermitted: code `foreign_origin`: the host is not this machine, or the page another one.
    """
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    public = urlsplit(settings.api.public_url or "").hostname
    site = request.headers.get("sec-fetch-site", "none")
    if host not in {*LOOPBACK_HOSTS, public} or site not in ("none", "same-origin"):
        raise NotPermitted(
            f"this server asks for no keys and serves programs of its machine only; received the "
            f"host {host!r}, from a page {site}",
            code="foreign_origin",
            hint="use http://127.0.0.1, set KDPO_API__PUBLIC_URL, or KDPO_AUTH__REQUIRED=true",
        )


def requires(scope: Scope | None) -> Callable[[Request, Caller], Awaitable[Caller]]:
    """Return a dependency: a caller with the scope, and a request that says nothing unknown.

    None: any scope will do.
    """

    async def check(request: Request, caller: Annotated[Caller, Depends(authenticate)]) -> Caller:
        if scope is not None:
            caller.must(scope)
        refuse_unknown_query(request)
        refuse_other_bodies(request)
        return caller

    return check


ReadsDatasets = Annotated[Caller, Depends(requires(Scope.DATASETS_READ))]
WritesDatasets = Annotated[Caller, Depends(requires(Scope.DATASETS_WRITE))]
ReadsJobs = Annotated[Caller, Depends(requires(Scope.JOBS_READ))]
WritesJobs = Annotated[Caller, Depends(requires(Scope.JOBS_WRITE))]
ReadsArtifacts = Annotated[Caller, Depends(requires(Scope.ARTIFACTS_READ))]
WritesArtifacts = Annotated[Caller, Depends(requires(Scope.ARTIFACTS_WRITE))]
Admin = Annotated[Caller, Depends(requires(Scope.ADMIN))]
AnyCaller = Annotated[Caller, Depends(requires(None))]


def refuse_unknown_query(request: Request) -> None:
    """Refuse query parameters that the endpoint would ignore.

    Raises:
        InvalidInput: there is one.
    """
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute):
        return
    known = sorted(
        field.alias
        for field in get_flat_params(route.dependant)
        if isinstance(field.field_info, QueryParam)
    )
    unknown = sorted(set(request.query_params) - set(known))
    if ANY_METADATA in known:
        unknown = [name for name in unknown if METADATA_NAME.fullmatch(name) is None]
    if unknown:
        raise InvalidInput(
            f"unknown query parameter {unknown[0]!r}; this endpoint takes "
            + (", ".join(known) or "none"),
            code="unknown_parameter",
            param=unknown[0],
            errors=[
                ErrorDetail(code="extra_forbidden", detail="unknown", pointer=f"query/{name}")
                for name in unknown
            ],
        )


def refuse_other_bodies(request: Request) -> None:
    """Refuse a body that is not JSON where JSON is expected.

    Raises:
        UnsupportedMedia: the content type says otherwise.
    """
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or route.body_field is None:
        return
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    received = headers.get("content-type", "").partition(";")[0].strip().lower()
    if received != "application/json" and not received.endswith("+json"):
        raise UnsupportedMedia(
            f"received content type {received or 'none'!r}, expected application/json",
            hint="set the header `Content-Type: application/json`",
        )


IfMatch = Annotated[
    str | None,
    Header(max_length=1000, description="the object's ETag; refused with 412 when it has another"),
]


async def page_query(
    limit: Annotated[int, Query(ge=1, le=100, description="objects on a page")] = 20,
    after: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="id before the page")
    ] = None,
    before: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="id behind the page")
    ] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="by age")] = "desc",
) -> PageQuery:
    """Return which page of a list is asked for."""
    return PageQuery(limit=limit, after=after, before=before, order=order)


PageOf = Annotated[PageQuery, Depends(page_query)]


@dataclass(frozen=True)
class Lister:
    """Makes the answer of an endpoint that lists, with the `Link` header to its next page."""

    request: Request
    response: Response

    def page(self, items: Sequence[T], ids: Sequence[str], *, has_more: bool) -> ListOf[T]:
        """Return a page of objects with their ids."""
        page = list_of(items, ids, has_more=has_more)
        self.response.headers.update(next_page(self.request, page))
        return page


async def lister(request: Request, response: Response) -> Lister:
    """Return what makes the answer of an endpoint that lists."""
    return Lister(request, response)


Lists = Annotated[Lister, Depends(lister)]


@dataclass(frozen=True)
class Patience:
    """How long a request waits for what it started; `preferred` when the client said so."""

    seconds: float
    preferred: bool

    def headers(self) -> dict[str, str]:
        """Return the header that says how the preference was honoured (RFC 7240)."""
        return {"Preference-Applied": f"wait={self.seconds:g}"} if self.preferred else {}


async def patience(
    settings: Config,
    prefer: Annotated[
        str | None, Header(description="`wait=n`: answer when it is done, within n seconds")
    ] = None,
) -> Patience | None:
    """Return what `Prefer: wait=n` asks for, cut to `api.wait_max_s`; None without it."""
    for part in (prefer or "").split(","):
        match = _WAIT.fullmatch(part)
        if match is not None:
            seconds = min(float(match.group(1)), settings.api.wait_max_s)
            return Patience(seconds, preferred=True)
    return None


Prefer = Annotated[Patience | None, Depends(patience)]
