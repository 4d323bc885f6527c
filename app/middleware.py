"""Around every request: an id, one line in the log, and a limit on the body. Pure ASGI."""

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import REQUEST_ID, problem_response
from core.ids import IdPrefix, new_id

UPLOAD_PATHS = frozenset({"/v1/datasets", "/v1/recommendations", "/v1/files"})
_PART_PATH = re.compile(r"/v1/uploads/[^/]+/parts")
# Room for boundaries, headers and the small fields around an uploaded file.
MULTIPART_OVERHEAD = 64 * 1024

_log = logging.getLogger("kdpo.access")


class RequestLog:
    """Gives the request its id and writes one line when the response has been sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_id(IdPrefix.REQUEST)
        scope[REQUEST_ID] = request_id
        began = time.perf_counter()
        status, sent = 500, 0

        async def send_logged(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_logged)
        finally:
            _log.info(
                "%s %s %d", scope["method"], scope["path"], status,
                extra={"kdpo": {
                    "request_id": request_id, "method": scope["method"], "path": scope["path"],
                    "status": status, "bytes": sent,
                    "ms": round((time.perf_counter() - began) * 1000, 1),
                }},
            )  # fmt: skip


class BodyLimit:
    """Refuses bodies over the limit, by their length if it is told, else by counting."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_upload_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_upload_bytes = max_upload_bytes + MULTIPART_OVERHEAD

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kind = Headers(scope=scope).get("content-type", "").strip().lower()
        is_upload = (
            scope["method"] == "POST"
            and (scope["path"] in UPLOAD_PATHS or _PART_PATH.fullmatch(scope["path"]) is not None)
            and not kind.startswith("application/json")
        )
        limit = self.max_upload_bytes if is_upload else self.max_body_bytes
        told = Headers(scope=scope).get("content-length", "")
        if told.isascii() and told.isdigit() and int(told) > limit:
            response = problem_response(
                Request(scope), status=413, code="too_large", detail=_too_large(limit)
            )
            await response(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise HTTPException(413, _too_large(limit))
            return message

        await self.app(scope, receive_counted, send)


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes, which is the limit here"
