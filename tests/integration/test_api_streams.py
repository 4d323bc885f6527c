"""Event streams, long polls and versions of jobs, against a running server."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.lifecycle import EventType, JobKind, JobStatus, Phase
from models.repositories.events import append_event
from models.repositories.jobs import Fence, JobRepository
from models.repositories.steps import StepRepository
from tests.integration.live_world import Live, Message, live_api, messages, until
from tests.integration.test_api import check_problem

pytestmark = pytest.mark.timeout(90)
PATHS = ["/v1/jobs", "/v1/fine_tuning/jobs"]


@pytest.fixture
def live(sqlite_url: str, tmp_path: Path) -> Iterator[Live]:
    api = {"stream_poll_s": 0.05, "stream_ping_s": 0.5, "max_streams": 3}
    with live_api(sqlite_url, tmp_path, api=api) as made:
        yield made


@contextmanager
def streaming(live: Live, url: str, **headers: str) -> Iterator[Iterator[Message]]:
    wanted = {"Accept": "text/event-stream", **live.headers(), **headers}
    with httpx.stream("GET", live.url + url, headers=wanted, timeout=20) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield messages(answer.iter_lines())


def progress(done: int) -> dict[str, Any]:
    return {"fraction": done / 10, "unit": "step", "done": done, "total": 10, "basis": "prior"}


def say(live: Live, fence: Fence, phase: Phase) -> None:
    with live.database.transaction() as session:
        JobRepository(session).set_phase(fence, phase)


def show(live: Live, fence: Fence, done: int) -> None:
    with live.database.transaction() as session:
        JobRepository(session).set_progress(fence, progress(done))


def named(found: Iterator[Message], *ignored: str) -> Message:
    """Return the next event that is none of the ignored."""
    return next(one for one in found if one.event not in (":", *ignored))


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_follows_a_job_to_its_end(database_url: str, tmp_path: Path, path: str) -> None:
    with live_api(database_url, tmp_path, api={"stream_poll_s": 0.05}) as live:
        job = live.training_job(live.dataset())["id"]
        with streaming(live, f"{path}/{job}/events") as found:
            snapshot = named(found)
            assert (snapshot.event, snapshot.id) == ("snapshot", "1")
            assert snapshot.data == live.get(f"{path}/{job}").json()
            fence = live.claim(JobKind.TRAINING)
            started = named(found)
            assert (started.event, started.id) == ("job.status", "2")
            assert started.data["data"] == {"status": "running"}
            show(live, fence, 3)
            moved = named(found)
            assert (moved.event, moved.id) == ("job.progress", None)
            assert moved.data["progress"]["done"] == 3
            say(live, fence, Phase.TRAINING)
            live.finish(fence, JobStatus.FAILED, error={"code": "internal", "message": "x"})
            rest = [one for one in found if one.event != ":"]
        assert [(one.event, one.id) for one in rest] == [
            ("job.phase", "3"), ("job.status", "4"), ("done", "5")
        ]  # fmt: skip
        events = live.get(f"{path}/{job}/events?order=asc").json()["data"]
        assert [started.data, *(one.data for one in rest)] == events[1:]


def test_a_stream_goes_on_where_it_broke(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    fence = live.claim(JobKind.TRAINING)
    for phase in (Phase.TRAINING, Phase.EVALUATING, Phase.SAVING):
        say(live, fence, phase)
    url = f"/v1/jobs/{job}/events"
    with streaming(live, url, **{"Last-Event-ID": "3"}) as found:
        assert [(m.event, m.id) for m in (named(found), named(found), named(found))] == [
            ("snapshot", "3"), ("job.phase", "4"), ("job.phase", "5")
        ]  # fmt: skip
    with streaming(live, f"{url}?after=4") as found:
        assert (named(found).id, named(found).id) == ("4", "5")
    third = live.get(f"{url}?order=asc").json()["data"][2]["id"]
    with streaming(live, f"{url}?stream=true&after={third}") as found:
        assert (named(found).id, named(found).id) == ("3", "4")
    live.finish(fence, JobStatus.SUCCEEDED)
    with streaming(live, url) as found:
        assert [(m.event, m.id) for m in found] == [("snapshot", "7"), ("done", "7")]
    with streaming(live, url, **{"Last-Event-ID": "5"}) as found:
        assert [m.id for m in found] == ["5", "6", "7"]
    over = live.get(url, headers={"Accept": "text/event-stream", "Last-Event-ID": "7"})
    assert (over.status_code, over.content) == (204, b"")


def test_streams_of_one_job_at_different_places(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    fence = live.claim(JobKind.TRAINING)
    url = f"/v1/jobs/{job}/events"
    with streaming(live, f"{url}?after=0") as first, streaming(live, url) as second:
        assert [named(first).id for _ in range(3)] == ["0", "1", "2"]
        assert named(second).id == "2"
        say(live, fence, Phase.TRAINING)
        assert (named(first).id, named(second).id) == ("3", "3")


def test_a_long_past_comes_whole(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    with live.database.transaction() as session:
        for number in range(2500):
            append_event(session, job, EventType.JOB_WARNING, str(number))
    live.client.post(f"/v1/jobs/{job}/cancel", headers=live.headers())
    with streaming(live, f"/v1/jobs/{job}/events?after=0") as found:
        seen = [int(one.id or 0) for one in found if one.event != ":"]
    assert seen == [0, *range(1, 2504)]


def test_progress_is_sent_at_most_once_a_second_and_the_last_one_always(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    fence = live.claim(JobKind.TRAINING)
    with streaming(live, f"/v1/jobs/{job}/events") as found:
        named(found)
        for done in range(1, 9):
            show(live, fence, done)
            time.sleep(0.08)
        first, at = named(found), time.monotonic()
        last = named(found)
        assert first.data["progress"]["done"] < 8
        assert last.data["progress"]["done"] == 8
        assert time.monotonic() - at < 2
    assert live.get(f"/v1/jobs/{job}/events?limit=1").json()["data"][0]["seq"] == 2


def test_silence_is_broken_by_pings(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    with streaming(live, f"/v1/jobs/{job}/events") as found:
        assert next(found).event == "snapshot"
        assert [next(found).data for _ in range(2)] == [": ping", ": ping"]


def test_what_decides_between_page_and_stream(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    url = f"/v1/jobs/{job}/events"
    stream = {"Accept": "application/json;q=0.5, text/event-stream"}
    assert live.get(f"{url}?stream=false", headers=stream).json()["object"] == "list"
    none = {"Accept": "text/event-stream;q=0, */*"}
    assert live.get(url, headers=none).json()["object"] == "list"
    for query in ("limit=3", "order=asc"):
        check_problem(live.get(f"{url}?stream=true&{query}"), 422, "invalid_input")
    check_problem(live.get(f"{url}?after=x", headers=stream), 422, "invalid_input")
    check_problem(live.get("/v1/jobs/job_none/events", headers=stream), 404, "not_found")
    other = live.get(url, headers={**live.headers("bob"), **stream})
    check_problem(other, 404, "not_found")


def test_streams_of_a_key_are_capped_and_a_client_that_left_makes_room(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    url = f"/v1/jobs/{job}/events"
    with ExitStack() as open_streams:
        # Kept: a reader that is forgotten closes its stream.
        readers = [open_streams.enter_context(streaming(live, url)) for _ in range(3)]
        assert [named(reader).event for reader in readers] == ["snapshot"] * 3
        full = live.get(f"{url}?stream=true")
        check_problem(full, 429, "too_many_streams")
        assert full.headers["retry-after"] == "5"
        bobs = live.training_job(live.dataset("bob"), "bob")["id"]
        with streaming(live, f"/v1/jobs/{bobs}/events", **live.headers("bob")) as found:
            assert named(found).event == "snapshot"
    until(lambda: not live.app.state.followers._streams)
    with streaming(live, url) as found:
        assert named(found).event == "snapshot"


def test_streams_that_are_opened_at_once_do_not_pass_the_cap(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    url = f"{live.url}/v1/jobs/{job}/events?stream=true"
    headers = live.headers()
    leave = threading.Event()

    def look(_: int) -> int:
        with httpx.stream("GET", url, headers=headers, timeout=20) as answer:
            statuses.append(answer.status_code)
            leave.wait(20)
        return answer.status_code

    statuses: list[int] = []
    with ThreadPoolExecutor(12) as pool:
        looks = [pool.submit(look, number) for number in range(12)]
        until(lambda: len(statuses) == 12)
        leave.set()
        assert sorted(one.result() for one in looks) == [200] * 3 + [429] * 9
    until(lambda: not live.app.state.followers._streams)


def test_idle_streams_hold_no_connection_and_no_thread(database_url: str, tmp_path: Path) -> None:
    api = {"stream_poll_s": 0.2, "max_streams": 100}
    with live_api(database_url, tmp_path, api=api) as live:
        jobs = [live.training_job(live.dataset())["id"] for _ in range(3)]
        threads = threading.active_count()
        limits = httpx.Limits(max_connections=None)
        with (
            httpx.Client(base_url=live.url, headers=live.headers(), limits=limits) as client,
            ExitStack() as open_streams,
        ):
            found = []
            for number in range(90):
                url = f"/v1/jobs/{jobs[number % 3]}/events?stream=true"
                answer = open_streams.enter_context(client.stream("GET", url))
                found.append(messages(answer.iter_lines()))
                assert next(found[-1]).event == "snapshot"
            # The pool has two connections and threads are at most forty.
            assert threading.active_count() <= threads + 40
            pool = live.app.state.database.engine.pool
            until(lambda: pool.checkedout() == 0, 5)
            for job in jobs:
                assert live.post(f"/v1/jobs/{job}/cancel").status_code == 202
            with ThreadPoolExecutor(16) as readers:
                ends = list(readers.map(lambda one: [m.event for m in one], found))
        assert ends == [["job.status", "done"]] * 90


def test_a_server_that_stops_ends_its_streams(live: Live) -> None:
    job = live.training_job(live.dataset())["id"]
    with streaming(live, f"/v1/jobs/{job}/events") as found:
        named(found)
        began = time.monotonic()
        live.stop()
        assert [one for one in found if one.event != ":"] == []
    assert time.monotonic() - began < 5


# ------------------------------------------------------- long polls, versions


@pytest.mark.parametrize("path", PATHS)
def test_a_long_poll_answers_when_the_job_changes(live: Live, path: str) -> None:
    job = live.training_job(live.dataset())
    url = f"{path}/{job['id']}"
    with ThreadPoolExecutor(1) as other:
        began = time.monotonic()
        pending = other.submit(live.get, f"{url}?wait=15&if_version={job['version']}")
        time.sleep(0.4)
        assert not pending.done()
        live.claim(JobKind.TRAINING)
        changed = pending.result().json()
    assert changed["status"] == "running"
    assert changed["version"] > job["version"]
    assert time.monotonic() - began < 10


def test_a_long_poll_answers_at_once_when_there_is_nothing_to_wait_for(live: Live) -> None:
    job = live.training_job(live.dataset())
    url = f"/v1/jobs/{job['id']}"
    began = time.monotonic()
    assert live.get(f"{url}?wait=15&if_version={job['version'] + 7}").status_code == 200
    live.post(f"{url}/cancel")
    version = live.get(url).json()["version"]
    assert live.get(f"{url}?wait=15&if_version={version}").json()["status"] == "cancelled"
    assert live.get(f"{url}?wait=15").json()["status"] == "cancelled"
    assert time.monotonic() - began < 5


def test_a_long_poll_ends_with_what_the_client_knows(live: Live) -> None:
    url = f"/v1/jobs/{live.training_job(live.dataset())['id']}"
    etag = live.get(url).headers["etag"]
    began = time.monotonic()
    same = live.get(f"{url}?wait=0.5", headers={"If-None-Match": etag})
    assert (same.status_code, same.headers["etag"]) == (304, etag)
    assert time.monotonic() - began >= 0.5
    check_problem(live.get(f"{url}?if_version=3"), 422, "invalid_input")
    check_problem(live.get(f"{url}?wait=-1"), 422, "invalid_input")


def test_the_etag_is_the_version_and_what_changes_without_it(live: Live) -> None:
    dataset = live.dataset()
    first, second = (live.training_job(dataset)["id"] for _ in range(2))
    url = f"/v1/fine_tuning/jobs/{second}"
    queued = live.get(url)
    assert queued.headers["etag"] == f'W/"{queued.json()["version"]}.1"'
    live.post(f"/v1/jobs/{first}/cancel")
    assert live.get(url).headers["etag"] == f'W/"{queued.json()["version"]}.0"'
    fence = live.claim(JobKind.TRAINING)
    with live.database.transaction() as session:
        StepRepository(session).plan(fence, ["compare"])
    seen = [live.get(url).headers["etag"]]

    def changed() -> dict[str, Any]:
        view = live.get(url, headers={"If-None-Match": ", ".join(seen)})
        assert view.status_code == 200
        assert live.get(url).content == view.content
        seen.append(view.headers["etag"])
        return dict(view.json())

    say(live, fence, Phase.TRAINING)
    assert changed()["phase"] == "training"
    with live.database.transaction() as session:
        StepRepository(session).start(fence, "compare")
    assert changed()["steps"][0]["status"] == "running"
    show(live, fence, 5)
    assert changed()["progress"]["done"] == 5
    live.finish(fence)
    view = live.get(url)
    assert view.headers["etag"] == f'W/"{view.json()["version"]}"'
