"""Who follows which job: one poller per process serves all open event streams and long polls.

An idle follower holds neither a thread nor a database connection: it waits for a flag of the event
loop. The poller asks for all followed jobs at once, in a thread of its own.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import Depends, Request

from core.errors import KdpoError, TooManyRequests, Unavailable
from models.job import Event
from models.repositories.events import Cursor, Pulse, new_events, pulses
from models.session import Database

_log = logging.getLogger("kdpo.streams")

_EVENTS_AT_ONCE = 1000
_RETRY_S = 2.0
_JOIN_S = 0.02


@dataclass(eq=False)
class Follower:
    """One reader of one job: `seq` is the last event that it has, `version` the last one it saw."""

    job_id: str
    seq: int
    version: int
    pulse: Pulse | None = None
    events: list[Event] = field(default_factory=list)
    closed: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, seconds: float) -> bool:
        """Return whether there is something new within the time, or the end of following."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    def take(self) -> list[Event]:
        """Return the events that have come, oldest first, once."""
        taken, self.events = self.events, []
        return taken

    def tell(self, pulse: Pulse, events: list[Event]) -> None:
        """Hand over what a poll has found behind `seq`."""
        self.pulse = pulse
        self.events += events
        if self.events:
            self.seq = self.events[-1].seq
        if self.events or pulse.version != self.version:
            self._news.set()

    def close(self) -> None:
        """End the following: the server stops, or the job is gone."""
        self.closed = True
        self._news.set()


class Followers:
    """All followers of this process and the task that feeds them; lives in one event loop."""

    def __init__(self, database: Database, *, period_s: float, max_streams: int) -> None:
        self._database = database
        self._period_s = period_s
        self._max_streams = max_streams
        self._followers: set[Follower] = set()
        self._streams: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._joined = asyncio.Event()

    def start(self) -> None:
        """Begin to poll; call it inside the event loop."""
        self._task = asyncio.create_task(self._run(), name="followers")

    def close(self) -> None:
        """End all following, so that open responses end cleanly; no new one begins."""
        self._closed = True
        for follower in self._followers:
            follower.close()

    async def stop(self) -> None:
        """Close, and end the poller."""
        self.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def enter(self, key: str) -> None:
        """Count one more stream of a key; `leave` must follow. From any thread.

        Raises:
            TooManyRequests: it has as many open as it may.
            Unavailable: the server is stopping.
        """
        if self._closed:
            raise Unavailable("the server is stopping; connect again shortly")
        with self._counting:
            if self._streams[key] >= self._max_streams:
                raise TooManyRequests(
                    f"this API key has {self._streams[key]} event streams open, which is the limit",
                    code="too_many_streams",
                    hint="close one, or poll the same path without `stream`",
                )
            self._streams[key] += 1

    def leave(self, key: str) -> None:
        """Count one stream of a key less."""
        with self._counting:
            self._streams[key] -= 1
            if not self._streams[key]:
                del self._streams[key]

    @contextmanager
    def follow(self, job_id: str, *, seq: int, version: int) -> Iterator[Follower]:
        """Follow a job from an event and a version on."""
        follower = Follower(job_id, seq, version)
        if self._closed:
            follower.close()
        self._followers.add(follower)
        self._joined.set()
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    async def _run(self) -> None:
        limiter = anyio.CapacityLimiter(1)
        while True:
            await self._until_due()
            try:
                await self._poll(limiter)
            except KdpoError as error:
                _log.warning("followers of jobs wait: %s", error.message)
                await asyncio.sleep(_RETRY_S)
            except Exception:
                # It must outlive whatever a poll meets; the next one starts from the same cursors.
                _log.exception("a poll for followers of jobs failed and goes on")
                await asyncio.sleep(_RETRY_S)

    async def _until_due(self) -> None:
        """Wait for the next round; whoever joins is served at once."""
        try:
            async with asyncio.timeout(self._period_s if self._followers else None):
                await self._joined.wait()
        except TimeoutError:
            return
        await asyncio.sleep(_JOIN_S)  # others may join at the same moment
        self._joined.clear()

    async def _poll(self, limiter: anyio.CapacityLimiter) -> None:
        # Who joins while the database is read may lack events that nobody else does; a slow reader
        # gets more when it has taken what it has.
        asked = [follower for follower in self._followers if not follower.events]
        cursors = {(follower.job_id, follower.seq) for follower in asked}
        found, events = await anyio.to_thread.run_sync(self._read, cursors, limiter=limiter)
        for follower in asked:
            pulse = found.get(follower.job_id)
            if pulse is None:
                follower.close()
            else:
                follower.tell(pulse, events.get((follower.job_id, follower.seq), []))

    def _read(
        self, cursors: Collection[Cursor]
    ) -> tuple[dict[str, Pulse], dict[Cursor, list[Event]]]:
        with self._database.reading() as session:
            found = pulses(session, {job_id for job_id, _ in cursors})
            behind = [
                (job_id, seq)
                for job_id, seq in cursors
                if job_id in found and found[job_id].event_seq > seq
            ]
            return found, new_events(session, behind, limit=_EVENTS_AT_ONCE)


async def get_followers(request: Request) -> Followers:
    """Return the followers of this process."""
    followers: Followers = request.app.state.followers
    return followers


Follows = Annotated[Followers, Depends(get_followers)]
