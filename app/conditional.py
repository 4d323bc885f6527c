"""Versions of jobs over HTTP: weak ETags, `If-None-Match`, `If-Match`, and waiting for a change."""

import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app.deps import Caller
from app.job_views import JobViewer, queue_place
from app.responses import etag_matches
from app.streams import Followers
from core.errors import Changed, InvalidInput
from core.lifecycle import JobKind
from core.settings import Settings
from models.job import Job
from models.repositories.job_requests import JobPulse
from models.repositories.jobs import JobRepository
from models.session import Database

# A client that is gone is noticed within this time.
_LOOK_S = 5.0
_ETAG = re.compile(r'(?:W/)?"?(\d{1,18})(?:\.\d{1,18})?"?')

CONDITIONAL_RESPONSES: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client has this version already"},
}

IfMatch = Annotated[
    str | None,
    Header(
        max_length=1000,
        description="ETags of the job (their version counts); refused with 412 when it has another",
    ),
]


def job_etag(job: JobPulse, *, ahead: int | None) -> str:
    """Return the weak ETag: the version, and what changes without it while the job waits or runs.

    That is the number of jobs ahead of a queued one; of a running one its last heartbeat and its
    events, neither of which ever goes back, so that their sum changes with each.
    """
    if ahead is not None:
        return f'W/"{job.version}.{ahead}"'
    if job.lease_until is not None:
        return f'W/"{job.version}.{int(job.heartbeat_at or 0) + job.event_seq}"'
    return f'W/"{job.version}"'


class Answers:
    """Bodies of the jobs that were asked for last, as they are as long as nothing has changed.

    Whoever waits for a job asks again and again, mostly in vain. A body is kept under everything
    that changes with it, so one that is found is true; those not asked for longest make room.
    """

    def __init__(self, max_bytes: int = 8 << 20) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._bodies: OrderedDict[tuple[JobViewer, JobPulse, int | None], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, view: JobViewer, pulse: JobPulse, ahead: int | None) -> bytes | None:
        """Return the body of a job that looks so, if it is kept."""
        key = (view, pulse, ahead)
        with self._lock:
            body = self._bodies.get(key)
            if body is not None:
                self._bodies.move_to_end(key)
            return body

    def put(self, view: JobViewer, pulse: JobPulse, ahead: int | None, body: bytes) -> None:
        """Keep a body that was read after its pulse."""
        with self._lock:
            self._bytes += len(body) - len(self._bodies.pop((view, pulse, ahead), b""))
            self._bodies[view, pulse, ahead] = body
            while self._bytes > self._max_bytes:
                self._bytes -= len(self._bodies.popitem(last=False)[1])


def check_if_match(header: str | None, job: Job) -> None:
    """Refuse a request for another version of the job; `job` must be locked.

    Raises:
        Changed: the job has another version than `If-Match` names.
    """
    if header is None or header.strip() == "*":
        return
    named = [_ETAG.fullmatch(part.strip()) for part in header.split(",")]
    if str(job.version) not in {match.group(1) for match in named if match is not None}:
        raise Changed(
            f"If-Match is {header!r} and job {job.id} has version {job.version}",
            hint="read the job again, and decide by what it is now",
        )


@dataclass(frozen=True)
class Waiting:
    """How long to wait for a version other than a known one, by default the present one."""

    seconds: float
    version: int | None


async def waiting(
    request: Request,
    wait: Annotated[
        float | None,
        Query(ge=0, le=3600, description="seconds to wait for a change; cut to `api.wait_max_s`"),
    ] = None,
    if_version: Annotated[
        int | None,
        Query(ge=0, lt=2**63, description="with `wait`: the version that the client has"),
    ] = None,
) -> Waiting | None:
    """Return what to wait for.

    Raises:
        InvalidInput: `if_version` would be ignored.
    """
    if wait is None:
        if if_version is not None:
            raise InvalidInput(
                "if_version says what to wait for, and wait is not given: add e.g. wait=30",
                param="if_version",
            )
        return None
    settings: Settings = request.app.state.settings
    return Waiting(min(wait, settings.api.wait_max_s), if_version)


@dataclass(frozen=True)
class JobReader:
    """Answers a request for one job of the caller, perhaps after it has changed."""

    request: Request
    database: Database
    followers: Followers
    answers: Answers
    waiting: Waiting | None

    async def answer(
        self,
        caller: Caller,
        job_id: str,
        view: JobViewer,
        *,
        kind: JobKind | None = None,
    ) -> Response:
        """Return the job as `view` shows it, or 304 when the client has it already.

        Raises:
            NotFound: no such job.
        """
        if self.waiting is not None and self.waiting.seconds > 0:
            job = await run_in_threadpool(self._get, caller.owner_id, job_id, kind)
            await self._wait(job, self.waiting)
        return await run_in_threadpool(self._read, caller.owner_id, job_id, view, kind)

    async def _wait(self, job: Job, waiting: Waiting) -> None:
        """Wait for another version; a job that has ended has no other one."""
        known = job.version if waiting.version is None else waiting.version
        deadline = time.monotonic() + waiting.seconds
        if job.version != known or job.status.is_terminal:
            return
        with self.followers.follow(job.id, seq=job.event_seq, version=known) as follower:
            while not follower.closed and (left := deadline - time.monotonic()) > 0:
                if await follower.wait(min(left, _LOOK_S)):
                    follower.take()
                    if follower.pulse is not None and follower.pulse.version != known:
                        return
                elif await self.request.is_disconnected():
                    return

    def _get(self, owner_id: str, job_id: str, kind: JobKind | None) -> Job:
        with self.database.reading() as session:
            return JobRepository(session).get(owner_id, job_id, kind=kind)

    def _read(
        self,
        owner_id: str,
        job_id: str,
        view: JobViewer,
        kind: JobKind | None,
    ) -> Response:
        with self.database.reading() as session:
            jobs = JobRepository(session)
            pulse = jobs.pulse(owner_id, job_id, kind=kind)
            place = queue_place(session, pulse)
            ahead = None if place.position is None else place.ahead
            etag = job_etag(pulse, ahead=ahead)
            headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
            if etag_matches(self.request.headers.get("if-none-match"), etag):
                return Response(status_code=304, headers=headers)
            content = self.answers.get(view, pulse, ahead)
            if content is None:
                # What has changed since the pulse changes the next one, which asks again.
                job = jobs.get(owner_id, job_id, kind=kind)
                content = view(session, job, place=place).model_dump_json().encode()
                self.answers.put(view, pulse, ahead, content)
        return Response(content=content, media_type="application/json", headers=headers)


async def job_reader(
    request: Request, waiting: Annotated[Waiting | None, Depends(waiting)]
) -> JobReader:
    """Return what answers a request for a job."""
    state = request.app.state
    return JobReader(request, state.database, state.followers, state.answers, waiting)


JobAnswers = Annotated[JobReader, Depends(job_reader)]
