"""Follows a job to its end: by server-sent events, and by polling where no stream comes through."""

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kdpo.errors import ApiError, ConnectionFailed, JobCancelled, JobFailed, JobPaused, TimedOut
from kdpo.flows import Close, Effect, Emit, Flow, Request, Sleep, Stream, read_stream
from kdpo.sending import Policy, opened, parsed, sent
from kdpo.sse import EventParser, ServerEvent
from kdpo.types import Event, Job, Progress, Update

# A server says something at least every 15 s; silence for longer is a proxy that keeps the stream.
SILENCE_S = 25.0
POLL_FIRST_S = 0.5
POLL_MAX_S = 5.0
# Streams that break without having said anything new; then the job is polled.
MAX_EMPTY_STREAMS = 3
_STREAM = "text/event-stream"
_MOVES = frozenset({"job.status", "job.phase", "job.step", "done"})
_NO_STREAM = frozenset({404, 405, 406, 415, 422, 429, 501})

Watch = Generator[Effect | Emit[Update], Any, Job]


@dataclass
class _State:
    """What is known of the job, and where a new stream goes on."""

    job: Job
    policy: Policy
    clock: "Clock"
    last_event_id: str | None = None
    etag: str | None = None
    empty_streams: int = 0
    news: int = field(default=0)


@dataclass(frozen=True)
class Clock:
    """When watching has to end; `now` is injected, so that tests need no waiting."""

    now: Any
    deadline: float | None

    def left_s(self) -> float | None:
        """Return the seconds that are left; None without a deadline."""
        return None if self.deadline is None else self.deadline - self.now()

    def check(self, job: Job) -> None:
        """Make sure that time is left.

        Raises:
            TimedOut: it is not.
        """
        left = self.left_s()
        if left is not None and left <= 0:
            raise TimedOut(
                f"job {job.id} is still {job.status}",
                hint="it goes on without you; wait for it again, or cancel it",
            )


def watching(
    job_id: str, policy: Policy, clock: Clock, *, after: int | None = None, stream: bool = True
) -> Watch:
    """Emit what happens to a job until it has ended or is paused, and return it as it is then.

    Raises:
        ApiError: the server refused.
        ConnectionFailed: the server cannot be reached any more.
        TimedOut: the time is up.
    """
    state = _State(
        (yield from get_job(job_id, policy)),
        policy,
        clock,
        last_event_id=None if after is None else str(after),
    )
    yield Emit(Update(job=state.job))
    streams = stream
    while not _is_over(state.job):
        clock.check(state.job)
        if streams:
            streams = yield from _stream(state)
        else:
            yield from _poll(state)
    return state.job


def verdict(job: Job) -> Job:
    """Return a job that has succeeded.

    Raises:
        JobFailed, JobCancelled, JobPaused: it has not.
    """
    match job.status:
        case "failed":
            raise JobFailed(job)
        case "cancelled":
            raise JobCancelled(job)
        case "paused":
            raise JobPaused(job)
        case _:
            return job


def get_job(job_id: str, policy: Policy) -> Flow[Job]:
    """Return a job of any kind."""
    reply = yield from sent(Request("GET", f"/v1/jobs/{job_id}"), policy)
    return parsed(Job, reply.content)


def _is_over(job: Job) -> bool:
    return job.ended or job.status == "paused"


# ------------------------------------------------------------------ streams


def _stream(state: _State) -> Generator[Effect | Emit[Update], Any, bool]:
    """Follow one stream until it ends or breaks; return whether another one makes sense."""
    headers = {"Accept": _STREAM, "Cache-Control": "no-cache"}
    if state.last_event_id is not None:
        headers["Last-Event-ID"] = state.last_event_id
    request = Request(
        "GET", f"/v1/jobs/{state.job.id}/events", headers=headers, read_timeout_s=SILENCE_S
    )
    before = state.news
    parser = EventParser(last_id=state.last_event_id)
    try:
        stream = yield from opened(request)
        if not stream.headers.get("content-type", "").startswith(_STREAM):
            yield Close(stream)
            return False
        done = yield from _events(stream, parser, state)
        yield Close(stream)
        if done:
            return True
    except ApiError as refused:
        if refused.status not in _NO_STREAM and refused.status < 500:
            raise
        return False
    except (ConnectionFailed, ValueError):
        # It broke; what it has said is kept, and the next one goes on behind it.
        pass
    state.empty_streams = 0 if state.news > before else state.empty_streams + 1
    if state.empty_streams >= MAX_EMPTY_STREAMS:
        return False
    yield Sleep(
        state.policy.pause_s(
            state.empty_streams + 1,
            None if parser.retry_ms is None else min(parser.retry_ms / 1000, POLL_MAX_S),
        )
        if state.empty_streams
        else POLL_FIRST_S
    )
    return True


def _events(
    stream: Stream, parser: EventParser, state: _State
) -> Generator[Effect | Emit[Update], Any, bool]:
    """Emit what a stream says; return whether it has said that the job is over."""
    while chunk := (yield from read_stream(stream)):
        for said in parser.feed(chunk):
            state.last_event_id = said.id or state.last_event_id
            state.news += 1
            event = _event(said)
            if said.type == "snapshot":
                state.job = _snapshot(said, state.job)
            elif said.type == "job.progress":
                state.job = _progressed(state.job, said)
            elif said.type in _MOVES:
                # The job's row is the truth: it says where the event has led.
                state.job = yield from get_job(state.job.id, state.policy)
            yield Emit(Update(job=state.job, event=event))
            if _is_over(state.job):
                return True
        state.clock.check(state.job)
    return False


def _event(said: ServerEvent) -> Event | None:
    """Return a stored event; None for what is not stored (snapshots, progress)."""
    try:
        return Event.model_validate_json(said.data)
    except ValidationError:
        return None


def _snapshot(said: ServerEvent, known: Job) -> Job:
    try:
        return Job.model_validate_json(said.data)
    except ValidationError:
        return known


def _progressed(job: Job, said: ServerEvent) -> Job:
    """Return the job with the progress that an event tells; as it is when it tells none."""
    try:
        data = json.loads(said.data)
        told = data.get("data", data)
        progress = Progress.model_validate(told.get("progress", told))
    except (ValueError, AttributeError):
        return job
    changes: dict[str, Any] = {"progress": progress}
    if isinstance(told.get("phase"), str):
        changes["phase"] = told["phase"]
    return job.model_copy(update=changes)


# ------------------------------------------------------------------ polls


def _poll(state: _State) -> Watch:
    """Ask for the job until it is over; an unchanged one costs a 304."""
    pause = POLL_FIRST_S
    while not _is_over(state.job):
        state.clock.check(state.job)
        left = state.clock.left_s()
        yield Sleep(pause if left is None else max(0.0, min(pause, left)))
        headers = {} if state.etag is None else {"If-None-Match": state.etag}
        request = Request("GET", f"/v1/jobs/{state.job.id}", headers=headers)
        reply = yield from sent(request, state.policy)
        state.etag = reply.headers.get("etag", state.etag)
        if reply.status == 304:
            pause = min(pause * 1.5, POLL_MAX_S)
            continue
        job = parsed(Job, reply.content)
        pause = min(pause * 1.2, POLL_MAX_S) if job == state.job else POLL_FIRST_S
        if job != state.job:
            state.job = job
            yield Emit(Update(job=job))
    return state.job
