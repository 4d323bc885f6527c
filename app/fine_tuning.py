"""Fine-tuning jobs in OpenAI's form."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query, Response
from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.checkpoint_views import CheckpointView, checkpoint_view
from app.conditional import CONDITIONAL_RESPONSES, JobAnswers
from app.deps import (
    ID_PATTERN,
    TEXT_PATTERN,
    Config,
    Db,
    Lists,
    PageOf,
    Queue,
    ReadsJobs,
    WritesJobs,
)
from app.events import EVENT_RESPONSES, Events
from app.filters import Filter
from app.job_verbs import CancelOptions, NoOptions, Verbs
from app.job_views import (
    EventView,
    FineTuningJob,
    MetricsView,
    fine_tuning_job,
    fine_tuning_jobs,
)
from app.jobs import JobId, read_metrics
from app.queue import CeleryQueue, relay_now
from app.responses import ListOf
from app.series import Series
from app.training_data import training_data
from core.hub import resolve
from core.lifecycle import JobKind
from core.methods import AutoMethod, DpoMethod, KernelDpoMethod, Method
from core.settings import Settings
from core.spec import SpecModel
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64, pattern=TEXT_PATTERN)],
        Annotated[str, StringConstraints(max_length=512, pattern=TEXT_PATTERN)],
    ],
    Field(max_length=16, description="up to 16 pairs of your own"),
]
Seed = Annotated[int, Field(ge=0, lt=2**31, description="the same seed repeats the run")]
ModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        pattern=TEXT_PATTERN,
        description="a folder on the server, or a hub id",
    ),
]
DatasetId = Annotated[str, Field(pattern=ID_PATTERN)]
Suffix = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class CreateFineTuningJob(SpecModel):
    """What to train, on what, and how."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "tiny-lm", "dataset_id": "ds_01jd", "method": {"type": "auto"}},
                {
                    "model": "Qwen/Qwen2.5-0.5B",
                    "dataset_id": "ds_01jd",
                    "seed": 7,
                    "method": {
                        "type": "kernel_dpo",
                        "kernel_dpo": {
                            "kernel": "rbf",
                            "divergence": "jensen_shannon",
                            "hyperparameters": {"beta": 0.1, "gamma": 0.1},
                        },
                    },
                },
            ]
        }
    )

    model: ModelName
    training_file: DatasetId | None = Field(
        default=None, description="a file of purpose fine-tune, or a dataset"
    )
    dataset_id: DatasetId | None = Field(
        default=None, description="in place of training_file; either is needed"
    )
    method: Method = AutoMethod(type="auto")
    selection: Literal["auto"] | None = Field(
        default=None,
        description="auto: the data and a search choose, as with method auto; for clients whose "
        "methods end at dpo",
    )
    seed: Seed = 0
    suffix: Suffix | None = None
    metadata: Metadata = Field(default_factory=dict)
    auto_start: bool = Field(
        default=True, description="false: a draft, which waits until it is resumed"
    )

    @model_validator(mode="after")
    def _one_dataset(self) -> Self:
        if (self.training_file is None) == (self.dataset_id is None):
            raise ValueError("expected either training_file or dataset_id")
        return self

    @model_validator(mode="after")
    def _selection_is_the_method(self) -> Self:
        if self.selection is None:
            return self
        if self.method not in (DpoMethod(type="dpo"), self.wanted):
            raise ValueError(
                'selection auto goes with method {"type": "dpo"} and nothing in it, or with '
                f"method auto; with this {self.method.type} nothing is left to select: leave out "
                "selection, or send hyperparameters as method auto"
            )
        return self

    @property
    def wanted(self) -> Method:
        """The method that `method` and `selection` name."""
        if self.selection is None or self.method.type == "auto":
            return self.method
        return AutoMethod(type="auto")

    @property
    def data(self) -> str:
        """The id that names the pairs."""
        return self.training_file or self.dataset_id or ""


@dataclass(frozen=True)
class Accepted:
    """The recommendation that a job comes from, and the pinned model that it is of."""

    id: str
    model: dict[str, Any]


@dataclass(frozen=True)
class Cloned:
    """The study that a job is made from; `model` is the pinned one where it stays the same."""

    study_id: str
    warm_start: bool
    model: dict[str, Any] | None


@router.post("", operation_id="create_fine_tuning_job")
def create_fine_tuning_job(
    caller: WritesJobs,
    database: Db,
    queue: Queue,
    settings: Config,
    body: CreateFineTuningJob,
    dry_run: Annotated[
        bool, Query(description="check everything, return the job, and make none")
    ] = False,
) -> FineTuningJob:
    """Queue a fine-tuning job; `auto` measures the data, searches, trains and compares."""
    return queue_fine_tuning(caller.owner_id, database, queue, settings, body, dry_run=dry_run)


def queue_fine_tuning(
    owner_id: str,
    database: Database,
    queue: CeleryQueue,
    settings: Settings,
    body: CreateFineTuningJob,
    *,
    accepted: Accepted | None = None,
    clone: Cloned | None = None,
    dry_run: bool = False,
) -> FineTuningJob:
    """Queue a fine-tuning job; one that an accepted recommendation names has its very model.

    So has a clone, unless it names another one. In a dry run all of it is undone.

    Raises:
        NotFound: no such dataset.
        Conflict: the dataset cannot be used.
        InvalidInput: the model cannot be used.
    """
    with database.reading() as session:
        training_data(session, owner_id, body.data)
    spec = _job_spec(body, settings, accepted or clone)
    with database.transaction() as session:
        data = training_data(session, owner_id, body.data, lock=True)
        job = JobRepository(session).create(
            owner_id=owner_id,
            kind=JobKind.TRAINING,
            spec=spec,
            dataset_id=data.dataset_id,
            model=body.model,
            seed=body.seed,
            metadata=body.metadata,
            after_validation=data.is_validating and body.auto_start,
            draft=not body.auto_start,
        )
        view = fine_tuning_job(session, job)
        if dry_run:
            session.rollback()
    if dry_run:
        return view.model_copy(update={"dry_run": True})
    relay_now(database, queue)
    return view


def _job_spec(
    body: CreateFineTuningJob, settings: Settings, origin: Accepted | Cloned | None
) -> dict[str, Any]:
    """Return what the worker reads, with every model pinned."""
    method = body.wanted
    encoder = None
    if isinstance(method, KernelDpoMethod) and method.kernel_dpo.encoder is not None:
        encoder = resolve(method.kernel_dpo.encoder, settings).model_dump(mode="json")
    spec: dict[str, Any] = {
        "model": resolve(body.model, settings).model_dump(mode="json")
        if origin is None or origin.model is None
        else origin.model,
        "method": method.model_dump(mode="json"),
        "encoder": encoder,
    }
    if body.training_file is not None:
        spec["training_file"] = body.training_file
    if isinstance(origin, Accepted):
        spec["recommendation_id"] = origin.id
    elif origin is not None:
        spec |= {"cloned_from": origin.study_id, "warm_start": origin.warm_start}
    return spec if body.suffix is None else {**spec, "suffix": body.suffix}


@router.get("", operation_id="list_fine_tuning_jobs")
def list_fine_tuning_jobs(
    caller: ReadsJobs, database: Db, query: PageOf, where: Filter, lists: Lists
) -> ListOf[FineTuningJob]:
    """List fine-tuning jobs, newest first."""
    where = replace(where, kind=JobKind.TRAINING)
    with database.reading() as session:
        page = JobRepository(session).page(caller.owner_id, query, where)
        jobs = fine_tuning_jobs(session, page.rows)
    return lists.page(jobs, [job.id for job in jobs], has_more=page.has_more)


@router.get(
    "/{job_id}",
    operation_id="get_fine_tuning_job",
    response_model=FineTuningJob,
    responses=CONDITIONAL_RESPONSES,
)
async def get_fine_tuning_job(caller: ReadsJobs, answers: JobAnswers, job_id: JobId) -> Response:
    """Return one fine-tuning job, with `wait` as soon as it has changed."""
    return await answers.answer(caller, job_id, fine_tuning_job, kind=JobKind.TRAINING)


@router.post("/{job_id}/cancel", operation_id="cancel_fine_tuning_job")
def cancel_fine_tuning_job(
    caller: WritesJobs, verbs: Verbs, job_id: JobId, body: CancelOptions | None = None
) -> FineTuningJob:
    """Cancel a job: at once when it waits, at its next step when it runs."""
    return verbs.cancel(caller, job_id, fine_tuning_job, body, kind=JobKind.TRAINING)


@router.post("/{job_id}/pause", operation_id="pause_fine_tuning_job")
def pause_fine_tuning_job(
    caller: WritesJobs, verbs: Verbs, job_id: JobId, _body: NoOptions | None = None
) -> FineTuningJob:
    """Pause a job: at once when it is queued; one that runs saves what it has at its next step."""
    return verbs.pause(caller, job_id, fine_tuning_job, kind=JobKind.TRAINING)


@router.post("/{job_id}/resume", operation_id="resume_fine_tuning_job")
def resume_fine_tuning_job(
    caller: WritesJobs, verbs: Verbs, job_id: JobId, _body: NoOptions | None = None
) -> FineTuningJob:
    """Queue a paused job again: it goes on where it was. A draft is queued for the first time.

    The `error` of a job that paused itself says why; see to that first.
    """
    return verbs.resume(caller, job_id, fine_tuning_job, kind=JobKind.TRAINING)


@router.get(
    "/{job_id}/events",
    operation_id="list_fine_tuning_events",
    response_model=ListOf[EventView],
    responses=EVENT_RESPONSES,
)
def list_fine_tuning_events(
    caller: ReadsJobs, events: Events, job_id: JobId
) -> Response | ListOf[EventView]:
    """List events of a job, newest first unless `order=asc`, or follow the job in a stream."""
    return events.answer(caller, job_id, fine_tuning_job, kind=JobKind.TRAINING)


@router.get("/{job_id}/checkpoints", operation_id="list_fine_tuning_checkpoints")
def list_fine_tuning_checkpoints(
    caller: ReadsJobs, database: Db, query: PageOf, lists: Lists, job_id: JobId
) -> ListOf[CheckpointView]:
    """List the checkpoints of a job, newest first."""
    with database.reading() as session:
        JobRepository(session).get(caller.owner_id, job_id, kind=JobKind.TRAINING)
        page = ExperimentRepository(session).checkpoint_page(caller.owner_id, query, job_id=job_id)
        views = [checkpoint_view(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get("/{job_id}/metrics", operation_id="get_fine_tuning_metrics")
def get_fine_tuning_metrics(
    caller: ReadsJobs, database: Db, job_id: JobId, series: Series
) -> MetricsView:
    """Return the metric series of one scope of a job."""
    return read_metrics(database, caller.owner_id, job_id, series, kind=JobKind.TRAINING)
