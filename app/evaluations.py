"""Evaluations: how good a checkpoint is on held-out pairs, and against its base under a reward."""

from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session

from app.conditional import CONDITIONAL_RESPONSES
from app.deps import ID_PATTERN, Config, Db, Lists, PageOf, Queue, ReadsJobs, WritesJobs
from app.filters import Filter
from app.fine_tuning import DatasetId, Metadata, ModelName, Seed
from app.job_views import JobError, Progress, job_error, progress_view
from app.queue import relay_now
from app.responses import ListOf, Schema, conditional, json_response, list_of, unix
from app.training_data import TrainingData, training_data
from core.errors import Conflict, InvalidInput, NotFound, NotPermitted
from core.evaluations import EvaluationResult, ScoredSample
from core.hub import resolve
from core.lifecycle import JobKind, JobStatus, Phase
from core.modelref import ModelRef
from core.reward_models import check_reward_model
from core.settings import Settings
from core.spec import SpecModel
from models.evaluation import AnsweredPrompt
from models.job import Job
from models.repositories.checkpoints import CheckpointRepository
from models.repositories.evaluations import AnswerRepository
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository

router = APIRouter(prefix="/evaluations", tags=["evaluations"])

EvaluationId = Annotated[str, Path(pattern=ID_PATTERN)]
SplitName = Literal["validation", "test"]


class CreateEvaluation(SpecModel):
    """What to measure, on which pairs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"checkpoint_id": "ckpt_01jd"},
                {
                    "checkpoint_id": "ckpt_01jd",
                    "dataset_id": "ds_01jd",
                    "reward_model": "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
                    "max_prompts": 50,
                },
            ]
        }
    )

    checkpoint_id: Annotated[str, Field(pattern=ID_PATTERN, description="an adapter")]
    dataset_id: DatasetId | None = Field(
        default=None, description="null: the one that it was trained on, whose test pairs it has "
        "not seen",
    )  # fmt: skip
    split: SplitName = "test"
    reward_model: ModelName | None = Field(
        default=None, description="a sequence classifier with one output; gives the win rate"
    )
    max_prompts: int = Field(
        default=100, ge=1, le=1000, description="answered for the win rate, drawn by the seed"
    )
    max_new_tokens: int = Field(default=256, ge=1, le=4096, description="of each answer")
    seed: Seed = 0
    metadata: Metadata = Field(default_factory=dict)


class EvaluationView(Schema):
    """One evaluation, its result when it has succeeded; answers are a list of their own."""

    id: str
    object: Literal["evaluation"] = "evaluation"
    status: JobStatus
    phase: Phase | None
    created_at: int
    finished_at: int | None
    checkpoint_id: str
    dataset_id: str
    split: SplitName
    reward_model: str | None
    seed: int
    progress: Progress | None
    metadata: dict[str, str]
    result: EvaluationResult | None
    samples_url: str
    error: JobError | None


@router.post("", operation_id="create_evaluation", status_code=202, response_model=EvaluationView)
def create_evaluation(
    caller: WritesJobs, database: Db, queue: Queue, settings: Config, body: CreateEvaluation
) -> Response:
    """Queue an evaluation of an adapter: accuracy, calibrated log-loss, drift, with intervals.

    With a reward model the checkpoint and its base answer held-out prompts, and the answers are
    compared. `POST /v1/jobs/{id}/cancel` cancels it.
    """
    owner = caller.owner_id
    with database.reading() as session:
        ExperimentRepository(session).checkpoint(owner, body.checkpoint_id)
    reward = None if body.reward_model is None else _reward_model(body.reward_model, settings)
    with database.transaction() as session:
        row = CheckpointRepository(session).lock(owner, body.checkpoint_id)
        if row.kind != "adapter":
            raise Conflict(
                f"checkpoint {row.id} is of kind {row.kind!r}; only an adapter has its base beside "
                "it to be measured against",
                code="checkpoint_not_adapter",
                param="checkpoint_id",
                hint="name the adapter that a merged one was made from; the job that trained a "
                "full one has measured it",
            )
        jobs = JobRepository(session)
        source = jobs.get(owner, row.job_id)
        data = _data(session, owner, body, trained_on=str(source.dataset_id))
        job = jobs.create(
            owner_id=owner,
            kind=JobKind.EVALUATION,
            spec={
                "checkpoint_id": row.id,
                "model": source.spec["model"],
                "method": source.spec["method"],
                "split": body.split,
                "reward_model": None if reward is None else reward.model_dump(mode="json"),
                "max_prompts": body.max_prompts,
                "max_new_tokens": body.max_new_tokens,
            },
            dataset_id=data.dataset_id,
            model=source.model,
            seed=body.seed,
            metadata=body.metadata,
            after_validation=data.is_validating,
        )
        view = _view(job)
    relay_now(database, queue)
    return json_response(view, status=202, headers={"Location": f"/v1/evaluations/{view.id}"})


@router.get("", operation_id="list_evaluations")
def list_evaluations(
    caller: ReadsJobs,
    database: Db,
    query: PageOf,
    where: Filter,
    lists: Lists,
    checkpoint_id: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> ListOf[EvaluationView]:
    """List evaluations, newest first."""
    where = replace(where, kind=JobKind.EVALUATION, checkpoint_id=checkpoint_id)
    with database.reading() as session:
        page = JobRepository(session).page(caller.owner_id, query, where)
        views = [_view(job) for job in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{evaluation_id}",
    operation_id="get_evaluation",
    response_model=EvaluationView,
    responses=CONDITIONAL_RESPONSES,
)
def get_evaluation(
    request: Request, caller: ReadsJobs, database: Db, evaluation_id: EvaluationId
) -> Response:
    """Return one evaluation; its ETag makes polling cheap."""
    with database.reading() as session:
        job = JobRepository(session).get(caller.owner_id, evaluation_id, kind=JobKind.EVALUATION)
    return conditional(request, _view(job))


@router.get("/{evaluation_id}/samples", operation_id="list_evaluation_samples")
def list_evaluation_samples(
    caller: ReadsJobs,
    database: Db,
    evaluation_id: EvaluationId,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[int, Query(ge=0, lt=2**31, description="`number` before the page")] = 0,
) -> ListOf[ScoredSample]:
    """List the answers behind the win rate as they come; none without a reward model."""
    with database.reading() as session:
        JobRepository(session).get(caller.owner_id, evaluation_id, kind=JobKind.EVALUATION)
        found = AnswerRepository(session).page(evaluation_id, after=after, limit=limit + 1)
        page = [_sample(row) for row in found[:limit]]
    return list_of(page, [str(one.number) for one in page], has_more=len(found) > limit)


def _data(
    session: Session, owner_id: str, body: CreateEvaluation, *, trained_on: str
) -> TrainingData:
    """Return the pairs to measure on; those of the training may be gone.

    Raises:
        NotFound: no such dataset or file.
        Conflict: the dataset cannot be used.
    """
    try:
        return training_data(session, owner_id, body.dataset_id or trained_on, lock=True)
    except NotFound as error:
        error.param = "dataset_id"
        if body.dataset_id is None:
            error.hint = "the pairs that it was trained on are deleted: name others in dataset_id"
        raise


def _reward_model(name: str, settings: Settings) -> ModelRef:
    """Return a reward model; one that is on this machine is looked at.

    Raises:
        InvalidInput: there is no such model, or it is no reward model.
        NotPermitted: the hub id is not among `settings.models.hub_allow`.
    """
    try:
        found = resolve(name, settings)
    except (InvalidInput, NotPermitted) as error:
        error.param = "reward_model"
        raise
    if found.path is not None:
        check_reward_model(found.path)
    return found


def _sample(row: AnsweredPrompt) -> ScoredSample:
    return ScoredSample(
        number=row.number,
        pair_id=row.pair_id,
        prompt=row.prompt,
        base=row.base,
        aligned=row.aligned,
        base_reward=row.base_reward,
        aligned_reward=row.aligned_reward,
    )


def _view(job: Job) -> EvaluationView:
    reward = job.spec["reward_model"]
    is_done = job.status is JobStatus.SUCCEEDED and job.result is not None
    return EvaluationView(
        id=job.id,
        status=job.status,
        phase=job.phase,
        created_at=int(job.created_at),
        finished_at=unix(job.finished_at),
        checkpoint_id=job.spec["checkpoint_id"],
        dataset_id=str(job.dataset_id),
        split=job.spec["split"],
        reward_model=None if reward is None else reward["name"],
        seed=job.seed,
        progress=progress_view(job),
        metadata=job.labels,
        result=EvaluationResult.model_validate(job.result) if is_done else None,
        samples_url=f"/v1/evaluations/{job.id}/samples",
        error=job_error(job.error),
    )
