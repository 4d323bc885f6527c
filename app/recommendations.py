"""Recommendations: which kernel and divergence fit a dataset under a model, and why."""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.conditional import CONDITIONAL_RESPONSES
from app.dataset_sources import is_json
from app.datasets import read_dataset, refused_dataset
from app.deps import (
    ID_PATTERN,
    Caller,
    Config,
    Db,
    Lists,
    PageOf,
    Patience,
    Prefer,
    Queue,
    ReadsJobs,
    WritesJobs,
)
from app.filters import Filter
from app.fine_tuning import (
    Accepted,
    CreateFineTuningJob,
    Metadata,
    Seed,
    Suffix,
    queue_fine_tuning,
)
from app.job_verbs import NoOptions
from app.job_views import FineTuningJob
from app.keys import Scope
from app.queue import CeleryQueue, relay_now
from app.recommendation_bodies import (
    FIELDS,
    RECOMMENDATION_BODY,
    CreateRecommendation,
    receive_json,
    store_form,
)
from app.recommendation_views import (
    RecommendationMatrix,
    RecommendationView,
    matrix_view,
    recommendation_view,
)
from app.responses import ListOf, conditional, json_response, wait_until
from app.training_data import training_data
from app.uploads import receive_upload
from core.errors import Conflict, InvalidInput, NotFound
from core.hub import resolve
from core.ids import IdPrefix, new_id
from core.lifecycle import DatasetStatus, JobKind
from core.methods import KernelDpo, KernelDpoHyperparameters, KernelDpoMethod
from core.profile import RankedPair
from core.settings import Settings
from core.spec import PenaltyTerm, SpecModel
from models.experiment import RecommendationRow
from models.job import Job
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/recommendations", tags=["recommendations"])

RecommendationId = Annotated[str, Path(pattern=ID_PATTERN)]


class AcceptRecommendation(SpecModel):
    """Which pair of the ranking to train, and what to set otherwise than it recommends."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {},
                {"rank": 2, "hyperparameters": {"n_epochs": 2, "learning_rate": 2e-4}},
            ]
        }
    )

    rank: int = Field(default=1, ge=1, description="1 is the recommended pair, 2 the runner-up")
    hyperparameters: KernelDpoHyperparameters = Field(
        default=KernelDpoHyperparameters(),
        description="as in `method.kernel_dpo.hyperparameters` of a fine-tuning job; beta, gamma "
        "and alpha that are not given are those of the pair",
    )
    seed: Seed | None = Field(default=None, description="null: that of the recommendation")
    suffix: Suffix | None = None
    metadata: Metadata = Field(default_factory=dict)


@router.post(
    "",
    operation_id="create_recommendation",
    status_code=202,
    response_model=RecommendationView,
    responses={200: {"model": RecommendationView, "description": "Done within `Prefer: wait=n`"}},
    openapi_extra=RECOMMENDATION_BODY,
)
async def create_recommendation(
    request: Request, caller: WritesJobs, database: Db, queue: Queue, settings: Config,
    prefer: Prefer,
) -> Response:  # fmt: skip
    """Queue a recommendation for a dataset, or for a file that comes with the request.

    With `Prefer: wait=n` the answer comes when it is there. A file is stored and validated as by
    `POST /v1/datasets`, and refused like there.
    """
    if not is_json(request):
        return await _recommend_upload(request, caller, database, queue, settings, prefer)
    owner = caller.owner_id
    body = await receive_json(request)
    job_id = await run_in_threadpool(_create, database, owner, body, settings)
    await run_in_threadpool(relay_now, database, queue)
    if prefer is not None:
        await wait_until(lambda: _is_done(database, owner, job_id), prefer.seconds)
    return await run_in_threadpool(_asked_for, database, owner, job_id, prefer)


async def _recommend_upload(
    request: Request,
    caller: Caller,
    database: Database,
    queue: CeleryQueue,
    settings: Settings,
    prefer: Patience | None,
) -> Response:
    """Store a form's file, and wait for its validation, or as long as the client prefers."""
    caller.must(Scope.DATASETS_WRITE)
    owner, dataset_id = caller.owner_id, new_id(IdPrefix.DATASET)
    upload = await receive_upload(
        request,
        settings.upload_dir / dataset_id,
        max_bytes=settings.api.max_upload_bytes,
        fields=FIELDS,
    )
    job_id = await run_in_threadpool(
        store_form, database, upload, settings, dataset_id=dataset_id, owner_id=owner
    )
    await run_in_threadpool(relay_now, database, queue)

    def is_answered() -> bool:
        dataset = read_dataset(database, owner, dataset_id)
        if dataset.error is not None:
            return True
        validated = dataset.status is not DatasetStatus.VALIDATING
        return validated and (prefer is None or _is_done(database, owner, job_id))

    await wait_until(is_answered, settings.api.wait_default_s if prefer is None else prefer.seconds)
    dataset = await run_in_threadpool(read_dataset, database, owner, dataset_id)
    if dataset.error is not None and dataset.status is not DatasetStatus.VALIDATING:
        return refused_dataset(request, dataset, dataset.error, recommendation_id=job_id)
    return await run_in_threadpool(_asked_for, database, owner, job_id, prefer)


def _asked_for(database: Database, owner_id: str, job_id: str, prefer: Patience | None) -> Response:
    """Return a recommendation that was just asked for: 200 when its end was waited for."""
    view = _read(database, owner_id, job_id)
    headers = {"Location": f"/v1/recommendations/{job_id}"}
    if prefer is not None:
        headers |= prefer.headers()
    done = prefer is not None and view.status.is_terminal
    return json_response(view, status=200 if done else 202, headers=headers)


@router.get("", operation_id="list_recommendations")
def list_recommendations(
    caller: ReadsJobs, database: Db, query: PageOf, where: Filter, lists: Lists
) -> ListOf[RecommendationView]:
    """List the recommendations that were asked for, newest first."""
    where = replace(where, kind=JobKind.RECOMMENDATION)
    with database.reading() as session:
        page = JobRepository(session).page(caller.owner_id, query, where)
        experiments = ExperimentRepository(session)
        views = [
            recommendation_view(session, job, experiments.recommendation_of(job.id))
            for job in page.rows
        ]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{recommendation_id}",
    operation_id="get_recommendation",
    response_model=RecommendationView,
    responses=CONDITIONAL_RESPONSES,
)
def get_recommendation(
    request: Request, caller: ReadsJobs, database: Db, recommendation_id: RecommendationId
) -> Response:
    """Return one recommendation, also one that a fine-tuning job made on its way."""
    return conditional(request, _read(database, caller.owner_id, recommendation_id))


@router.get(
    "/{recommendation_id}/matrix",
    operation_id="get_recommendation_matrix",
    response_model=RecommendationMatrix,
    responses=CONDITIONAL_RESPONSES,
)
def get_recommendation_matrix(
    request: Request, caller: ReadsJobs, database: Db, recommendation_id: RecommendationId
) -> Response:
    """Return the ranking as a heat map, with how often searches have tried each pair."""
    with database.reading() as session:
        job, row = _find(session, caller.owner_id, recommendation_id)
        view = recommendation_view(session, job, row)
        trials = ExperimentRepository(session).trials_on(
            caller.owner_id, dataset_id=view.dataset_id, model=job.model or ""
        )
    return conditional(request, matrix_view(view, trials))


@router.post(
    "/{recommendation_id}/accept",
    operation_id="accept_recommendation",
    status_code=201,
    response_model=FineTuningJob,
)
def accept_recommendation(
    caller: WritesJobs,
    database: Db,
    queue: Queue,
    settings: Config,
    recommendation_id: RecommendationId,
    body: AcceptRecommendation | None = None,
) -> Response:
    """Queue a fine-tuning job with a pair of the ranking: the first, unless `rank` says another."""
    body = body or AcceptRecommendation()
    with database.reading() as session:
        job, row = _find(session, caller.owner_id, recommendation_id)
        view = recommendation_view(session, job, row)
    asked = CreateFineTuningJob(
        model=job.model or "",
        dataset_id=view.dataset_id,
        method=KernelDpoMethod(
            type="kernel_dpo", kernel_dpo=_named(_pick(view, body.rank), body.hyperparameters)
        ),
        seed=view.seed if body.seed is None else body.seed,
        suffix=body.suffix,
        metadata=body.metadata,
    )
    made = queue_fine_tuning(
        caller.owner_id,
        database,
        queue,
        settings,
        asked,
        accepted=Accepted(view.id, model=job.spec["model"]),
    )
    return json_response(made, status=201, headers={"Location": f"/v1/fine_tuning/jobs/{made.id}"})


@router.post("/{recommendation_id}/cancel", operation_id="cancel_recommendation", status_code=202)
def cancel_recommendation(
    caller: WritesJobs,
    database: Db,
    recommendation_id: RecommendationId,
    _body: NoOptions | None = None,
) -> RecommendationView:
    """Cancel a recommendation: at once when it is queued, between two batches when it runs."""
    with database.transaction() as session:
        job, row = _find(session, caller.owner_id, recommendation_id)
        if job.kind is not JobKind.RECOMMENDATION:
            raise Conflict(
                f"recommendation {recommendation_id} was made by job {job.id} and is finished",
                code="job_not_cancellable",
                hint=f"POST /v1/fine_tuning/jobs/{job.id}/cancel cancels the job",
            )
        job = JobRepository(session).request_cancel(caller.owner_id, job.id)
        return recommendation_view(session, job, row)


def _create(
    database: Database, owner_id: str, body: CreateRecommendation, settings: Settings
) -> str:
    with database.reading() as session:
        training_data(session, owner_id, body.dataset_id)
    spec: dict[str, Any] = {"model": resolve(body.model, settings).model_dump(mode="json")}
    with database.transaction() as session:
        data = training_data(session, owner_id, body.dataset_id, lock=True)
        job = JobRepository(session).create(
            owner_id=owner_id,
            kind=JobKind.RECOMMENDATION,
            spec=spec,
            dataset_id=data.dataset_id,
            model=body.model,
            seed=body.seed,
            metadata=body.metadata,
            after_validation=data.is_validating,
        )
        return job.id


def _is_done(database: Database, owner_id: str, job_id: str) -> bool:
    with database.reading() as session:
        return JobRepository(session).get(owner_id, job_id).status.is_terminal


def _read(database: Database, owner_id: str, recommendation_id: str) -> RecommendationView:
    with database.reading() as session:
        job, row = _find(session, owner_id, recommendation_id)
        return recommendation_view(session, job, row)


def _find(
    session: Session, owner_id: str, recommendation_id: str
) -> tuple[Job, RecommendationRow | None]:
    """Return the job behind an id, a recommendation's own or a fine-tuning job, and its answer."""
    jobs = JobRepository(session)
    experiments = ExperimentRepository(session)
    try:
        job = jobs.get(owner_id, recommendation_id, kind=JobKind.RECOMMENDATION)
    except NotFound:
        row = experiments.recommendation(owner_id, recommendation_id)
        return jobs.get(owner_id, row.job_id), row
    return job, experiments.recommendation_of(job.id)


def _pick(view: RecommendationView, rank: int) -> RankedPair:
    """Return the pair of a rank.

    Raises:
        Conflict: there is no final answer.
        InvalidInput: no pair has the rank.
    """
    if not view.ranking or view.provisional:
        ended = view.status.is_terminal
        raise Conflict(
            f"recommendation {view.id} is {view.status.value} and has "
            f"{'a provisional' if view.ranking else 'no'} answer; expected a final one",
            code="recommendation_not_ready",
            hint="ask for a new one: POST /v1/recommendations"
            if ended
            else f"poll GET /v1/recommendations/{view.id} until its status is succeeded",
            retryable=not ended,
        )
    if rank > len(view.ranking):
        raise InvalidInput(
            f"rank is {rank}; expected 1 to {len(view.ranking)}, the length of the ranking",
            param="rank",
        )
    return view.ranking[rank - 1]


def _named(pair: RankedPair, given: KernelDpoHyperparameters) -> KernelDpo:
    """Return a ranked pair as the body of a fine-tuning job; what is given wins over its own."""
    objective = pair.objective
    kernel, divergence = objective.kernel_term, objective.divergence_term
    own: dict[str, Any] = {"beta": objective.beta, "label_smoothing": objective.label_smoothing}
    if kernel is not None:
        own["gamma"] = kernel.gamma
    if isinstance(divergence, PenaltyTerm):
        own["alpha"] = divergence.alpha
    return KernelDpo(
        kernel=None if kernel is None else kernel.kernel,
        kernel_mode=None if kernel is None else kernel.mode,
        divergence=None if divergence is None else divergence.divergence,
        divergence_mode=None if divergence is None else divergence.mode,
        hyperparameters=KernelDpoHyperparameters.model_validate(
            own | given.model_dump(exclude_unset=True)
        ),
    )
