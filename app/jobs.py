"""One view over all kinds of jobs: list, get, events, metrics, cancel, resume."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from app.conditional import CONDITIONAL_RESPONSES, JobAnswers
from app.deps import (
    ID_PATTERN,
    TEXT_PATTERN,
    Db,
    Lists,
    PageOf,
    Queue,
    ReadsJobs,
    WritesJobs,
)
from app.events import EVENT_RESPONSES, Events
from app.job_views import (
    AnyJob,
    EventView,
    MetricsView,
    any_job,
    metrics_view,
)
from app.queue import relay_now
from app.responses import ListOf
from core.lifecycle import JobKind, JobStatus
from core.spec import SpecModel
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/jobs", tags=["jobs"])

JobId = Annotated[str, Path(pattern=ID_PATTERN)]
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


@router.get(
    "/{job_id}", operation_id="get_job", response_model=AnyJob, responses=CONDITIONAL_RESPONSES
)
async def get_job(caller: ReadsJobs, answers: JobAnswers, job_id: JobId) -> Response:
    """Return one job, with `wait` as soon as it has changed; its ETag makes polling cheap."""
    return await answers.answer(caller, job_id, any_job)


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


@router.get(
    "/{job_id}/events",
    operation_id="list_job_events",
    response_model=ListOf[EventView],
    responses=EVENT_RESPONSES,
)
def list_job_events(
    caller: ReadsJobs, events: Events, job_id: JobId
) -> Response | ListOf[EventView]:
    """List events of a job, newest first unless `order=asc`, or follow the job in a stream."""
    return events.answer(caller, job_id, any_job)


@router.get("/{job_id}/metrics", operation_id="get_job_metrics")
def get_job_metrics(
    caller: ReadsJobs, database: Db, job_id: JobId, scope: Scope = "train"
) -> MetricsView:
    """Return the metric series of one scope of a job."""
    return read_metrics(database, caller.owner_id, job_id, scope)


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
