"""What a job looks like from outside: one form for all kinds, OpenAI's for fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field
from sqlalchemy.orm import Session

from app.responses import Schema, unix
from core.lifecycle import EventType, JobKind, JobStatus, Phase, StepStatus
from core.methods import Method
from core.results import TrainingResult
from models.experiment import MetricPoint
from models.job import Event, Job, JobStep
from models.repositories.experiments import ExperimentRepository, Made
from models.repositories.job_requests import JobPulse
from models.repositories.jobs import JobRepository
from models.repositories.steps import StepRepository


class Progress(Schema):
    """How far the present part is; `basis` is `prior` until a rate was measured."""

    fraction: float
    unit: str
    done: int
    total: int
    rate: float | None = None
    eta_seconds: float | None = None
    eta_low: float | None = None
    eta_high: float | None = None
    basis: str = "prior"


class QueuePlace(Schema):
    """Where a queued job stands; position 1 is next."""

    position: int | None
    ahead: int
    estimated_start: int | None = None


class JobError(Schema):
    """Why a job failed, or why it is paused and what it waits for."""

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    retryable: bool = False
    phase: str | None = None
    attempt: int | None = None
    errors: tuple[dict[str, Any], ...] = ()
    log_tail: tuple[str, ...] = ()


class Usage(Schema):
    """What a job has used."""

    gpu_seconds: float
    trained_tokens: int | None = None


class JobEstimate(Schema):
    """What the search of a job will take in all, as it was last promised; `at` says when."""

    at: Literal["start", "screened"]
    gpu_seconds: float = Field(description="as likely to be less as to be more")
    gpu_seconds_p90: float


class StepView(Schema):
    """One resumable part of a job."""

    name: str
    status: StepStatus
    started_at: int | None
    finished_at: int | None
    study_id: str | None = None
    recommendation_id: str | None = None


class JobView(Schema):
    """Any job."""

    id: str
    object: str = "job"
    kind: JobKind
    status: JobStatus
    phase: Phase | None
    attempt: int
    attention: list[str]
    created_at: int
    queued_at: int | None
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    heartbeat_at: int | None
    version: int
    progress: Progress | None
    queue: QueuePlace
    steps: list[StepView]
    dataset_id: str | None
    model: str | None
    seed: int
    cancel_requested: bool
    pause_requested: bool
    resumable: bool = Field(description="a pause, or an attempt that ends early, loses no step")
    resume_blocked_reason: str | None
    parent_job_id: str | None = Field(description="the job that this one helps")
    retry_of: str | None = Field(description="the ended job that this one does again")
    usage: Usage
    metadata: dict[str, str]
    error: JobError | None


class AnyJob(JobView):
    """A job of any kind with its result as it was stored."""

    result: dict[str, Any] | None


class FineTuningJob(JobView):
    """OpenAI's `fine_tuning.job` and what kdpo adds to it."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    organization_id: str
    training_file: str | None = None
    validation_file: str | None = None
    method: Method
    suffix: str | None
    fine_tuned_model: str | None
    result_files: tuple[str, ...] = ()
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    trained_tokens: int | None = None
    integrations: tuple[str, ...] = ()
    draft: bool = Field(description="made with `auto_start: false` and not resumed yet")
    dry_run: bool = Field(default=False, description="the job was only checked, and not made")
    estimate: JobEstimate | None = Field(description="null before the search has a plan")
    recommendation_id: str | None
    study_id: str | None
    result: TrainingResult | None = Field(description="set when the job has succeeded")


class EventView(Schema):
    """One stored event; `seq` counts from 1 in each job."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    seq: int
    type: EventType
    level: str
    message: str
    data: dict[str, Any]
    attempt: int
    created_at: int


class MetricView(Schema):
    """Metrics of one step under TRL's names."""

    step: int
    values: dict[str, float | None]
    created_at: int


class MetricsView(Schema):
    """The metric series of one scope."""

    object: Literal["job.metrics"] = "job.metrics"
    job_id: str
    scope: str
    data: list[MetricView]


@dataclass(frozen=True)
class _Beside:
    """What the view of a job shows that is not in the job's own row."""

    place: QueuePlace
    steps: Sequence[JobStep]


class JobViewer(Protocol):
    """Makes a view of a job; where it stands in its queue need not be asked for twice."""

    def __call__(
        self, session: Session, job: Job, /, *, place: QueuePlace | None = None
    ) -> JobView:
        """Return the view."""


def queue_place(session: Session, job: Job | JobPulse) -> QueuePlace:
    """Return where a job stands in its queue."""
    return _place(JobRepository(session).queue_position(job))


def any_job(session: Session, job: Job, /, *, place: QueuePlace | None = None) -> AnyJob:
    """Return the view of a job of any kind."""
    return _any_job(job, _beside(session, [job], place)[job.id])


def any_jobs(session: Session, jobs: Sequence[Job]) -> list[AnyJob]:
    """Return the views of jobs of any kind, with as many queries as for one."""
    beside = _beside(session, jobs)
    return [_any_job(job, beside[job.id]) for job in jobs]


def fine_tuning_job(
    session: Session, job: Job, /, *, place: QueuePlace | None = None
) -> FineTuningJob:
    """Return the view of a training job."""
    made = ExperimentRepository(session).made_by([job]).get(job.id, Made())
    return _fine_tuning_job(job, _beside(session, [job], place)[job.id], made)


def fine_tuning_jobs(session: Session, jobs: Sequence[Job]) -> list[FineTuningJob]:
    """Return the views of training jobs, with as many queries as for one."""
    beside = _beside(session, jobs)
    made = ExperimentRepository(session).made_by(jobs)
    return [_fine_tuning_job(job, beside[job.id], made.get(job.id, Made())) for job in jobs]


def _any_job(job: Job, beside: _Beside) -> AnyJob:
    return AnyJob(**_common(job, beside), result=job.result)


def _fine_tuning_job(job: Job, beside: _Beside, made: Made) -> FineTuningJob:
    succeeded = job.status is JobStatus.SUCCEEDED and job.result is not None
    result = TrainingResult.model_validate(job.result) if succeeded else None
    is_draft = job.status is JobStatus.DRAFT
    shown = _common(job, beside)
    if is_draft:
        shown["status"] = JobStatus.QUEUED  # OpenAI's clients know no drafts
    return FineTuningJob(
        **shown,
        draft=is_draft,
        organization_id=job.owner_id,
        training_file=job.spec.get("training_file") or job.dataset_id,
        method=job.spec["method"],
        suffix=job.spec.get("suffix"),
        fine_tuned_model=None if result is None else result.run.checkpoint_id,
        recommendation_id=made.recommendation_id or job.spec.get("recommendation_id"),
        study_id=made.study_id,
        estimate=_estimate(made.quotes),
        result=result,
    )


def _estimate(quotes: Sequence[Mapping[str, Any]]) -> JobEstimate | None:
    if not quotes:
        return None
    last = quotes[-1]
    return JobEstimate(at=last["at"], gpu_seconds=last["p50"], gpu_seconds_p90=last["p90"])


def event_view(event: Event) -> EventView:
    """Return the view of an event."""
    return EventView(
        id=event.id,
        seq=event.seq,
        type=event.type,
        level=event.level,
        message=event.message,
        data=event.data,
        attempt=event.attempt,
        created_at=int(event.created_at),
    )


def metrics_view(
    job_id: str, scope: str, points: Sequence[tuple[MetricPoint, dict[str, float]]]
) -> MetricsView:
    """Return the view of a metric series: points, and which values of each."""
    data = [
        MetricView(step=point.step, values=values, created_at=int(point.created_at))
        for point, values in points
    ]
    return MetricsView(job_id=job_id, scope=scope, data=data)


def job_error(error: dict[str, Any] | None) -> JobError | None:
    """Return the view of a stored error."""
    return None if error is None else JobError.model_validate(error)


def progress_view(job: Job) -> Progress | None:
    """Return the view of a job's progress; a job that has succeeded is done."""
    if job.progress is None:
        return None
    progress = Progress.model_validate(job.progress)
    if job.status is JobStatus.SUCCEEDED:
        return progress.model_copy(update={"fraction": 1.0, "eta_seconds": 0.0})
    return progress


def _beside(
    session: Session, jobs: Sequence[Job], place: QueuePlace | None = None
) -> dict[str, _Beside]:
    """Read what is beside the jobs' rows; `place` is known of one of them alone."""
    steps = StepRepository(session).of_jobs(jobs)
    ahead = {} if place is not None else JobRepository(session).queue_positions(jobs)
    return {job.id: _Beside(place or _place(ahead.get(job.id)), steps[job.id]) for job in jobs}


def _place(ahead: int | None) -> QueuePlace:
    return QueuePlace(position=None if ahead is None else ahead + 1, ahead=ahead or 0)


def _common(job: Job, beside: _Beside) -> dict[str, Any]:
    """Return the members that every kind of job has."""
    ended = job.status.is_terminal
    progress = progress_view(job)
    finish = None
    if job.status is JobStatus.RUNNING and progress is not None and progress.eta_seconds:
        finish = unix((job.heartbeat_at or job.created_at) + progress.eta_seconds)
    return {
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "phase": job.phase,
        "attempt": job.attempt,
        "attention": job.attention,
        "created_at": int(job.created_at),
        "queued_at": unix(job.queued_at),
        "started_at": unix(job.started_at),
        "finished_at": unix(job.finished_at),
        "estimated_finish": finish,
        "heartbeat_at": unix(job.heartbeat_at),
        "version": job.version,
        "progress": progress,
        "queue": beside.place,
        "steps": [_step(step) for step in beside.steps],
        "dataset_id": job.dataset_id,
        "model": job.model,
        "seed": job.seed,
        "cancel_requested": job.cancel_requested_at is not None,
        "pause_requested": job.pause_requested_at is not None,
        "resumable": not ended,
        "resume_blocked_reason": f"the job has {job.status.value}" if ended else None,
        "parent_job_id": job.parent_id,
        "retry_of": job.spec.get("retry_of"),
        "usage": Usage(gpu_seconds=job.gpu_seconds),
        "metadata": job.labels,
        "error": job_error(job.error),
    }


def _step(step: JobStep) -> StepView:
    result = step.result or {}
    return StepView(
        name=step.name,
        status=step.status,
        started_at=unix(step.started_at),
        finished_at=unix(step.finished_at),
        study_id=result.get("study_id"),
        recommendation_id=result.get("recommendation_id"),
    )
