"""Following a job: streams that break, streams that never come, polls, and how it ends."""

import json
from typing import Any

import pytest

from kdpo.errors import JobCancelled, JobFailed, JobPaused, TimedOut, Unauthenticated
from kdpo.flows import Request
from kdpo.sending import Policy
from kdpo.types import Job
from kdpo.watching import MAX_EMPTY_STREAMS, Clock, verdict, watching
from tests.unit.kdpo.script import Body, Played, broke, play, problem, reply

POLICY = Policy(max_retries=0, chance=lambda: 1.0)
NEVER = Clock(lambda: 0.0, None)


def job(status: str = "running", **more: Any) -> dict[str, Any]:
    return {"id": "ftjob-1", "kind": "training", "status": status, "version": 3, **more}


def event(seq: int, kind: str, **data: Any) -> bytes:
    body = {"id": f"evt_{seq}", "seq": seq, "type": kind, "message": "so", "data": data}
    return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(body)}\n\n".encode()


def snapshot(seq: int = 1, **more: Any) -> bytes:
    return f"retry: 100\n\nid: {seq}\nevent: snapshot\ndata: {json.dumps(job(**more))}\n\n".encode()


def stream(*pieces: Any, kind: str = "text/event-stream; charset=utf-8", status: int = 200) -> Body:
    return Body(list(pieces), status, {"content-type": kind})


def watch(*answers: Any, clock: Clock = NEVER, **options: Any) -> Played:
    return play(watching("ftjob-1", POLICY, clock, **options), *answers)


def paths(played: Played) -> list[str]:
    return [request.path.rpartition("/")[2] for request in played.requests]


def test_a_stream_from_first_to_last_event() -> None:
    progress = {"job_id": "ftjob-1", "phase": "training", "progress": {"fraction": 0.5}}
    told = f"event: job.progress\ndata: {json.dumps(progress)}\n\n".encode()
    played = watch(
        reply(job("queued")),
        stream(snapshot(status="queued"), event(2, "job.status"), told, event(3, "job.metrics"),
               event(4, "job.status"), event(5, "done")),
        reply(job("running")),
        reply(job("succeeded")),
        reply(job("succeeded", result={"run": {"checkpoint_id": "ckpt_1"}})),
    )  # fmt: skip
    assert [u.job.status for u in played.emitted] == [
        "queued", "running", "running", "running", "succeeded", "succeeded",
    ]  # fmt: skip
    assert [u.event and u.event.seq for u in played.emitted] == [None, 2, None, 3, 4, 5]
    assert played.emitted[2].job.progress.fraction == 0.5
    assert (played.result.checkpoint_id, played.pauses) == ("ckpt_1", [])


def test_a_broken_stream_goes_on_behind_its_last_event() -> None:
    played = watch(
        reply(job()),
        stream(snapshot(), event(2, "job.metrics"), event(3, "job.metrics")[:9], broke()),
        stream(snapshot(3), event(3, "job.metrics"), event(4, "done")),
        reply(job("succeeded")),
    )
    assert played.requests[1].headers.get("Last-Event-ID") is None
    assert played.requests[2].headers["Last-Event-ID"] == "2"
    assert [u.event.seq for u in played.emitted if u.event] == [2, 3, 4]


def test_a_server_that_stops_ends_its_stream_and_is_asked_again() -> None:
    played = watch(
        reply(job()), stream(snapshot()), stream(event(2, "done")), reply(job("succeeded"))
    )
    assert played.pauses == [0.5 * 2]
    assert played.result.status == "succeeded"


@pytest.mark.parametrize(
    "answer",
    [
        stream(b'{"object": "list", "data": []}', kind="application/json"),
        problem(404), problem(406), problem(429), problem(422), problem(503),
    ],
)  # fmt: skip
def test_where_there_is_no_stream_the_job_is_polled(answer: Any) -> None:
    played = watch(reply(job()), answer, reply(job("succeeded")))
    assert paths(played) == ["ftjob-1", "events", "ftjob-1"]
    assert played.result.status == "succeeded"


def test_streams_that_say_nothing_are_given_up() -> None:
    silent = [stream(broke()) for _ in range(MAX_EMPTY_STREAMS)]
    played = watch(reply(job()), *silent, reply(job("succeeded")))
    assert paths(played) == ["ftjob-1", *["events"] * MAX_EMPTY_STREAMS, "ftjob-1"]


def test_faults_of_the_caller_are_not_polled_around() -> None:
    with pytest.raises(Unauthenticated):
        watch(reply(job()), problem(401))


def test_all_events_had_come_already() -> None:
    played = watch(reply(job()), stream(status=204), reply(job("succeeded")))
    assert played.result.status == "succeeded"


def test_events_of_a_job_that_is_over_can_be_asked_for() -> None:
    played = watch(
        reply(job("failed")), stream(snapshot(status="failed"), event(7, "done")),
        reply(job("failed")), after=6,
    )  # fmt: skip
    assert played.requests[1].headers["Last-Event-ID"] == "6"
    assert [u.event.seq for u in played.emitted if u.event] == [7]
    assert paths(watch(reply(job("failed")))) == ["ftjob-1"]


def test_polls_are_kept_by_the_server_and_cost_nothing_when_nothing_changes() -> None:
    def check(request: Request) -> Any:
        assert request.query == {"wait": 20.0, "if_version": 3}
        return reply(job(), etag='W/"3"')

    def unchanged(request: Request) -> Any:
        assert request.headers["If-None-Match"] == 'W/"3"'
        return reply(b"", 304, etag='W/"3"')

    played = watch(reply(job()), check, unchanged, reply(job("succeeded", version=4)), stream=False)
    assert [u.job.status for u in played.emitted] == ["running", "succeeded"]
    assert played.pauses == [0.5, 0.5, 0.5]


def test_an_older_server_is_polled_with_growing_pauses() -> None:
    same = reply(b"", 304)
    played = watch(
        reply(job()), problem(422, "unknown_parameter"), same, same, reply(job("succeeded")),
        stream=False,
    )  # fmt: skip
    assert [dict(request.query) for request in played.requests[2:]] == [{}, {}, {}]
    assert played.pauses == [0.5, 0.75, 1.125, 1.6875]


def test_a_paused_job_ends_the_watch() -> None:
    played = watch(reply(job()), stream(snapshot(), event(2, "job.status")), reply(job("paused")))
    assert played.result.status == "paused"


def test_time_is_up() -> None:
    seconds = [0.0]

    def answer(_request: Request) -> Any:
        seconds[0] = 11.0
        return reply(job())

    clock = Clock(lambda: seconds[0], 10.0)
    with pytest.raises(TimedOut, match="still running"):
        watch(reply(job()), answer, clock=clock, stream=False)


def test_no_question_is_kept_beyond_the_time() -> None:
    clock = Clock(lambda: 4.0, 10.0)
    played = watch(reply(job()), reply(job("failed")), clock=clock, stream=False)
    assert played.requests[1].query["wait"] == 6.0
    silent = watch(reply(job()), stream(event(2, "done")), reply(job("failed")), clock=clock)
    assert silent.requests[1].read_timeout_s == 6.0


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("failed", JobFailed),
        ("cancelled", JobCancelled),
        ("paused", JobPaused),
        ("draft", JobPaused),
    ],
)
def test_verdict_on_a_job_without_success(status: str, error: type[Exception]) -> None:
    found = Job.model_validate(
        job(status, error={"code": "loss_nan", "message": "the loss is nan", "hint": "lower lr"})
    )
    with pytest.raises(error, match=r"ftjob-1 .*: the loss is nan \(loss_nan\)") as caught:
        verdict(found)
    assert caught.value.job is found  # type: ignore[attr-defined]
    assert caught.value.hint == "lower lr"  # type: ignore[attr-defined]


def test_verdict_on_success() -> None:
    found = Job.model_validate(job("succeeded"))
    assert verdict(found) is found
