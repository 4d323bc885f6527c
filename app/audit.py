"""Who changed what, when, and from where: one entry for each request that may change something."""

import logging
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Query
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.deps import ID_PATTERN, Admin, Db, Lists, PageOf
from app.errors import REQUEST_ID
from app.limits import ACCOUNT, Account
from app.responses import ListOf, Schema
from core.errors import StorageFull, Unavailable
from models.audit import AuditEntry
from models.repositories.audit import AuditFilter, AuditRepository, Deed
from models.session import Database

router = APIRouter(prefix="/audit", tags=["audit"])

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_TOO_MANY = 429
_log = logging.getLogger("kdpo.audit")

UnixTime = Annotated[int | None, Query(ge=0, le=253_402_300_799, description="unix time")]
IdFilter = Annotated[str | None, Query(pattern=ID_PATTERN)]


class AuditView(Schema):
    """One request that may have changed something."""

    object: Literal["audit_entry"] = "audit_entry"
    id: str
    created_at: int
    owner_id: str
    key_id: str | None
    operation: str
    object_id: str | None
    method: str
    path: str
    status: int
    outcome: Literal["done", "refused", "failed"]
    address: str | None
    request_id: str


@router.get("", operation_id="list_audit_entries")
def list_audit_entries(
    _admin: Admin,
    database: Db,
    query: PageOf,
    lists: Lists,
    owner_id: IdFilter = None,
    key_id: IdFilter = None,
    operation: Annotated[str | None, Query(pattern=r"^[a-z_]{1,80}$")] = None,
    object_id: IdFilter = None,
    since: UnixTime = None,
    until: UnixTime = None,
) -> ListOf[AuditView]:
    """List who changed what, newest first, filtered by whatever is given."""
    wanted = AuditFilter(owner_id, key_id, operation, object_id, since, until)
    with database.reading() as session:
        page = AuditRepository(session).page(query, wanted)
        views = [_view(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


def _view(row: AuditEntry) -> AuditView:
    outcome: Literal["done", "refused", "failed"] = "done"
    if row.status >= 400:
        outcome = "refused" if row.status < 500 else "failed"
    return AuditView(
        id=row.id,
        created_at=int(row.created_at),
        owner_id=row.owner_id,
        key_id=row.key_id,
        operation=row.operation,
        object_id=row.object_id,
        method=row.method,
        path=row.path,
        status=row.status,
        outcome=outcome,
        address=row.address,
        request_id=row.request_id,
    )


class AuditLog:
    """Writes the entry of a request before the client sees its answer. Pure ASGI.

    Requests without a valid key change nothing and have no entry, nor have those that the rate
    limit turned away: neither may fill the table.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READS:
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def send_noted(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                # The first part of the body is awaited: it names what was made.
                held, start = start, None
                await self._note(scope, held["status"], message.get("body", b""))
                await send(held)
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:
            # The answer to this is made further outside.
            await self._note(scope, 500, b"")
            raise

    async def _note(self, scope: Scope, status: int, body: bytes) -> None:
        account = scope.get(ACCOUNT)
        route = scope.get("route")
        if not isinstance(account, Account) or account.owner_id is None:
            return
        if not isinstance(route, APIRoute):
            return
        if account.taken is not None and not account.taken.allowed:
            return
        client = scope.get("client")
        deed = Deed(
            owner_id=account.owner_id,
            key_id=account.key_id,
            operation=route.operation_id or route.name,
            object_id=_object_id(scope, status, body),
            method=scope["method"],
            path=scope["path"],
            status=status,
            address=None if client is None else str(client[0]),
            request_id=str(scope.get(REQUEST_ID)),
        )
        try:
            await run_in_threadpool(_write, scope["app"].state.database, deed)
        except (Unavailable, StorageFull) as error:
            # What was asked for is done or refused already; the log keeps what the table lacks.
            _log.error("the audit log lacks %s: %s", deed, error.message)


def _write(database: Database, deed: Deed) -> None:
    with database.transaction() as session:
        AuditRepository(session).add(deed)


def _object_id(scope: Scope, status: int, body: bytes) -> str | None:
    """Return what was changed: the id in the path, or that of what was made."""
    for value in scope.get("path_params", {}).values():
        return str(value)
    if status >= 400:
        return None
    try:
        made = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    found = made.get("id") if isinstance(made, dict) else None
    return found if isinstance(found, str) else None
