"""How often a key may ask: a token bucket for each key, in Redis where several processes serve."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import redis
import redis.asyncio
from fastapi import FastAPI, Request, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import kdpo_problem
from app.middleware import MULTIPART_OVERHEAD
from core.errors import QuotaExceeded, TooManyRequests
from core.lifecycle import JobKind
from core.settings import Settings
from models.repositories.quotas import QuotaRepository
from models.session import Database

ACCOUNT = "kdpo.account"
WINDOW_S = 60.0
# A Redis that has failed is not asked again for so long; requests must not wait for it.
_AWAY_S = 5.0
_TIMEOUT_S = 1.0
_CONNECTIONS = 32
_PRUNE_AT = 10_000
_JOB_PATHS = frozenset({"/v1/datasets", "/v1/recommendations"})
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")

# The time at which the bucket is full again (GCRA). One script, so that processes cannot mix.
_SCRIPT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local full = tonumber(redis.call('GET', KEYS[1]) or now)
if full < now then full = now end
local after = full + tonumber(ARGV[1])
if after - now > tonumber(ARGV[2]) then
  return {0, string.format('%.6f', full - now)}
end
redis.call('SET', KEYS[1], string.format('%.6f', after), 'PX', math.ceil((after - now) * 1000))
return {1, string.format('%.6f', after - now)}
"""

_log = logging.getLogger("kdpo.limits")


@dataclass(frozen=True)
class Taken:
    """What a bucket said: whether the request may pass, and how full the bucket is."""

    allowed: bool
    limit: int
    remaining: int
    full_s: float
    retry_s: float

    def headers(self) -> dict[str, str]:
        """Return the headers of the IETF draft, and those that OpenAI's clients know."""
        full = math.ceil(self.full_s)
        headers = {
            "RateLimit-Policy": f'"key";q={self.limit};w={WINDOW_S:.0f}',
            "RateLimit": f'"key";r={self.remaining};t={full}',
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": f"{full}s",
        }
        return headers if self.allowed else {**headers, "Retry-After": str(self._wait())}

    def _wait(self) -> int:
        return max(1, math.ceil(self.retry_s))


@dataclass
class Account:
    """Who a request turned out to be from; filled while the request is served."""

    owner_id: str | None = None
    key_id: str | None = None
    taken: Taken | None = None


class Limiter(Protocol):
    """Takes one token out of a key's bucket."""

    async def take(self, key_id: str, per_minute: int) -> Taken:
        """Return whether the key may ask once more now."""

    async def close(self) -> None:
        """Close all connections."""


class LocalLimiter:
    """Buckets of one process, all on its event loop."""

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}

    async def take(self, key_id: str, per_minute: int) -> Taken:
        """Return whether the key may ask once more now."""
        now = time.monotonic()
        if len(self._full_at) > _PRUNE_AT:
            self._full_at = {k: at for k, at in self._full_at.items() if at > now}
        full = max(self._full_at.get(key_id, now), now)
        after = full + WINDOW_S / per_minute
        allowed = after - now <= WINDOW_S
        if allowed:
            self._full_at[key_id] = after
        return _taken(allowed, (after if allowed else full) - now, per_minute)

    async def close(self) -> None:
        """Nothing is open."""


class RedisLimiter:
    """Buckets that all processes share; while Redis is away, those of this process hold."""

    def __init__(self, url: str, *, prefix: str) -> None:
        # RESP2: with RESP3 a pooled connection that Redis has closed is not made again.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, timeout=_TIMEOUT_S,
            max_connections=_CONNECTIONS, protocol=2,
        )  # fmt: skip
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._script = self._client.register_script(_SCRIPT)
        self._prefix = prefix
        self._local = LocalLimiter()
        self._away_until = 0.0

    async def take(self, key_id: str, per_minute: int) -> Taken:
        """Return whether the key may ask once more now."""
        if time.monotonic() < self._away_until:
            return await self._local.take(key_id, per_minute)
        try:
            allowed, full_s = await self._script(
                keys=[f"{self._prefix}rate:{key_id}"], args=[WINDOW_S / per_minute, WINDOW_S]
            )
        # A RuntimeError is uvloop's, of a connection that is closed already.
        except (redis.RedisError, OSError, RuntimeError) as error:
            self._away_until = time.monotonic() + _AWAY_S
            _log.warning(
                "Redis does not answer (%s): rates hold in each process alone for %.0f s",
                type(error).__name__, _AWAY_S,
            )  # fmt: skip
            return await self._local.take(key_id, per_minute)
        return _taken(bool(allowed), float(full_s), per_minute)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def make_limiter(settings: Settings) -> Limiter:
    """Return the limiter of an API process: shared where the broker is a Redis."""
    if settings.broker_url.startswith(_REDIS_SCHEMES):
        return RedisLimiter(settings.broker_url, prefix=settings.broker.key_prefix)
    return LocalLimiter()


def _taken(allowed: bool, full_s: float, per_minute: int) -> Taken:
    each = WINDOW_S / per_minute
    # Rounded first: 60 s less 59.9 s is 0.0999… s.
    remaining = max(0, math.floor(round((WINDOW_S - full_s) / each, 6)))
    return Taken(allowed, per_minute, remaining, full_s, max(0.0, full_s + each - WINDOW_S))


async def spend(request: Request, *, owner_id: str, key_id: str, per_minute: int) -> None:
    """Take one token of the key, once in a request, and let the response tell how many are left.

    Raises:
        TooManyRequests: the bucket is empty.
    """
    account = request.scope.get(ACCOUNT)
    if isinstance(account, Account) and account.taken is not None and account.key_id == key_id:
        return
    limiter: Limiter = request.app.state.limiter
    taken = await limiter.take(key_id, per_minute)
    note_caller(request, owner_id=owner_id, key_id=key_id, taken=taken)
    if not taken.allowed:
        raise TooManyRequests(
            f"this API key may ask {per_minute} times a minute; wait {taken.retry_s:.3g} s",
            code="rate_limit_exceeded",
            hint="wait as long as Retry-After says; a stream of events needs one request",
        )


def note_caller(
    request: Request, *, owner_id: str, key_id: str | None, taken: Taken | None = None
) -> None:
    """Tell the layers around the endpoint who asks."""
    account = request.scope.get(ACCOUNT)
    if isinstance(account, Account):
        account.owner_id, account.key_id, account.taken = owner_id, key_id, taken


def admit_upload(request: Request, told_bytes: int) -> None:
    """Refuse an upload before it is sent where it would be refused afterwards.

    Raises:
        QuotaExceeded: the owner may not upload or store so much, or has too many jobs waiting.
    """
    account = request.scope.get(ACCOUNT)
    if not isinstance(account, Account) or account.owner_id is None:
        return
    database: Database = request.app.state.database
    # Some of the body are boundaries and fields.
    size_bytes = max(0, told_bytes - MULTIPART_OVERHEAD)
    with database.transaction() as session:
        quotas = QuotaRepository(session)
        quotas.admit_bytes(account.owner_id, size_bytes)
        if request.url.path in _JOB_PATHS:
            quotas.admit_job(account.owner_id, JobKind.DATASET)


class Accounts:
    """Holds who a request is from, and adds the rate headers to its response. Pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        account = Account()
        scope[ACCOUNT] = account

        async def send_with_rate(message: Message) -> None:
            if message["type"] == "http.response.start" and account.taken is not None:
                MutableHeaders(scope=message).update(account.taken.headers())
            await send(message)

        await self.app(scope, receive, send_with_rate)


def install(app: FastAPI) -> None:
    """Answer a quota that is used up with what a program needs to wait for it."""
    app.add_exception_handler(QuotaExceeded, _on_quota)


async def _on_quota(request: Request, error: Exception) -> Response:
    if not isinstance(error, QuotaExceeded):
        raise error
    response = kdpo_problem(request, error, extra={"quota": quota_member(error)})
    # OpenAI's clients would send the same request three times within seconds.
    response.headers["x-should-retry"] = "false"
    if error.frees_at is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.frees_at - time.time())))
    elif "Retry-After" in response.headers:
        del response.headers["Retry-After"]
    return response


def quota_member(error: QuotaExceeded) -> Mapping[str, object]:
    """Return the member of a problem that says which quota is used up."""
    return {
        "name": error.quota,
        "limit": error.limit,
        "used": error.used,
        "frees": error.frees,
        "frees_at": None if error.frees_at is None else int(error.frees_at),
    }
