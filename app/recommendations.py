"""Recommendations: which kernel and divergence fit a dataset under a model, and why."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.deps import ID_PATTERN, Config, Db, Lists, PageOf, Prefer, Queue, ReadsJobs, WritesJobs
from app.fine_tuning import DatasetId, Metadata, ModelName, Seed
from app.job_views import JobError, Progress, QueuePlace, job_error, progress_view
from app.queue import relay_now
from app.responses import (
    ListOf,
    Schema,
    conditional,
    json_response,
    unix,
    wait_until,
)
from core.errors import NotFound
from core.hub import resolve
from core.lifecycle import JobKind, JobStatus
from core.profile import Choice, DatasetProfile, RankedPair, Recommendation
from core.settings import Settings
from core.spec import SpecModel
from models.experiment import RecommendationRow
from models.job import Job
from models.repositories.datasets import DatasetRepository
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/recommendations", tags=["recommendations"])

RecommendationId = Annotated[str, Path(pattern=ID_PATTERN)]


class CreateRecommendation(SpecModel):
    """Which data, under which model."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"dataset_id": "ds_01jd", "model": "tiny-lm", "seed": 7}]}
    )

    dataset_id: DatasetId
    model: ModelName
    seed: Seed = 0
    metadata: Metadata = Field(default_factory=dict)


class Answer(Schema):
    """The pair that fits best, and how far the data separate it from the next."""

    kernel: str
    divergence: str
    confidence: float
    margin: float
    runner_up: RankedPair
    separated: bool
    kernels_separated: bool
    kernel_choice: Choice
    divergence_choice: Choice
    tied_pairs: int
    summary: str


class RecommendationView(Schema):
    """A recommendation; the answer is there as soon as there is one."""

    id: str
    object: Literal["recommendation"] = "recommendation"
    status: JobStatus
    provisional: bool
    job_id: str
    dataset_id: str
    model: str
    seed: int
    created_at: int
    started_at: int | None
    finished_at: int | None
    progress: Progress | None
    queue: QueuePlace
    recommendation: Answer | None
    ranking: list[RankedPair]
    evidence: DatasetProfile | None
    metadata: dict[str, str]
    error: JobError | None


@router.post(
    "",
    operation_id="create_recommendation",
    status_code=202,
    response_model=RecommendationView,
    responses={200: {"model": RecommendationView, "description": "Done within `Prefer: wait=n`"}},
)
async def create_recommendation(
    caller: WritesJobs,
    database: Db,
    queue: Queue,
    settings: Config,
    prefer: Prefer,
    body: CreateRecommendation,
) -> Response:
    """Queue a recommendation; with `Prefer: wait=n` the answer comes when it is there."""
    owner = caller.owner_id
    job_id = await run_in_threadpool(_create, database, owner, body, settings)
    await run_in_threadpool(relay_now, database, queue)
    done = False
    if prefer is not None:
        done = await wait_until(lambda: _is_done(database, owner, job_id), prefer.seconds)
    view = await run_in_threadpool(_read, database, owner, job_id)
    headers = {"Location": f"/v1/recommendations/{job_id}"}
    if prefer is not None:
        headers |= prefer.headers()
    return json_response(view, status=200 if done else 202, headers=headers)


@router.get("", operation_id="list_recommendations")
def list_recommendations(
    caller: ReadsJobs, database: Db, query: PageOf, lists: Lists
) -> ListOf[RecommendationView]:
    """List the recommendations that were asked for, newest first."""
    with database.reading() as session:
        page = JobRepository(session).page(caller.owner_id, query, kind=JobKind.RECOMMENDATION)
        experiments = ExperimentRepository(session)
        views = [_view(session, job, experiments.recommendation_of(job.id)) for job in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{recommendation_id}",
    operation_id="get_recommendation",
    response_model=RecommendationView,
)
def get_recommendation(
    request: Request, caller: ReadsJobs, database: Db, recommendation_id: RecommendationId
) -> Response:
    """Return one recommendation, also one that a fine-tuning job made on its way."""
    return conditional(request, _read(database, caller.owner_id, recommendation_id))


def _create(
    database: Database, owner_id: str, body: CreateRecommendation, settings: Settings
) -> str:
    with database.reading() as session:
        DatasetRepository(session).get_usable(owner_id, body.dataset_id)
    spec: dict[str, Any] = {"model": resolve(body.model, settings).model_dump(mode="json")}
    with database.transaction() as session:
        DatasetRepository(session).get_usable(owner_id, body.dataset_id)
        job = JobRepository(session).create(
            owner_id=owner_id,
            kind=JobKind.RECOMMENDATION,
            spec=spec,
            dataset_id=body.dataset_id,
            model=body.model,
            seed=body.seed,
            metadata=body.metadata,
        )
        return job.id


def _is_done(database: Database, owner_id: str, job_id: str) -> bool:
    with database.reading() as session:
        return JobRepository(session).get(owner_id, job_id).status.is_terminal


def _read(database: Database, owner_id: str, recommendation_id: str) -> RecommendationView:
    with database.reading() as session:
        jobs = JobRepository(session)
        experiments = ExperimentRepository(session)
        try:
            job = jobs.get(owner_id, recommendation_id, kind=JobKind.RECOMMENDATION)
            row = experiments.recommendation_of(job.id)
        except NotFound:
            row = experiments.recommendation(owner_id, recommendation_id)
            job = jobs.get(owner_id, row.job_id)
        return _view(session, job, row)


def _view(session: Session, job: Job, row: RecommendationRow | None) -> RecommendationView:
    """Return the view; what a fine-tuning job made on its way is finished when it is stored."""
    on_the_way = row is not None and row.id != job.id
    status = JobStatus.SUCCEEDED if on_the_way else job.status
    found = None if row is None else Recommendation.model_validate(row.result)
    ahead = JobRepository(session).queue_position(job)
    return RecommendationView(
        id=job.id if row is None else row.id,
        status=status,
        provisional=found is not None and not status.is_terminal,
        job_id=job.id,
        dataset_id=(job.dataset_id or "") if row is None else row.dataset_id,
        model=(job.model or "") if row is None else row.model,
        seed=job.seed,
        created_at=int(job.created_at if row is None or not on_the_way else row.created_at),
        started_at=unix(job.started_at),
        finished_at=unix(row.created_at if row is not None and on_the_way else job.finished_at),
        progress=None if on_the_way else progress_view(job),
        queue=QueuePlace(position=None if ahead is None else ahead + 1, ahead=ahead or 0),
        recommendation=None if found is None else _answer(found),
        ranking=[] if found is None else list(found.ranking),
        evidence=None if found is None else found.profile,
        metadata=job.labels,
        error=None if on_the_way else job_error(job.error),
    )


def _answer(found: Recommendation) -> Answer:
    return Answer(
        kernel=found.kernel,
        divergence=found.divergence,
        confidence=found.confidence,
        margin=found.margin,
        runner_up=found.runner_up,
        separated=found.separated,
        kernels_separated=found.kernels_separated,
        kernel_choice=found.kernel_choice,
        divergence_choice=found.divergence_choice,
        tied_pairs=found.tied_pairs,
        summary=found.summary,
    )
