"""Load on a server of this machine: requests at a constant rate, one after the other, and streams.

Requests at a constant rate follow a schedule that does not wait for answers, and a latency counts
from the time at which its request was due: a server that stalls makes all requests late that were
due meanwhile, as it would for independent clients (no coordinated omission).
"""

import asyncio
import math
import re
import selectors
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_MARK = re.compile(rb'"round":(\d+)[,}]')
_READ_BYTES = 65_536
_CONNECTIONS = 250

T = TypeVar("T")
Row = dict[str, Any]


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; its timers are exact to microseconds, where epoll rounds up to a ms."""

    def loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(selectors.SelectSelector())

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that so large a part of all does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def summary(seconds: Sequence[float]) -> Row:
    """What is told of latencies, in ms."""
    return {
        "requests": len(seconds),
        **{f"p{p}_ms": 1e3 * quantile(seconds, p / 100) for p in (50, 95, 99)},
        "max_ms": 1e3 * max(seconds),
    }


class Connection:
    """One kept connection; an answer other than 200 is an error."""

    def __init__(self, port: int, secret: str) -> None:
        self._port = port
        self._head = f"Host: {HOST}\r\nAuthorization: Bearer {secret}\r\n".encode()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, path: str, accept: str = "application/json") -> asyncio.StreamReader:
        """Send a request; its answer is what the reader gives next."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(HOST, self._port)
        accepted = f"Accept: {accept}\r\n".encode()
        self._writer.write(f"GET {path} HTTP/1.1\r\n".encode() + self._head + accepted + b"\r\n")
        await self._writer.drain()
        return self._reader

    async def get(self, path: str) -> bytes:
        """Return the body of the answer; a connection that was closed while idle is made again.

        Raises:
            RuntimeError: the server refuses.
        """
        async with asyncio.timeout(TIMEOUT_S):
            is_kept = self._reader is not None
            try:
                reader, head = await self._asked(path)
            except (asyncio.IncompleteReadError, ConnectionError):
                if not is_kept:
                    raise
                self.close()
                reader, head = await self._asked(path)
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1]) if length is not None else 0)
        check(head, path, body)
        return body

    async def _asked(self, path: str) -> tuple[asyncio.StreamReader, bytes]:
        reader = await self.send(path)
        return reader, await reader.readuntil(b"\r\n\r\n")

    def close(self) -> None:
        """Close it; another request opens it again."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


def check(head: bytes, path: str, body: bytes = b"") -> None:
    """Refuse an answer that is not 200.

    Raises:
        RuntimeError: it is not.
    """
    if not head.startswith(b"HTTP/1.1 200 "):
        first = head.split(b"\r\n", 1)[0].decode()
        raise RuntimeError(f"{path}: {first} {body[:300].decode(errors='replace')}")


# ------------------------------------------------------------------ requests


@dataclass
class Rated:
    """Requests at a constant rate: seconds from when each was due, and how late each was sent."""

    seconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)


async def at_rate(
    port: int, secret: str, paths: Sequence[str], *, rate: float, seconds: float
) -> Rated:
    """Ask for the paths in turn, so many a second.

    Connections are made as they are needed; a request that finds all of them busy waits for one,
    and its latency counts on.
    """
    found, free = Rated(), [Connection(port, secret) for _ in range(4)]
    for connection in free:
        await connection.get(paths[0])
    places = asyncio.Semaphore(_CONNECTIONS)

    async def one(path: str, due: float) -> None:
        found.late.append(time.perf_counter() - due)
        async with places:
            connection = free.pop() if free else Connection(port, secret)
            await connection.get(path)
            free.append(connection)
        found.seconds.append(time.perf_counter() - due)

    begin = time.perf_counter() + 0.1
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            due = begin + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(paths[number % len(paths)], due))
    for connection in free:
        connection.close()
    return found


async def in_turn(port: int, secret: str, path: str, *, times: int) -> list[float]:
    """Seconds of so many requests, each sent when the one before it was answered."""
    connection = Connection(port, secret)
    await connection.get(path)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        await connection.get(path)
        found.append(time.perf_counter() - began)
    connection.close()
    return found


# ------------------------------------------------------------------ streams


class Stream:
    """An open event stream; notes when the event of each round has come."""

    def __init__(self, port: int, secret: str, job_id: str) -> None:
        self.job_id = job_id
        self.seen: dict[int, float] = {}
        self._connection = Connection(port, secret)
        self._ready = asyncio.Event()

    async def follow(self) -> None:
        """Read until cancelled.

        Raises:
            RuntimeError: the server refuses, or ends the stream.
        """
        path = f"/v1/jobs/{self.job_id}/events"
        reader = await self._connection.send(path, "text/event-stream")
        check(await reader.readuntil(b"\r\n\r\n"), path)
        rest = b""
        try:
            while data := await reader.read(_READ_BYTES):
                self._ready.set()
                at, rest = time.perf_counter(), rest + data
                for mark in _MARK.finditer(rest):
                    self.seen.setdefault(int(mark[1]), at)
                # A mark may be cut in two by the end of what has been read.
                rest = rest[-40:]
        finally:
            self._connection.close()
        raise RuntimeError(f"the stream of {self.job_id} has ended")

    async def opened(self) -> None:
        """Wait for the first bytes."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._ready.wait()


@asynccontextmanager
async def streams(port: int, secret: str, job_ids: Sequence[str]) -> AsyncIterator[list[Stream]]:
    """Streams that are open while the block lasts, one for each id."""
    opened = [Stream(port, secret, job_id) for job_id in job_ids]
    tasks = [asyncio.create_task(stream.follow()) for stream in opened]
    try:
        for stream, task in zip(opened, tasks, strict=True):
            ready = asyncio.create_task(stream.opened())
            await asyncio.wait([ready, task], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            await ready
        yield opened
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def deliveries(
    followed: Sequence[Stream], append: Callable[[str, int], float], *, rounds: int, every_s: float
) -> list[list[float]]:
    """Append an event in each round; seconds from its commit to its arrival at each follower.

    `append` writes the event of a round to a job and returns when it was committed. Jobs take
    turns, and rounds do not keep step with the server's looks at the database.

    Raises:
        RuntimeError: an event has not come.
    """
    jobs = sorted({stream.job_id for stream in followed})
    found = []
    for number in range(rounds):
        job_id = jobs[number % len(jobs)]
        readers = [stream for stream in followed if stream.job_id == job_id]
        at = await asyncio.to_thread(append, job_id, number)
        deadline = time.perf_counter() + TIMEOUT_S
        while not all(number in stream.seen for stream in readers):
            if time.perf_counter() > deadline:
                raise RuntimeError(f"event {number} of {job_id} has not reached all streams")
            await asyncio.sleep(0.005)
        found.append([stream.seen[number] - at for stream in readers])
        await asyncio.sleep(every_s * ((number * 0.618034) % 1.0))
    return found
