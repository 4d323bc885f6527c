"""Token buckets: as many as are allowed at once, then at the rate; one bucket for all processes."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis

from app.limits import Limiter, LocalLimiter, RedisLimiter, Taken
from tests.servers import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["local", "redis"])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[Limiter]:
    made: Limiter = LocalLimiter()
    if request.param == "redis":
        made = RedisLimiter(request.getfixturevalue("redis_url"), prefix="test:")
    yield made
    await made.close()


async def test_a_full_bucket_then_nothing_then_the_rate(limiter: Limiter) -> None:
    # 600 a minute: one comes back each 100 ms. The bucket is emptied faster than that.
    taken = [await limiter.take("key_a", 600) for _ in range(600)]
    assert all(one.allowed for one in taken)
    assert (taken[0].limit, taken[0].remaining) == (600, 599)
    assert taken[-1].remaining <= 300
    refused = await _take_until_refused(limiter, "key_a", 600)
    assert refused.remaining == 0
    assert 0 < refused.retry_s <= 0.1
    assert int(refused.headers()["Retry-After"]) == 1
    await asyncio.sleep(refused.retry_s + 0.01)
    assert (await limiter.take("key_a", 600)).allowed
    assert (await limiter.take("key_b", 600)).allowed


async def test_requests_together_get_no_more_than_the_bucket(limiter: Limiter) -> None:
    taken = await asyncio.gather(*(limiter.take("key_a", 20) for _ in range(80)))
    assert 20 <= sum(one.allowed for one in taken) <= 21  # one comes back in 3 s


async def test_processes_share_the_bucket_in_redis(redis_url: str) -> None:
    limiters = [RedisLimiter(redis_url, prefix="test:") for _ in range(2)]
    taken = [await one.take("key_a", 5) for _ in range(4) for one in limiters]
    assert sum(one.allowed for one in taken) == 5
    for one in limiters:
        await one.close()


async def test_rates_hold_in_the_process_while_redis_is_away(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = RedisLimiter(redis_server.url, prefix="test:")
    assert (await limiter.take("key_a", 3)).allowed
    redis_server.kill()
    taken = [await limiter.take("key_a", 3) for _ in range(5)]
    assert [one.allowed for one in taken] == [True, True, True, False, False]
    assert sum("Redis does not answer" in record.message for record in caplog.records) == 1
    await limiter.close()


async def test_a_connection_that_redis_has_closed_is_made_again(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = RedisLimiter(redis_url, prefix="test:")
    assert (await limiter.take("key_a", 3)).allowed
    with redis.Redis.from_url(redis_url) as admin:
        assert admin.client_kill_filter(_type="normal", skipme=True) >= 1
    await asyncio.sleep(0.05)
    assert (await limiter.take("key_a", 3)).remaining == 1
    assert not caplog.records
    await limiter.close()


def test_headers_are_those_of_the_draft_and_of_openai() -> None:
    headers = Taken(allowed=True, limit=60, remaining=59, full_s=0.4, retry_s=0.0).headers()
    assert headers == {
        "RateLimit-Policy": '"key";q=60;w=60',
        "RateLimit": '"key";r=59;t=1',
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
    }


async def _take_until_refused(limiter: Limiter, key: str, per_minute: int) -> Taken:
    for _ in range(per_minute):
        taken = await limiter.take(key, per_minute)
        if not taken.allowed:
            return taken
    raise AssertionError("the bucket is never empty")
