"""What people do to searches: begin one, clone it, change its limits, add and repeat trials."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.orm import Session

from app.deps import Config, Db, IfMatch, Queue, WritesJobs
from app.fine_tuning import Cloned, CreateFineTuningJob, queue_fine_tuning
from app.job_verbs import CancelOptions, JobVerbs, NoOptions
from app.job_views import FineTuningJob
from app.responses import check_if_match, json_response, with_etag
from app.search_tasks import LimitsFound, LimitsTask, SettingAnswer, SettingRefused, SettingTask
from app.study_bodies import (
    CloneStudy,
    CloneTrial,
    CreateStudy,
    EnqueueTrial,
    StudyId,
    TrialNumber,
    TrialStrengths,
    UpdateStudy,
)
from app.study_process import run_task
from app.study_quote import workers_for
from app.study_views import StudyView, study_views
from app.trial_views import TrialDetail, trial_detail
from core.errors import Conflict, InvalidInput
from core.methods import Auto, AutoMethod
from models.experiment import StudyRow, TrialRow
from models.job import Job
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.studies import StudyRepository
from models.repositories.study_orders import AskedTrial, StudyOrders
from models.session import Database

router = APIRouter(prefix="/studies", tags=["studies"])

_SETTING: TypeAdapter[Any] = TypeAdapter(SettingAnswer)
_TURNS = 5


# ---------------------------------------------------------------------- new ones


@router.post("", operation_id="create_study", status_code=201, response_model=FineTuningJob)
def create_study(
    caller: WritesJobs, database: Db, queue: Queue, settings: Config, body: CreateStudy
) -> Response:
    """Queue a search: the answer is its job, one with method `auto`.

    The study is there, as `study_id` of the job, when the data are measured and its plan is made.
    """
    asked = CreateFineTuningJob(
        model=body.model, dataset_id=body.dataset_id, method=body.method, seed=body.seed,
        suffix=body.suffix, metadata=body.metadata, auto_start=body.auto_start,
    )  # fmt: skip
    return _made(queue_fine_tuning(caller.owner_id, database, queue, settings, asked))


@router.post(
    "/{study_id}/clone", operation_id="clone_study", status_code=201, response_model=FineTuningJob
)
def clone_study(
    caller: WritesJobs, database: Db, queue: Queue, settings: Config, study_id: StudyId,
    body: CloneStudy | None = None,
) -> Response:  # fmt: skip
    """Queue a search like this one, with what is given in place of its own; the answer is its job.

    It may be made from a search that goes on, has ended or was cancelled.
    """
    body = body or CloneStudy()
    with database.reading() as session:
        study = ExperimentRepository(session).study(caller.owner_id, study_id)
        job = JobRepository(session).get(caller.owner_id, study.job_id)
    asked = CreateFineTuningJob(
        model=body.model or job.model or "",
        dataset_id=body.dataset_id or job.dataset_id,
        method=_merged(body, study, job),
        seed=job.seed if body.seed is None else body.seed,
        suffix=body.suffix,
        metadata=body.metadata,
        auto_start=body.auto_start,
    )
    same_model = body.model in (None, job.model)
    clone = Cloned(
        study.id, warm_start=body.warm_start, model=job.spec["model"] if same_model else None
    )
    return _made(queue_fine_tuning(caller.owner_id, database, queue, settings, asked, clone=clone))


def _merged(body: CloneStudy, study: StudyRow, job: Job) -> AutoMethod:
    """Return the method of a clone.

    Raises:
        RequestValidationError: what is given does not go with what the study has.
    """
    own = job.spec["method"]["auto"]
    merged = {
        "search": study.spec | body.search.model_dump(mode="json", exclude_unset=True),
        "hyperparameters": own["hyperparameters"]
        | body.hyperparameters.model_dump(mode="json", exclude_unset=True),
    }
    try:
        return AutoMethod(type="auto", auto=Auto.model_validate(merged))
    except ValidationError as error:
        found = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        raise RequestValidationError(found, body=merged) from error


def _made(job: FineTuningJob) -> Response:
    return json_response(job, status=201, headers={"Location": f"/v1/fine_tuning/jobs/{job.id}"})


# ------------------------------------------------------------------------ limits


@router.patch("/{study_id}", operation_id="update_study", response_model=StudyView)
def update_study(
    caller: WritesJobs, database: Db, study_id: StudyId, body: UpdateStudy,
    if_match: IfMatch = None,
) -> Response:  # fmt: skip
    """Let a search go on with another budget, shape or number of workers, from its next task on.

    A budget that is spent already ends it there: its job goes on with the best up to now.
    """
    given = body.model_dump(mode="json", exclude_unset=True)
    for _ in range(_TURNS):
        with database.reading() as session:
            study = ExperimentRepository(session).study(caller.owner_id, study_id)
            StudyOrders(session).refuse_ended(study)
            spec = study.spec | given
            workers = workers_for(session, spec)
        found = _limits(study, spec, workers)
        with database.transaction() as session:
            orders = StudyOrders(session)
            locked = orders.lock(caller.owner_id, study_id)
            orders.refuse_ended(locked)
            check_if_match(if_match, study_views(session, [locked])[0])
            if (locked.plan, locked.spec) != (study.plan, study.spec):
                continue  # somebody else changed it meanwhile
            orders.change(locked, spec=spec, plan=found.plan, shape=found.shape)
            session.flush()
            view = study_views(session, [locked])[0]
        return with_etag(view)
    raise Conflict(
        f"study {study_id} was changed {_TURNS} times by others meanwhile",
        code="study_busy",
        hint="read it, and change it again",
        retryable=True,
    )


def _limits(study: StudyRow, spec: dict[str, Any], workers: int) -> LimitsFound:
    task = LimitsTask(
        plan=study.plan,
        gpu_seconds=spec["gpu_seconds"],
        max_trials=spec["max_trials"],
        deadline_seconds=spec["deadline_seconds"],
        shape=spec["shape"],
        workers=workers,
    )
    return LimitsFound.model_validate_json(run_task(task))


# ------------------------------------------------------------------------ trials


@router.post(
    "/{study_id}/trials",
    operation_id="create_trial",
    status_code=201,
    response_model=TrialDetail,
)
def create_trial(
    caller: WritesJobs, database: Db, study_id: StudyId, body: EnqueueTrial
) -> Response:
    """Add a trial by hand: the next free worker of the search takes it before anything else.

    It is compared, goes on to longer rungs and may win like any other.
    """
    study = _open(database, caller.owner_id, study_id)
    return _enqueue(database, caller.owner_id, study, body.arm, body, base=None, status=201)


@router.post(
    "/{study_id}/trials/{number}/clone",
    operation_id="clone_trial",
    status_code=202,
    response_model=TrialDetail,
)
def clone_trial(
    caller: WritesJobs, database: Db, study_id: StudyId, number: TrialNumber, body: CloneTrial
) -> Response:
    """Add a trial of the same pair with some of its strengths changed; it begins at step 0."""
    study = _open(database, caller.owner_id, study_id)
    with database.reading() as session:
        like = StudyRepository(session).trial(study.id, number)
    return _enqueue(database, caller.owner_id, study, like.arm, body, base=like.setting, status=202)


@router.post(
    "/{study_id}/trials/{number}/retry",
    operation_id="retry_trial",
    status_code=202,
    response_model=TrialDetail,
)
def retry_trial(
    caller: WritesJobs,
    database: Db,
    study_id: StudyId,
    number: TrialNumber,
    _body: NoOptions | None = None,
) -> Response:
    """Try a trial again that has failed or was cut by its limit of time, in the same search."""
    with database.transaction() as session:
        orders = StudyOrders(session)
        study = orders.lock(caller.owner_id, study_id)
        orders.refuse_ended(study)
        trial = orders.retry(study, number)
        return _trial(session, study, trial, status=202)


def _open(database: Database, owner_id: str, study_id: str) -> StudyRow:
    """Return a study that takes orders."""
    with database.reading() as session:
        study = ExperimentRepository(session).study(owner_id, study_id)
        StudyOrders(session).refuse_ended(study)
        return study


def _enqueue(
    database: Database,
    owner_id: str,
    study: StudyRow,
    arm: str,
    asked: TrialStrengths,
    *,
    base: dict[str, Any] | None,
    status: int,
) -> Response:
    task = SettingTask(
        plan=study.plan,
        arm=arm,
        strengths=asked.strengths,
        absolute=asked.values is not None,
        base=base,
    )
    found = _SETTING.validate_json(run_task(task))
    if isinstance(found, SettingRefused):
        raise _refusal(found, asked)
    trial = AskedTrial(
        setting=found.setting,
        candidate=found.candidate.model_dump(mode="json"),
        rung=found.rung,
        recommended=found.recommended,
    )
    with database.transaction() as session:
        orders = StudyOrders(session)
        locked = orders.lock(owner_id, study.id)
        orders.refuse_ended(locked)
        return _trial(session, locked, orders.enqueue(locked, arm, trial), status=status)


def _refusal(found: SettingRefused, asked: TrialStrengths) -> InvalidInput:
    way = "values" if asked.values is not None else "factors"
    return InvalidInput(
        found.detail,
        param="arm" if found.param is None else f"{way}.{found.param}",
        hint="`plan.arms` of the study has the arms, its trials what is recommended for them",
    )


def _trial(session: Session, study: StudyRow, trial: TrialRow, *, status: int) -> Response:
    session.flush()
    session.refresh(trial)
    view = trial_detail(trial, study, StudyRepository(session).tasks(trial.id))
    url = f"/v1/studies/{study.id}/trials/{trial.number}"
    return json_response(view, status=status, headers={"Location": url})


# ------------------------------------------------------------------ its job's verbs


def _study_of(session: Session, job: Job) -> StudyView:
    study = ExperimentRepository(session).study_of(job.id)
    assert study is not None, "the job was found by its study"
    return study_views(session, [study])[0]


def _job_of(database: Database, owner_id: str, study_id: str) -> str:
    with database.reading() as session:
        return ExperimentRepository(session).study(owner_id, study_id).job_id


@router.post("/{study_id}/pause", operation_id="pause_study", status_code=202)
def pause_study(
    caller: WritesJobs, database: Db, queue: Queue, study_id: StudyId,
    _body: NoOptions | None = None,
) -> StudyView:  # fmt: skip
    """Pause the job of a search: no trial is started, running ones save what they have and stop."""
    verbs = JobVerbs(database, queue, None)
    return verbs.pause(caller, _job_of(database, caller.owner_id, study_id), _study_of)


@router.post("/{study_id}/resume", operation_id="resume_study", status_code=202)
def resume_study(
    caller: WritesJobs, database: Db, queue: Queue, study_id: StudyId,
    _body: NoOptions | None = None,
) -> StudyView:  # fmt: skip
    """Queue the paused job of a search again: trials go on from where they were."""
    verbs = JobVerbs(database, queue, None)
    return verbs.resume(caller, _job_of(database, caller.owner_id, study_id), _study_of)


@router.post("/{study_id}/cancel", operation_id="cancel_study", status_code=202)
def cancel_study(
    caller: WritesJobs, database: Db, queue: Queue, study_id: StudyId,
    body: CancelOptions | None = None,
) -> StudyView:  # fmt: skip
    """Cancel the job of a search; what it has measured and published stays."""
    verbs = JobVerbs(database, queue, None)
    return verbs.cancel(caller, _job_of(database, caller.owner_id, study_id), _study_of, body)
