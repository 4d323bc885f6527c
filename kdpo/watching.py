"""Follows a job to its end: by server-sent events, and by polling where no stream comes through."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kdpo.errors import (
    ApiError,
    ConnectionFailed,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobPaused,
    TimedOut,
)
from kdpo.flows import Close, Effect, Emit, Flow, QueryValue, Request, Sleep, Stream, read_stream
from kdpo.sending import Policy, opened, parsed, sent
from kdpo.sse import EventParser, ServerEvent
from kdpo.types import Event, Job, ProgressEvent, Update

# A server says something at least every 15 s; silence for longer is a proxy that keeps the stream.
SILENCE_S = 25.0
POLL_FIRST_S = 0.5
POLL_MAX_S = 5.0
LONG_POLL_S = 20.0
ANSWER_S = 30.0
# Streams that break without having said anything new; then the job is polled.
MAX_EMPTY_STREAMS = 3
_STREAM = "text/event-stream"
NO_CONTENT = 204
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
    news: int = 0
    waits: bool = True


@dataclass(frozen=True)
class Clock:
    """When watching has to end; `now` is injected, so that tests need no waiting."""

    now: Callable[[], float]
    deadline: float | None

    def left_s(self) -> float | None:
        """Return the seconds that are left; None without a deadline."""
        return None if self.deadline is None else self.deadline - self.now()

    def cut(self, seconds: float) -> float:
        """Return the seconds, or those that are left when they are fewer."""
        left = self.left_s()
        return seconds if left is None else max(0.0, min(seconds, left))

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
    # A job that is over may have events that are asked for; only a stream tells them.
    asked = stream and after is not None
    while asked or not _is_over(state.job):
        asked = False
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
        case "paused" | "draft":
            raise JobPaused(job)
        case _:
            return job


def get_job(job_id: str, policy: Policy) -> Flow[Job]:
    """Return a job of any kind."""
    reply = yield from sent(Request("GET", f"/v1/jobs/{job_id}"), policy)
    return parsed(Job, reply.content)


def _is_over(job: Job) -> bool:
    return job.ended or job.rests


# ------------------------------------------------------------------ streams


def _stream(state: _State) -> Generator[Effect | Emit[Update], Any, bool]:
    """Follow one stream until it ends or breaks; return whether another one makes sense."""
    headers = {"Accept": _STREAM, "Cache-Control": "no-cache"}
    if state.last_event_id is not None:
        headers["Last-Event-ID"] = state.last_event_id
    path = f"/v1/jobs/{state.job.id}/events"
    silence_s = max(0.1, state.clock.cut(SILENCE_S))
    request = Request("GET", path, headers=headers, read_timeout_s=silence_s)
    before = state.news
    parser = EventParser(last_id=state.last_event_id)
    try:
        stream = yield from opened(request)
        if stream.status == NO_CONTENT:  # it has ended, and all events have come
            state.job = yield from get_job(state.job.id, state.policy)
            yield Emit(Update(job=state.job))
            return state.job.ended
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
    asked = None if parser.retry_ms is None else min(parser.retry_ms / 1000, POLL_MAX_S)
    yield Sleep(state.clock.cut(state.policy.pause_s(state.empty_streams + 1, asked)))
    return True


def _events(
    stream: Stream, parser: EventParser, state: _State
) -> Generator[Effect | Emit[Update], Any, bool]:
    """Emit what a stream says; return whether it has said that the job is over."""
    while chunk := (yield from read_stream(stream)):
        for said in parser.feed(chunk):
            state.last_event_id = said.id or state.last_event_id
            state.news += said.type != "snapshot"
            event, before = _event(said), state.job
            if said.type == "snapshot":
                state.job = _snapshot(said, state.job)
            elif said.type == "job.progress":
                state.job = _progressed(state.job, said)
            elif said.type in _MOVES:
                # The job's row is the truth: it says where the event has led.
                state.job = yield from get_job(state.job.id, state.policy)
            if event is not None or state.job != before:
                yield Emit(Update(job=state.job, event=event))
            if said.type == "done" or state.job.rests:
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
    """Return the job with what a progress event tells of it; as it is when it tells nothing."""
    try:
        told = ProgressEvent.model_validate_json(said.data)
    except ValidationError:
        return job
    return job.model_copy(
        update={
            "progress": told.progress,
            "phase": told.phase or job.phase,
            "version": told.version or job.version,
        }
    )


# ------------------------------------------------------------------ polls


def _poll(state: _State) -> Watch:
    """Ask for the job until it is over; the server keeps the question until something changes."""
    pause = POLL_FIRST_S
    while not _is_over(state.job):
        state.clock.check(state.job)
        yield Sleep(state.clock.cut(pause))
        changed = yield from _ask(state)
        # A server that answers at once that nothing is new does not keep questions.
        pause = POLL_FIRST_S if changed or state.waits else min(pause * 1.5, POLL_MAX_S)
        if changed:
            yield Emit(Update(job=state.job))
    return state.job


def _ask(state: _State) -> Flow[bool]:
    """Ask once; return whether the job has changed."""
    query: dict[str, QueryValue] = {}
    held_s = 0.0
    if state.waits and state.job.version is not None:
        held_s = state.clock.cut(LONG_POLL_S)
        query = {"wait": round(held_s, 1), "if_version": state.job.version}
    headers = {} if state.etag is None else {"If-None-Match": state.etag}
    request = Request(
        "GET", f"/v1/jobs/{state.job.id}", query=query, headers=headers,
        read_timeout_s=held_s + ANSWER_S,
    )  # fmt: skip
    try:
        reply = yield from sent(request, state.policy)
    except InvalidRequest:
        if not state.waits:
            raise
        state.waits = False
        return False
    state.etag = reply.headers.get("etag", state.etag)
    if reply.status == 304:
        return False
    before, state.job = state.job, parsed(Job, reply.content)
    return state.job != before
