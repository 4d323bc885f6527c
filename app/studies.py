"""Studies: the searches that `auto` jobs run, and their trials."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response

from app.deps import ID_PATTERN, Db, Lists, PageOf, ReadsJobs
from app.responses import ListOf, Schema, conditional, unix
from core.lifecycle import EndedBy, JobStatus, TrialStatus
from models.experiment import TrialRow
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository

router = APIRouter(prefix="/studies", tags=["studies"])

StudyId = Annotated[str, Path(pattern=ID_PATTERN)]


class TrialView(Schema):
    """One candidate and how it did on the validation pairs."""

    id: str
    object: Literal["trial"] = "trial"
    study_id: str
    number: int
    status: TrialStatus
    ended_by: EndedBy | None
    origin: str
    candidate: dict[str, Any]
    log_loss: float | None
    drift: float | None
    feasible: bool | None
    metrics: dict[str, Any]
    gpu_seconds: float
    created_at: int
    finished_at: int | None


class StudyView(Schema):
    """One search."""

    id: str
    object: Literal["study"] = "study"
    job_id: str
    status: JobStatus
    created_at: int
    spec: dict[str, Any]
    trials: dict[str, int]
    best_trial: TrialView | None
    gpu_seconds: float


@router.get("/{study_id}", operation_id="get_study", response_model=StudyView)
def get_study(request: Request, caller: ReadsJobs, database: Db, study_id: StudyId) -> Response:
    """Return a search with its best feasible trial so far."""
    with database.reading() as session:
        experiments = ExperimentRepository(session)
        study = experiments.study(caller.owner_id, study_id)
        trials = experiments.trials(study.id)
        job = JobRepository(session).get(caller.owner_id, study.job_id)
    best = min(
        (t for t in trials if t.log_loss is not None and t.feasible),
        key=lambda t: (t.log_loss, t.number),
        default=None,
    )
    view = StudyView(
        id=study.id,
        job_id=study.job_id,
        status=job.status,
        created_at=int(study.created_at),
        spec=study.spec,
        trials={s.value: sum(t.status is s for t in trials) for s in TrialStatus},
        best_trial=None if best is None else _trial(best),
        gpu_seconds=sum(t.gpu_seconds for t in trials),
    )
    return conditional(request, view)


@router.get("/{study_id}/trials", operation_id="list_trials")
def list_trials(
    caller: ReadsJobs, database: Db, query: PageOf, lists: Lists, study_id: StudyId
) -> ListOf[TrialView]:
    """List the trials of a search, newest first unless `order=asc`."""
    with database.reading() as session:
        experiments = ExperimentRepository(session)
        study = experiments.study(caller.owner_id, study_id)
        page = experiments.trial_page(study.id, query)
        views = [_trial(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


def _trial(row: TrialRow) -> TrialView:
    return TrialView(
        id=row.id,
        study_id=row.study_id,
        number=row.number,
        status=row.status,
        ended_by=row.ended_by,
        origin=row.origin,
        candidate=row.candidate,
        log_loss=row.log_loss,
        drift=row.drift,
        feasible=row.feasible,
        metrics=row.metrics,
        gpu_seconds=row.gpu_seconds,
        created_at=int(row.created_at),
        finished_at=unix(row.finished_at),
    )
