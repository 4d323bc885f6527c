"""One view over all kinds of jobs: list, get, events, metrics, cancel, resume."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import PlainTextResponse

from app.conditional import CONDITIONAL_RESPONSES, JobAnswers
from app.deps import (
    ID_PATTERN,
    Config,
    Db,
    Lists,
    PageOf,
    ReadsJobs,
    WritesJobs,
)
from app.events import EVENT_RESPONSES, Events
from app.filters import AnyJobFilter
from app.job_logs import LOG_RESPONSES, LogQueryOf, log_response
from app.job_verbs import CancelOptions, NoOptions, Verbs
from app.job_views import (
    AnyJob,
    EventView,
    MetricsView,
    any_job,
    any_jobs,
    metrics_view,
)
from app.responses import ListOf, json_response
from app.series import Series, SeriesQuery
from core.lifecycle import JobKind
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/jobs", tags=["jobs"])

JobId = Annotated[str, Path(pattern=ID_PATTERN)]


@router.get("", operation_id="list_jobs")
def list_jobs(
    caller: ReadsJobs, database: Db, query: PageOf, where: AnyJobFilter, lists: Lists
) -> ListOf[AnyJob]:
    """List jobs of all kinds, newest first."""
    with database.reading() as session:
        page = JobRepository(session).page(caller.owner_id, query, where)
        jobs = any_jobs(session, page.rows)
    return lists.page(jobs, [job.id for job in jobs], has_more=page.has_more)


@router.get(
    "/{job_id}", operation_id="get_job", response_model=AnyJob, responses=CONDITIONAL_RESPONSES
)
async def get_job(caller: ReadsJobs, answers: JobAnswers, job_id: JobId) -> Response:
    """Return one job, with `wait` as soon as it has changed; its ETag makes polling cheap."""
    return await answers.answer(caller, job_id, any_job)


@router.post("/{job_id}/cancel", operation_id="cancel_job", status_code=202)
def cancel_job(
    caller: WritesJobs, verbs: Verbs, job_id: JobId, body: CancelOptions | None = None
) -> AnyJob:
    """Cancel a job: at once when it waits, at its next step when it runs."""
    return verbs.cancel(caller, job_id, any_job, body)


@router.post("/{job_id}/pause", operation_id="pause_job", status_code=202)
def pause_job(
    caller: WritesJobs, verbs: Verbs, job_id: JobId, _body: NoOptions | None = None
) -> AnyJob:
    """Pause a job: at once when it is queued; one that runs saves what it has at its next step."""
    return verbs.pause(caller, job_id, any_job)


@router.post("/{job_id}/resume", operation_id="resume_job", status_code=202)
def resume_job(
    caller: WritesJobs, verbs: Verbs, job_id: JobId, _body: NoOptions | None = None
) -> AnyJob:
    """Queue a paused job again: it goes on where it was. A draft is queued for the first time.

    The `error` of a job that paused itself says why; see to that first.
    """
    return verbs.resume(caller, job_id, any_job)


@router.post("/{job_id}/retry", operation_id="retry_job", status_code=202, response_model=AnyJob)
def retry_job(
    caller: WritesJobs, verbs: Verbs, job_id: JobId, _body: NoOptions | None = None
) -> Response:
    """Queue a new job like one that has failed or was cancelled; `retry_of` names the old one."""
    made = verbs.retry(caller, job_id, any_job)
    return json_response(made, status=202, headers={"Location": f"/v1/jobs/{made.id}"})


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
def get_job_metrics(caller: ReadsJobs, database: Db, job_id: JobId, series: Series) -> MetricsView:
    """Return the metric series of one scope of a job."""
    return read_metrics(database, caller.owner_id, job_id, series)


@router.get(
    "/{job_id}/logs",
    operation_id="get_job_logs",
    response_class=PlainTextResponse,
    responses=LOG_RESPONSES,
)
def get_job_logs(
    request: Request,
    caller: ReadsJobs,
    database: Db,
    settings: Config,
    job_id: JobId,
    query: LogQueryOf,
) -> Response:
    """Return what an attempt has written, as text (also a range of it) or as JSON lines.

    Secrets are masked character by character, so that offsets stay.
    """
    with database.reading() as session:
        job = JobRepository(session).get(caller.owner_id, job_id)
    return log_response(request, settings, job, query)


def read_metrics(
    database: Database,
    owner_id: str,
    job_id: str,
    query: SeriesQuery,
    *,
    kind: JobKind | None = None,
) -> MetricsView:
    """Return a metric series.

    Raises:
        NotFound: no such job.
    """
    with database.reading() as session:
        JobRepository(session).get(owner_id, job_id, kind=kind)
        points = ExperimentRepository(session).metrics(job_id, query.scope)
        return metrics_view(job_id, query.scope, query.choose(points))
