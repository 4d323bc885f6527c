"""Events of a job: a page of them, or a stream (Server-Sent Events) that follows the job."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.deps import ID_PATTERN, Caller, Config, Db, Lister, Lists
from app.job_views import EventView, Progress, event_view
from app.responses import ListOf, Schema
from app.streams import Followers, Follows
from core.errors import InvalidInput
from core.ids import IdPrefix
from core.lifecycle import EventType, JobKind, JobStatus, Phase
from core.settings import Settings
from models.job import Event, Job
from models.repositories.events import Pulse, events_after, events_before, seq_of
from models.repositories.jobs import JobRepository
from models.session import Database

RETRY_MS = 3000
PROGRESS_EVERY_S = 1.0
STREAM_TYPE = "text/event-stream"
PING = b": ping\n\n"

_EXAMPLE = (
    'retry: 3000\n\nid: 3\nevent: snapshot\ndata: {"id":"ftjob-01jd","status":"running"}\n\n'
    'id: 4\nevent: job.phase\ndata: {"object":"fine_tuning.job.event","seq":4}\n\n'
    'id: 5\nevent: done\ndata: {"object":"fine_tuning.job.event","seq":5}\n\n'
)
# One event; as FastAPI describes streams, in OpenAPI 3.2's way.
_ITEM: dict[str, Any] = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+$", "description": "`seq` of a stored event"},
        "event": {
            "type": "string",
            "enum": ["snapshot", "job.progress", *(one.value for one in EventType)],
        },
        "data": {"type": "string", "contentMediaType": "application/json"},
        "retry": {"type": "integer", "minimum": 0},
    },
}
EVENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events; with `Accept: text/event-stream` or `stream=true` a "
        "stream: `snapshot` (the whole job), its events from the cursor on, `job.progress` at most "
        "once a second, `done`, and then the end",
        "content": {STREAM_TYPE: {"itemSchema": _ITEM, "example": _EXAMPLE}},
    },
    204: {"description": "A stream is over and the client has all of it: do not connect again"},
}

EventLimit = Annotated[int, Query(ge=1, le=100)]
EventCursor = Annotated[str | None, Query(pattern=ID_PATTERN, description="a `seq` or an event id")]
EventOrder = Annotated[Literal["asc", "desc"], Query(description="by `seq`")]


class ProgressEvent(Schema):
    """Where a job is now; sent to streams and not stored."""

    object: Literal["job.progress"] = "job.progress"
    job_id: str
    version: int
    status: JobStatus
    phase: Phase | None
    progress: Progress


@dataclass(frozen=True)
class EventQuery:
    """What a client wants of a job's events."""

    limit: int
    after: str | None
    order: Literal["asc", "desc"]
    streamed: bool
    resumed: bool


async def event_query(
    request: Request,
    limit: EventLimit = 20,
    after: EventCursor = None,
    order: EventOrder = "desc",
    stream: Annotated[
        bool | None, Query(description="follow the job; default: what `Accept` prefers")
    ] = None,
    last_event_id: Annotated[
        str | None,
        Header(pattern=ID_PATTERN, description="`id` of the last event of a stream that broke"),
    ] = None,
) -> EventQuery:
    """Return what is asked for.

    Raises:
        InvalidInput: an option would be ignored.
    """
    streamed = accepts_stream(request.headers.get("accept")) if stream is None else stream
    if streamed:
        for name in ("limit", "order"):
            if name in request.query_params:
                raise InvalidInput(
                    f"{name} is of a page and a stream has none: drop it, or stream=false",
                    param=name,
                )
    resumed = streamed and last_event_id is not None
    return EventQuery(limit, last_event_id if resumed else after, order, streamed, resumed)


def accepts_stream(accept: str | None) -> bool:
    """Whether an `Accept` header names event streams."""
    for part in (accept or "").lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        if kind == STREAM_TYPE and "q=0" not in parameters:
            return True
    return False


@dataclass(frozen=True)
class EventReader:
    """Answers a request for events of any job of the caller."""

    request: Request
    database: Database
    settings: Settings
    lists: Lister
    followers: Followers
    query: EventQuery

    def answer(
        self,
        caller: Caller,
        job_id: str,
        view: Callable[[Session, Job], BaseModel],
        *,
        kind: JobKind | None = None,
    ) -> Response | ListOf[EventView]:
        """Return a page, or a stream whose snapshot is the job as `view` shows it.

        Raises:
            NotFound: no such job, or no such event.
            InvalidInput: the cursor is neither a number nor an event id.
            TooManyRequests: the key has too many streams open.
        """
        with self.database.reading() as session:
            job = JobRepository(session).get(caller.owner_id, job_id, kind=kind)
            after = self.query.after
            seq = None if after is None else _seq(session, job_id, after)
            if not self.query.streamed:
                return self._page(session, job_id, seq)
            start = _Start.read(session, job, view(session, job), seq)
        if start.ending is not None and self.query.resumed:
            # The one answer that keeps a browser from connecting again.
            return Response(status_code=204)
        frames = _frames(self.followers, start, ping_s=self.settings.api.stream_ping_s)
        if start.ending is not None:
            return _EventStream(frames, leave=None)
        self.followers.enter(caller.key_id)
        return _EventStream(frames, leave=partial(self.followers.leave, caller.key_id))

    def _page(self, session: Session, job_id: str, seq: int | None) -> ListOf[EventView]:
        limit = self.query.limit
        match self.query.order:
            case "asc":
                rows: Sequence[Event] = events_after(session, job_id, seq or 0, limit + 1)
            case "desc":
                rows = events_before(session, job_id, seq, limit + 1)
        events = [event_view(event) for event in rows[:limit]]
        return self.lists.page(events, [event.id for event in events], has_more=len(rows) > limit)


async def event_reader(
    request: Request,
    database: Db,
    settings: Config,
    lists: Lists,
    followers: Follows,
    query: Annotated[EventQuery, Depends(event_query)],
) -> EventReader:
    """Return what answers a request for events."""
    return EventReader(request, database, settings, lists, followers, query)


Events = Annotated[EventReader, Depends(event_reader)]


@dataclass(frozen=True)
class _Start:
    """Where a stream begins; `ending` is the last event when there is nothing else to send."""

    job_id: str
    snapshot: str
    seq: int
    pulse: Pulse
    ending: Event | None

    @classmethod
    def read(cls, session: Session, job: Job, view: BaseModel, seq: int | None) -> "_Start":
        # Without a cursor the snapshot stands for all that has been.
        since = job.event_seq if seq is None else min(seq, job.event_seq)
        is_over = job.status.is_terminal and since == job.event_seq
        return cls(
            job_id=job.id,
            snapshot=view.model_dump_json(),
            seq=since,
            pulse=Pulse(job.event_seq, job.version, job.status, job.phase, job.progress),
            ending=events_before(session, job.id, None, 1)[0] if is_over else None,
        )


class _EventStream(StreamingResponse):
    """A stream that gives its place back, also when its client left before it began."""

    def __init__(self, frames: AsyncIterator[bytes], *, leave: Callable[[], None] | None) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(frames, media_type=STREAM_TYPE, headers=headers)
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._leave is not None:
                self._leave()


async def _frames(followers: Followers, start: _Start, *, ping_s: float) -> AsyncIterator[bytes]:
    """Send the snapshot, then what happens; ends after `done`, or when the server stops."""
    yield f"retry: {RETRY_MS}\n\n".encode() + _frame("snapshot", start.snapshot, start.seq)
    if start.ending is not None:
        yield _event_frame(start.ending)
        return
    shown, sent_at = start.pulse.progress, float("-inf")
    with followers.follow(start.job_id, seq=start.seq, version=start.pulse.version) as follower:
        while not follower.closed:
            pulse = follower.pulse
            held = pulse is not None and pulse.progress not in (None, shown)
            wait_s = max(0.0, sent_at + PROGRESS_EVERY_S - time.monotonic()) if held else ping_s
            if not await follower.wait(wait_s) and not held:
                yield PING
                continue
            for event in follower.take():
                yield _event_frame(event)
                if event.type is EventType.DONE:
                    return
            pulse = follower.pulse
            if pulse is None:
                continue
            follower.version = pulse.version
            progress, now = pulse.progress, time.monotonic()
            if progress not in (None, shown) and now >= sent_at + PROGRESS_EVERY_S:
                yield _progress_frame(start.job_id, pulse, progress)
                shown, sent_at = progress, now


def _event_frame(event: Event) -> bytes:
    return _frame(event.type.value, event_view(event).model_dump_json(), event.seq)


def _progress_frame(job_id: str, pulse: Pulse, progress: object) -> bytes:
    body = ProgressEvent(
        job_id=job_id,
        version=pulse.version,
        status=pulse.status,
        phase=pulse.phase,
        progress=Progress.model_validate(progress),
    )
    return _frame("job.progress", body.model_dump_json())


def _frame(name: str, data: str, seq: int | None = None) -> bytes:
    """Return one event; JSON has no line breaks of its own."""
    number = "" if seq is None else f"id: {seq}\n"
    return f"{number}event: {name}\ndata: {data}\n\n".encode()


def _seq(session: Session, job_id: str, cursor: str) -> int:
    if cursor.isascii() and cursor.isdigit() and len(cursor) <= 18:
        return int(cursor)
    if cursor.startswith(IdPrefix.EVENT.value):
        return seq_of(session, job_id, cursor)
    raise InvalidInput(
        f"`after` is {cursor!r}, expected the `seq` or the id of an event", param="after"
    )
