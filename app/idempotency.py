"""Requests that happen once: `Idempotency-Key`, and retries of OpenAI's clients. Pure ASGI.

The answer to the first request of a key is kept for a day and sent again to every later one. When
the process dies between making a job and answering, the job is found by the key and shown.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.deps import paid_key, refuse_foreign_pages
from app.errors import kdpo_problem, problem_response
from app.exchange_bodies import Answer, Body
from core.errors import KdpoError, StorageFull, Unavailable
from core.lifecycle import JobKind
from core.settings import Settings
from models.job import Job
from models.repositories.replays import (
    KEPT_S,
    Found,
    ReplayRepository,
    ReplayScope,
    claimed,
)
from models.session import Database

_log = logging.getLogger("kdpo.idempotency")

KEY_HEADER = "idempotency-key"
RETRY_HEADER = "x-stainless-retry-count"
RETRIED_WITHIN_S = 600.0
LEASE_S = 30.0
_MAX_PATH = 1024
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_KEPT_HEADERS = ("content-type", "location", "etag", "link", "preference-applied")
# What a client without a key sends again is caught where it would start work again.
_LAUNCHES = re.compile(
    r"/v1/(datasets|recommendations|fine_tuning/jobs|studies|evaluations"
    r"|recommendations/[^/]+/accept|studies/[^/]+/clone|checkpoints/[^/]+/export"
    r"|(fine_tuning/)?jobs/[^/]+/retry)"
)
# Nothing is made twice by these, and what they answer is not to be kept.
_MAKES_NOTHING = re.compile(r"/v1/checkpoints/[^/]+/download_url")
# Their answers are of what was stored, and not of the job that the storing made.
_STORES = re.compile(r"/v1/(files|uploads)(/.*)?")


class Idempotency:
    """Between the limits on bodies and the endpoints."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PATCH"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key, retry = headers.get(KEY_HEADER), headers.get(RETRY_HEADER)
        has_form = headers.get("content-type", "").lower().startswith("multipart/")
        by_retry = retry is not None and not has_form and _LAUNCHES.fullmatch(scope["path"])
        if (key is None and not by_retry) or _MAKES_NOTHING.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        if key is not None and (not _KEY.fullmatch(key) or len(scope["path"]) > _MAX_PATH):
            await _refuse_key(scope, receive, send, key)
            return
        try:
            caller = await _caller_id(Request(scope))
            if caller is None:
                await self.app(scope, receive, send)  # which says what is wrong with the API key
                return
            of_key = ReplayScope(caller, scope["method"], scope["path"], key or "")
            await self._exchange(of_key, retry if by_retry else None, scope, receive, send)
        except KdpoError as error:  # the key has asked too often, or the database is away
            await kdpo_problem(Request(scope), error)(scope, receive, send)
        except HTTPException as error:  # the body is too large, found by reading it here
            response = problem_response(
                Request(scope), status=error.status_code, code="too_large", detail=error.detail
            )
            await response(scope, receive, send)

    async def _exchange(
        self, key: ReplayScope, retry: str | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Do a request once for its key, or for its body where a client repeats it without one."""
        body = Body(receive, scope)
        kept_s: float | None = KEPT_S
        if not key.key:
            await body.read_ahead()
            key = replace(key, key=f"retry:{body.fingerprint}")
            kept_s = None if retry == "0" else RETRIED_WITHIN_S
        app: FastAPI = scope["app"]
        exchange = Exchange(self.app, app.state.database, scope, send, body, key)
        await exchange.run(kept_s=kept_s)


@dataclass(frozen=True)
class Exchange:
    """One request with a key, and what is known about the key."""

    app: ASGIApp
    database: Database
    scope: Scope
    send: Send
    body: Body
    key: ReplayScope

    async def run(self, *, kept_s: float | None) -> None:
        """Do the request, or send again what was answered within `kept_s`; None: never again."""
        known = await run_in_threadpool(self._claim, kept_s)
        match known:
            case str():
                await self._first(known)
            case Found(running=True):
                await self._send_problem(
                    status=409,
                    code="request_in_progress",
                    detail="a request with this Idempotency-Key is still worked on",
                    hint="send it again shortly",
                    retryable=True,
                    headers={"Retry-After": "1", "x-should-retry": "true"},
                )
            case Found(status=None):
                await self._show_job(known)
            case _:
                await self._again(known)

    def _claim(self, kept_s: float | None) -> str | Found:
        """Return the claim of this request, or what is known of an earlier one."""
        while True:
            with self.database.transaction() as session:
                replays = ReplayRepository(session)
                if kept_s is None:
                    replays.forget(self.key)
                else:
                    found = replays.find(self.key, not_older_s=kept_s)
                    if found is not None:
                        if found.running or found.status is not None or found.job is not None:
                            return found
                        replays.forget(self.key)  # its process died and has made nothing
                claim = replays.begin(self.key, lease_s=LEASE_S)
                if claim is not None:
                    return claim

    async def _first(self, claim: str) -> None:
        answer = Answer(self.send)
        try:
            async with self._renewing(claim):
                if _STORES.fullmatch(self.key.path):
                    await self.app(self.scope, self.body.receive, answer.take)
                else:
                    with claimed(claim):
                        await self.app(self.scope, self.body.receive, answer.take)
        except Exception:
            await run_in_threadpool(self._keep, claim, None)
            raise
        if answer.is_held and answer.status < 400:
            await self.body.drain()
        await run_in_threadpool(self._keep, claim, answer)
        await answer.pass_on()

    def _keep(self, claim: str, answer: Answer | None) -> None:
        """Keep an answer that says what was done; an error leaves the key free."""
        try:
            with self.database.transaction() as session:
                replays = ReplayRepository(session)
                if answer is None or answer.status >= 400:
                    replays.release(claim)
                    return
                replays.answer(
                    claim,
                    fingerprint=self.body.fingerprint,
                    status=answer.status,
                    headers={n: answer.headers[n] for n in _KEPT_HEADERS if n in answer.headers},
                    body=answer.kept_body,
                )
        except (Unavailable, StorageFull) as error:
            # What was asked for is done; only a repetition of it will not see this answer.
            _log.warning("the answer to %s is not kept: %s", self.key.path, error.message)

    async def _again(self, found: Found) -> None:
        """Send the kept answer if this is the same request."""
        await self.body.drain()
        if found.fingerprint != self.body.fingerprint:
            await self._send_problem(
                status=422,
                code="idempotency_key_reused",
                detail="this Idempotency-Key came with another body before",
                hint="make a new key for each new request",
            )
        elif found.body is None:
            await self._send_problem(
                status=409,
                code="answer_not_kept",
                detail="this request was done, and its answer is one that the server never keeps",
                hint="list the objects to find what it made",
            )
        else:
            replay = Response(
                found.body,
                status_code=int(found.status or 200),
                headers={**found.headers, "Idempotency-Replayed": "true"},
            )
            await replay(self.scope, self.body.receive, self.send)

    async def _show_job(self, found: Found) -> None:
        """Answer with the job that a request has made whose answer was never sent."""
        if found.job is None:
            raise ValueError(f"claim {found.id} has neither an answer nor a job")
        path = _job_path(found.job)
        shown: Scope = {
            **self.scope, "method": "GET", "path": path, "raw_path": path.encode(),
            "query_string": b"", "headers": [
                pair for pair in self.scope["headers"] if pair[0] in (b"authorization", b"host")
            ],
        }  # fmt: skip

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                replayed = (b"idempotency-replayed", b"true")
                message = {**message, "headers": [*message["headers"], replayed]}
            await self.send(message)

        await self.app(shown, nothing, marked)

    @asynccontextmanager
    async def _renewing(self, claim: str) -> AsyncIterator[None]:
        task = asyncio.create_task(self._renew(claim))
        try:
            yield
        finally:
            task.cancel()

    async def _renew(self, claim: str) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            try:
                await run_in_threadpool(self._renew_once, claim)
            except (Unavailable, StorageFull) as error:
                _log.warning("a claim is not renewed: %s", error.message)

    def _renew_once(self, claim: str) -> None:
        with self.database.transaction() as session:
            ReplayRepository(session).renew(claim, lease_s=LEASE_S)

    async def _send_problem(
        self,
        *,
        status: int,
        code: str,
        detail: str,
        hint: str,
        retryable: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        problem = problem_response(
            Request(self.scope), status=status, code=code, detail=detail, hint=hint,
            param=KEY_HEADER, retryable=retryable, headers=headers,
        )  # fmt: skip
        await problem(self.scope, self.body.receive, self.send)


async def _caller_id(request: Request) -> str | None:
    """Return the id of the request's usable key, or of the owner where none is needed.

    The request is paid for here: the answer to a repetition is found without its endpoint.

    Raises:
        TooManyRequests: the key has asked too often.
        NotPermitted: keys are off, and a web page of somebody else asks.
    """
    settings: Settings = request.app.state.settings
    if not settings.auth.required:
        refuse_foreign_pages(request, settings)
        return str(request.app.state.default_owner_id)
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    key = await paid_key(request, secret.strip())
    return None if key is None else key.id


def _job_path(job: Job) -> str:
    match job.kind:
        case JobKind.TRAINING:
            return f"/v1/fine_tuning/jobs/{job.id}"
        case JobKind.RECOMMENDATION:
            return f"/v1/recommendations/{job.id}"
        case JobKind.EVALUATION:
            return f"/v1/evaluations/{job.id}"
        case JobKind.DATASET:
            return f"/v1/datasets/{job.dataset_id}"
        case _:
            return f"/v1/jobs/{job.id}"


async def _refuse_key(scope: Scope, receive: Receive, send: Send, key: str) -> None:
    response = problem_response(
        Request(scope), status=400, code="malformed_request", param=KEY_HEADER,
        detail=f"Idempotency-Key has {len(key)} characters; expected 1 to 200 of ASCII without "
        "spaces",
        hint="a fresh UUID for each request is a good key",
    )  # fmt: skip
    await response(scope, receive, send)
