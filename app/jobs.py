"""One view over all kinds of jobs: list, get, events, metrics, cancel, resume."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy.orm import Session

from app.deps import (
    ID_PATTERN,
    TEXT_PATTERN,
    Db,
    Lister,
    Lists,
    PageOf,
    Queue,
    ReadsJobs,
    WritesJobs,
)
from app.job_views import (
    AnyJob,
    EventView,
    MetricsView,
    any_job,
    event_view,
    metrics_view,
)
from app.queue import relay_now
from app.responses import ListOf, conditional
from core.errors import InvalidInput
from core.ids import IdPrefix
from core.lifecycle import JobKind, JobStatus
from core.spec import SpecModel
from models.repositories.events import events_after, events_before, seq_of
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/jobs", tags=["jobs"])

JobId = Annotated[str, Path(pattern=ID_PATTERN)]
EventLimit = Annotated[int, Query(ge=1, le=100)]
EventCursor = Annotated[str | None, Query(pattern=ID_PATTERN, description="a `seq` or an event id")]
EventOrder = Annotated[Literal["asc", "desc"], Query(description="by `seq`")]
Scope = Annotated[
    str,
    Query(
        max_length=40, pattern=TEXT_PATTERN, description="`train`, `baseline` or `trial:<number>`"
    ),
]


class NoOptions(SpecModel):
    """The body of a cancel or resume: none, or an empty object; there is nothing to choose."""


@router.get("", operation_id="list_jobs")
def list_jobs(
    caller: ReadsJobs,
    database: Db,
    query: PageOf,
    lists: Lists,
    kind: JobKind | None = None,
    status: JobStatus | None = None,
    dataset_id: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    model: Annotated[str | None, Query(max_length=512, pattern=TEXT_PATTERN)] = None,
) -> ListOf[AnyJob]:
    """List jobs of all kinds, newest first."""
    with database.reading() as session:
        page = JobRepository(session).page(
            caller.owner_id, query, kind=kind, status=status, dataset_id=dataset_id, model=model
        )
        jobs = [any_job(session, job) for job in page.rows]
    return lists.page(jobs, [job.id for job in jobs], has_more=page.has_more)


@router.get("/{job_id}", operation_id="get_job", response_model=AnyJob)
def get_job(request: Request, caller: ReadsJobs, database: Db, job_id: JobId) -> Response:
    """Return one job; its ETag makes polling cheap."""
    with database.reading() as session:
        view = any_job(session, JobRepository(session).get(caller.owner_id, job_id))
    return conditional(request, view)


@router.post("/{job_id}/cancel", operation_id="cancel_job", status_code=202)
def cancel_job(
    caller: WritesJobs, database: Db, job_id: JobId, _body: NoOptions | None = None
) -> AnyJob:
    """Cancel a job: at once when it is queued or paused, at its next step when it runs."""
    with database.transaction() as session:
        return any_job(session, JobRepository(session).request_cancel(caller.owner_id, job_id))


@router.post("/{job_id}/resume", operation_id="resume_job", status_code=202)
def resume_job(
    caller: WritesJobs, database: Db, queue: Queue, job_id: JobId, _body: NoOptions | None = None
) -> AnyJob:
    """Queue a paused job again: it goes on where it was. A job that is not paused stays as it is.

    The job's `error` says why it is paused; see to that first.
    """
    with database.transaction() as session:
        jobs = JobRepository(session)
        view = any_job(session, jobs.resume(jobs.get(caller.owner_id, job_id)))
    relay_now(database, queue)
    return view


@router.get("/{job_id}/events", operation_id="list_job_events")
def list_job_events(
    caller: ReadsJobs,
    database: Db,
    job_id: JobId,
    lists: Lists,
    limit: EventLimit = 20,
    after: EventCursor = None,
    order: EventOrder = "desc",
) -> ListOf[EventView]:
    """List events of a job, newest first unless `order=asc`."""
    return read_events(
        lists, database, caller.owner_id, job_id, limit=limit, after=after, order=order
    )


@router.get("/{job_id}/metrics", operation_id="get_job_metrics")
def get_job_metrics(
    caller: ReadsJobs, database: Db, job_id: JobId, scope: Scope = "train"
) -> MetricsView:
    """Return the metric series of one scope of a job."""
    return read_metrics(database, caller.owner_id, job_id, scope)


def read_events(
    lists: Lister,
    database: Database,
    owner_id: str,
    job_id: str,
    *,
    limit: int,
    after: str | None,
    order: Literal["asc", "desc"],
    kind: JobKind | None = None,
) -> ListOf[EventView]:
    """Return a page of a job's events.

    Raises:
        NotFound: no such job, or no such event.
        InvalidInput: `after` is neither a number nor an event id.
    """
    with database.reading() as session:
        JobRepository(session).get(owner_id, job_id, kind=kind)
        seq = None if after is None else _seq(session, job_id, after)
        match order:
            case "asc":
                rows = events_after(session, job_id, seq or 0, limit + 1)
            case "desc":
                rows = events_before(session, job_id, seq, limit + 1)
        events = [event_view(event) for event in rows[:limit]]
    return lists.page(events, [event.id for event in events], has_more=len(rows) > limit)


def read_metrics(
    database: Database, owner_id: str, job_id: str, scope: str, *, kind: JobKind | None = None
) -> MetricsView:
    """Return a metric series.

    Raises:
        NotFound: no such job.
    """
    with database.reading() as session:
        JobRepository(session).get(owner_id, job_id, kind=kind)
        points = ExperimentRepository(session).metrics(job_id, scope)
        return metrics_view(job_id, scope, points)


def _seq(session: Session, job_id: str, cursor: str) -> int:
    if cursor.isascii() and cursor.isdigit() and len(cursor) <= 18:
        return int(cursor)
    if cursor.startswith(IdPrefix.EVENT.value):
        return seq_of(session, job_id, cursor)
    raise InvalidInput(
        f"`after` is {cursor!r}, expected the `seq` or the id of an event", param="after"
    )
