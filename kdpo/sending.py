"""Sends requests as often as is right: backoff with jitter, `Retry-After`, idempotency keys."""

import json
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kdpo.errors import ApiError, ConnectionFailed, UnexpectedAnswer, api_error
from kdpo.flows import Close, Flow, Reply, Request, Send, Sleep, Stream, open_stream, read_stream

M = TypeVar("M", bound=BaseModel)

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
# A server that wants more patience than this has said something that a person should hear.
MAX_RETRY_AFTER_S = 60.0
_RETRIED = frozenset({408, 429, 502, 503, 504})
# Done twice, these have done it once.
_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})


@dataclass(frozen=True)
class Policy:
    """How often a request is tried again, and what chance makes of the pauses."""

    max_retries: int = 4
    chance: Callable[[], float] = random.random

    def pause_s(self, tries: int, retry_after: float | None = None) -> float:
        """Return how long to wait after the given number of tries, at least as the server asks."""
        backoff = min(FIRST_DELAY_S * 2.0 ** (tries - 1), MAX_DELAY_S) * (0.5 + self.chance() / 2)
        return backoff if retry_after is None else max(backoff, retry_after)


def sent(request: Request, policy: Policy) -> Flow[Reply]:
    """Return the answer to a request, tried again where that can help.

    It does no harm: what changes something carries a key, under which the server does it once.

    Raises:
        ApiError: the server refused.
        ConnectionFailed: the server cannot be reached.
    """
    request = with_key(request)
    tries = 0
    while True:
        tries += 1
        try:
            reply: Reply = yield Send(request)
        except ConnectionFailed:
            if tries > policy.max_retries:
                raise
            yield Sleep(policy.pause_s(tries))
            continue
        if reply.status < 400:
            return reply
        pause = asked_pause_s(reply.headers)
        if tries > policy.max_retries or not _should_retry(reply.status, reply.headers, pause):
            raise refusal(reply)
        yield Sleep(policy.pause_s(tries, pause))


def opened(request: Request) -> Flow[Stream]:
    """Begin an answer whose body is read bit by bit; it is tried once.

    Raises:
        ApiError: the server refused.
        ConnectionFailed: the server cannot be reached.
    """
    stream = yield from open_stream(request)
    if stream.status < 400:
        return stream
    content = bytearray()
    while chunk := (yield from read_stream(stream)):
        content += chunk
    yield Close(stream)
    raise refusal(Reply(stream.status, stream.headers, bytes(content)))


def with_key(request: Request) -> Request:
    """Return the request with a key of its own when it makes or changes something."""
    if request.method in _REPEATABLE or "Idempotency-Key" in request.headers:
        return request
    key = f"kdpo-{secrets.token_hex(16)}"
    return replace(request, headers={**request.headers, "Idempotency-Key": key})


def asked_pause_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `Retry-After` (RFC 9110, 10.2.3: a number, or a date)."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def refusal(reply: Reply) -> ApiError:
    """Return the error that an answer of 400 or above is."""
    try:
        body: object = json.loads(reply.content)
    except ValueError:
        body = reply.content.decode("utf-8", errors="replace")
    return api_error(reply.status, body, request_id=reply.headers.get("x-request-id"))


def parsed(kind: type[M], content: bytes) -> M:
    """Return an answer as a typed value.

    Raises:
        UnexpectedAnswer: it is something else.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise UnexpectedAnswer(
            f"expected a {kind.__name__}, received {content[:200]!r}",
            hint="is this the address of a kdpo server of this version?",
        ) from error


def json_body(content: bytes) -> Any:
    """Return an answer as plain values.

    Raises:
        UnexpectedAnswer: it is not JSON.
    """
    try:
        return json.loads(content) if content else None
    except ValueError as error:
        raise UnexpectedAnswer(
            f"expected JSON, received {content[:200]!r}",
            hint="is this the address of a kdpo server?",
        ) from error


def _should_retry(status: int, headers: Mapping[str, str], pause_s: float | None) -> bool:
    if pause_s is not None and pause_s > MAX_RETRY_AFTER_S:
        return False
    said = headers.get("x-should-retry")
    if said in ("true", "false"):
        return said == "true"
    return status in _RETRIED
