"""Shared forms of answers: lists, ETags, and waiting for a row to change."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal, TypeVar

import anyio
from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import URL

from app.errors import public_url
from core.errors import Changed

T = TypeVar("T")
NO_STORE = {"Cache-Control": "no-store"}
"""Of answers with secrets: neither caches nor `app.idempotency` keep them."""
POLL_FIRST_S = 0.05
POLL_MAX_S = 0.5


class Schema(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True)


class ListOf(Schema, Generic[T]):
    """One page in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


def list_of(items: Sequence[T], ids: Sequence[str], *, has_more: bool) -> ListOf[T]:
    """Return a page of objects with their ids."""
    return ListOf(
        data=list(items),
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=has_more,
    )


def next_page(request: Request, page: ListOf[T]) -> dict[str, str]:
    """Return the `Link` header (RFC 8288) to the page behind this one; nothing on the last."""
    if not page.has_more:
        return {}
    backwards = "before" in request.query_params and "after" not in request.query_params
    cursor = {"before": page.first_id} if backwards else {"after": page.last_id}
    url = URL(f"{public_url(request)}{request.url.path}?{request.url.query}")
    return {"Link": f'<{url.include_query_params(**cursor)}>; rel="next"'}


def unix(seconds: float | None) -> int | None:
    """Return a time as whole unix seconds."""
    return None if seconds is None else int(seconds)


def json_response(
    body: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an object as JSON."""
    return Response(
        content=body.model_dump_json(),
        status_code=status,
        media_type="application/json",
        headers=dict(headers or {}),
    )


def conditional(request: Request, body: BaseModel) -> Response:
    """Return an object with its weak ETag, or 304 when the client has this very content already."""
    content = body.model_dump_json()
    etag = _etag(content)
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return Response(content=content, media_type="application/json", headers=headers)


def with_etag(body: BaseModel) -> Response:
    """Return a changed object with its new weak ETag, for the next `If-Match`."""
    content = body.model_dump_json()
    headers = {"ETag": _etag(content), "Cache-Control": "private, no-cache"}
    return Response(content=content, media_type="application/json", headers=headers)


def check_if_match(header: str | None, body: BaseModel) -> None:
    """Refuse a request for another version of an object; its row must be locked.

    Raises:
        Changed: `If-Match` names other ETags than the one of `body`.
    """
    etag = _etag(body.model_dump_json())
    if header is not None and not etag_matches(header, etag):
        raise Changed(
            f"If-Match is {header!r} and the object's ETag is {etag}",
            hint="read the object again, and decide by what it is now",
        )


def _etag(content: str) -> str:
    return f'W/"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether `If-None-Match` names the ETag, by the weak comparison (RFC 9110, 13.1.2)."""
    if header is None:
        return False
    if header.strip() == "*":
        return True
    named = (part.strip().removeprefix("W/") for part in header.split(","))
    return etag.removeprefix("W/") in named


async def wait_until(ready: Callable[[], bool], seconds: float) -> bool:
    """Ask a blocking question again and again until it is true or time is up.

    The thread pool is used only while the question runs, so many requests can wait at once.
    """
    deadline = time.monotonic() + seconds
    pause = POLL_FIRST_S
    while True:
        if await run_in_threadpool(ready):
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        await anyio.sleep(min(pause, left))
        pause = min(pause * 1.5, POLL_MAX_S)
