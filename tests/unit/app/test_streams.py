"""Followers of jobs: nobody waits for somebody else who is slow or far behind."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import insert, select, update

from app.streams import Follower, Followers
from core.lifecycle import EventType, JobKind
from models.job import Event, Job
from models.repositories.events import append_event
from models.repositories.jobs import JobRepository
from models.repositories.owners import OwnerRepository
from models.session import Database

PERIOD_S = 0.02


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    made = Database(sqlite_url, pool_size=2)
    yield made
    made.dispose()


def make_job(database: Database, *, events: int) -> str:
    """Return a job with so many events."""
    with database.transaction() as session:
        owner = OwnerRepository(session).ensure("ada")
        job = JobRepository(session).create(owner_id=owner.id, kind=JobKind.TRAINING, spec={})
        first = session.execute(select(Event).where(Event.job_id == job.id)).scalar_one()
        same = {"owner_id": owner.id, "job_id": job.id, "attempt": 0, "level": first.level,
                "type": EventType.JOB_WARNING, "message": "something", "data": {}}  # fmt: skip
        rows = [{**same, "id": f"evt_{job.id}_{seq}", "seq": seq} for seq in range(2, events + 1)]
        if rows:
            session.execute(insert(Event), rows)
        session.execute(update(Job).where(Job.id == job.id).values(event_seq=events))
        return job.id


def say(database: Database, job: str) -> None:
    with database.transaction() as session:
        append_event(session, job, EventType.JOB_WARNING, "news")


async def heard(follower: Follower, count: int, *, within_s: float = 20.0) -> list[Event]:
    """Return the next events of a follower who takes all that comes."""
    found: list[Event] = []
    async with asyncio.timeout(within_s):
        while len(found) < count:
            await follower.wait(within_s)
            found += follower.take()
    return found


def run(database: Database, test: Coroutine[None, None, None], followers: Followers) -> None:
    async def whole() -> None:
        followers.start()
        try:
            await test
        finally:
            await followers.stop()

    asyncio.run(whole())


@pytest.fixture
def followers(database: Database) -> Followers:
    return Followers(database, period_s=PERIOD_S, max_streams=10)


def test_a_reader_that_has_stopped_holds_nobody_back(
    database: Database, followers: Followers
) -> None:
    long, short = make_job(database, events=3500), make_job(database, events=1)

    async def test() -> None:
        with ExitStack() as stack:
            stuck = stack.enter_context(followers.follow(long, seq=0, version=1))
            reader = stack.enter_context(followers.follow(long, seq=3500, version=1))
            other = stack.enter_context(followers.follow(short, seq=1, version=1))
            async with asyncio.timeout(5):
                while not stuck.events:
                    await asyncio.sleep(PERIOD_S)
            say(database, long)
            say(database, short)
            assert [event.seq for event in await heard(reader, 1)] == [3501]
            assert [event.seq for event in await heard(other, 1)] == [2]
            # And what it has missed comes whole when it reads again.
            seqs = [event.seq for event in await heard(stuck, 3501)]
            assert seqs == list(range(1, 3502))

    run(database, test(), followers)


def test_readers_of_a_long_past_and_of_news_go_side_by_side(
    database: Database, followers: Followers
) -> None:
    job = make_job(database, events=4000)

    async def test() -> None:
        with ExitStack() as stack:
            places = (0, 10, 1500, 3999, 4000)
            readers = [
                stack.enter_context(followers.follow(job, seq=seq, version=1)) for seq in places
            ]
            say(database, job)
            found = await asyncio.gather(
                *(heard(reader, 4001 - seq) for reader, seq in zip(readers, places, strict=True))
            )
            for seq, events in zip(places, found, strict=True):
                assert [event.seq for event in events] == list(range(seq + 1, 4002))

    run(database, test(), followers)
