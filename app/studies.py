"""Studies: the searches that `auto` jobs run, their trials, and what they say."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, Literal, assert_never

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from app.conditional import CONDITIONAL_RESPONSES
from app.deps import ID_PATTERN, TEXT_PATTERN, Config, Db, PageOf, ReadsJobs
from app.responses import ListOf, conditional, etag_matches, list_of, next_page
from app.search_tasks import RaceFound
from app.study_answers import (
    BestView,
    ImportanceView,
    ParetoView,
    Standings,
    best_view,
    pareto_view,
    steps_of,
)
from app.study_bodies import StudyId, TrialNumber
from app.study_process import importance_task, journal_task, parquet_task, run_task
from app.study_rungs import answer_rung, fullest_rung
from app.study_table import csv_text, trial_table
from app.study_tasks import Target
from app.study_views import StudyView, is_provisional, search_summary, study_views
from app.trial_views import TrialDetail, TrialView, trial_detail, trial_view
from core.errors import InvalidInput
from core.lifecycle import JobStatus, TrialStatus
from core.results import SearchSummary
from core.search_files import trials_folder
from models.experiment import StudyRow, TrialRow
from models.job import Job
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.paging import PageQuery
from models.repositories.studies import Measurement, StudyRepository, TrialOrder
from models.session import Database

router = APIRouter(prefix="/studies", tags=["studies"])

Rung = Annotated[
    int | None, Query(ge=0, lt=100, description="compare what was measured at this one")
]
Seconds = Annotated[int | None, Query(ge=0, lt=2**53, description="unix seconds")]


class ExportFormat(StrEnum):
    """In which form all trials are downloaded."""

    CSV = "csv"
    PARQUET = "parquet"
    OPTUNA = "optuna"


def trial_query(
    limit: Annotated[int, Query(ge=1, le=100, description="trials on a page")] = 20,
    after: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="id of the trial before the page")
    ] = None,
    before: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="id of the trial behind the page")
    ] = None,
    order_by: Annotated[
        TrialOrder, Query(description="trials without this value come last")
    ] = TrialOrder.CREATED,
    order: Annotated[
        Literal["asc", "desc"] | None,
        Query(description="default: newest first by `created`, else lowest first"),
    ] = None,
) -> tuple[PageQuery, TrialOrder]:
    """Return which trials are asked for, in which order."""
    usual: Literal["asc", "desc"] = "desc" if order_by is TrialOrder.CREATED else "asc"
    return PageQuery(limit=limit, after=after, before=before, order=order or usual), order_by


TrialsOf = Annotated[tuple[PageQuery, TrialOrder], Depends(trial_query)]


@router.get(
    "",
    operation_id="list_studies",
    response_model=ListOf[StudyView],
    responses=CONDITIONAL_RESPONSES,
)
def list_studies(
    request: Request,
    caller: ReadsJobs,
    database: Db,
    query: PageOf,
    status: Annotated[JobStatus | None, Query(description="of its job")] = None,
    dataset_id: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    model: Annotated[str | None, Query(max_length=512, pattern=TEXT_PATTERN)] = None,
    job_id: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    created_after: Seconds = None,
    created_before: Seconds = None,
) -> Response:
    """List searches, newest first; its ETag makes polling cheap."""
    with database.reading() as session:
        page = StudyRepository(session).page(
            caller.owner_id, query, status=status, dataset_id=dataset_id, model=model,
            job_id=job_id, created_after=created_after, created_before=created_before,
        )  # fmt: skip
        views = study_views(session, page.rows)
    return _page(request, views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{study_id}",
    operation_id="get_study",
    response_model=StudyView,
    responses=CONDITIONAL_RESPONSES,
)
def get_study(request: Request, caller: ReadsJobs, database: Db, study_id: StudyId) -> Response:
    """Return a search with its best feasible trial so far; its ETag makes polling cheap."""
    with database.reading() as session:
        study = ExperimentRepository(session).study(caller.owner_id, study_id)
        view = study_views(session, [study])[0]
    return conditional(request, view)


@router.get(
    "/{study_id}/trials",
    operation_id="list_trials",
    response_model=ListOf[TrialView],
    responses=CONDITIONAL_RESPONSES,
)
def list_trials(
    request: Request,
    caller: ReadsJobs,
    database: Db,
    study_id: StudyId,
    query: TrialsOf,
    state: Annotated[
        list[TrialStatus] | None, Query(description="only these; may be given more than once")
    ] = None,
) -> Response:
    """List the trials of a search; values that change move between pages while it runs."""
    page_query, order_by = query
    with database.reading() as session:
        study = ExperimentRepository(session).study(caller.owner_id, study_id)
        page = StudyRepository(session).trial_page(
            study.id, page_query, order_by=order_by, states=state or ()
        )
        views = [trial_view(row) for row in page.rows]
    return _page(request, views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{study_id}/trials/{number}",
    operation_id="get_trial",
    response_model=TrialDetail,
    responses=CONDITIONAL_RESPONSES,
)
def get_trial(
    request: Request, caller: ReadsJobs, database: Db, study_id: StudyId, number: TrialNumber
) -> Response:
    """Return one trial with its constraints, its way from rung to rung and where its curves are."""
    with database.reading() as session:
        study = ExperimentRepository(session).study(caller.owner_id, study_id)
        studies = StudyRepository(session)
        trial = studies.trial(study.id, number)
        view = trial_detail(trial, study, studies.tasks(trial.id))
    return conditional(request, view)


@router.get(
    "/{study_id}/best",
    operation_id="get_best_trial",
    response_model=BestView,
    responses=CONDITIONAL_RESPONSES,
)
def get_best_trial(
    request: Request, caller: ReadsJobs, database: Db, settings: Config, study_id: StudyId
) -> Response:
    """Return the best trial within the constraints, its ties, and plain DPO beside it.

    There is an answer at any time; `provisional` says whether the search goes on.
    """
    read = _read(database, caller.owner_id, study_id)
    standings = Standings(read.study, read.measured, read.trials)
    verdict = None if read.summary is None else read.summary.winner_trial
    folder = trials_folder(settings.artifact_dir, read.job.id)
    task = standings.race(folder, verdict=verdict)

    def compute() -> bytes:
        race = RaceFound.model_validate_json(run_task(task))
        return best_view(standings, read.job, race, read.summary).model_dump_json().encode()

    views = tuple(standings.view_of(config) for config in standings.configs)
    facts = (read.job.status, read.job.result, read.study.ended_at, read.summary)
    return _computed(request, compute, of=(task, *views, *facts), headers=_JSON)


@router.get(
    "/{study_id}/pareto",
    operation_id="get_pareto_front",
    response_model=ParetoView,
    responses=CONDITIONAL_RESPONSES,
)
def get_pareto_front(
    request: Request, caller: ReadsJobs, database: Db, study_id: StudyId, rung: Rung = None
) -> Response:
    """Return which configurations no other one beats in log-loss, drift and GPU-seconds at once.

    Those that were measured at one rung are compared; without `rung` at the one of `/best`.
    """
    read = _read(database, caller.owner_id, study_id)
    rung = answer_rung(read.measured, read.study.plan) if rung is None else read.rung(rung)
    view = pareto_view(
        read.study, read.measured, read.trials, rung=rung, provisional=read.provisional
    )
    return conditional(request, view)


@router.get(
    "/{study_id}/importance",
    operation_id="get_importance",
    response_model=ImportanceView,
    responses=CONDITIONAL_RESPONSES,
)
def get_importance(
    request: Request,
    caller: ReadsJobs,
    database: Db,
    study_id: StudyId,
    target: Annotated[Target, Query(description="what the best trials have a low one of")] = (
        "log_loss"
    ),
    rung: Rung = None,
) -> Response:
    """Return which parameters set the best trials apart, and which only seem to.

    Those that were measured at one rung are compared; without `rung` where most trials were.
    """
    read = _read(database, caller.owner_id, study_id)
    rung = fullest_rung(read.measured) if rung is None else read.rung(rung)
    there = [one for one in read.measured if one.rung == rung and math.isfinite(one.log_loss)]
    task = importance_task(list(read.trials.values()), there, target)

    def compute() -> bytes:
        found = orjson.loads(run_task(task))
        view = ImportanceView(
            study_id=read.study.id,
            provisional=read.provisional,
            rung=rung,
            steps=steps_of(read.study, rung),
            target=target,
            data=found.pop("parameters"),
            **found,
        )
        return view.model_dump_json().encode()

    return _computed(request, compute, of=(task, rung, read.provisional), headers=_JSON)


_JSON = {"Content-Type": "application/json"}
_CSV = "text/csv; charset=utf-8"
_PARQUET = "application/vnd.apache.parquet"
_LINES = "application/x-ndjson"
_EXPORTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "All trials by number",
        "content": {
            "text/csv": {
                "schema": {"type": "string"},
                "example": "study_id,number,status,label,log_loss\nstudy_01jd8,0,complete,dpo,0.63",
            },
            _PARQUET: {"schema": {"type": "string", "format": "binary"}},
            _LINES: {"schema": {"type": "string"}},
        },
    }
}


@router.get(
    "/{study_id}/export",
    operation_id="export_study",
    response_class=Response,
    responses={**_EXPORTS, **CONDITIONAL_RESPONSES},
)
def export_study(
    request: Request,
    caller: ReadsJobs,
    database: Db,
    study_id: StudyId,
    form: Annotated[
        ExportFormat,
        Query(alias="format", description="`optuna`: a file for `JournalFileBackend`"),
    ] = ExportFormat.CSV,
) -> Response:
    """Download all trials: a table with a row each, or a study that Optuna's own tools open."""
    read = _read(database, caller.owner_id, study_id)
    study, rows = read.study, list(read.trials.values())
    match form:
        case ExportFormat.CSV:
            text = csv_text(trial_table(rows))
            return _file(request, text.encode, of=text, name=f"{study.id}.csv", media=_CSV)
        case ExportFormat.PARQUET:
            table = parquet_task(rows)
            name = f"{study.id}.parquet"
            return _file(request, partial(run_task, table), of=table, name=name, media=_PARQUET)
        case ExportFormat.OPTUNA:
            copy = journal_task(study, rows)
            name = f"{study.id}.optuna.log"
            return _file(request, partial(run_task, copy), of=copy, name=name, media=_LINES)
        case _:
            assert_never(form)


def _file(
    request: Request, compute: Callable[[], bytes], *, of: object, name: str, media: str
) -> Response:
    headers = {
        "Content-Type": media,
        "Content-Disposition": f'attachment; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
    }
    return _computed(request, compute, of=(of,), headers=headers)


@dataclass(frozen=True)
class _Read:
    """All that is stored of a search: its trials by id in the order of their numbers."""

    study: StudyRow
    job: Job
    trials: dict[str, TrialRow]
    measured: list[Measurement]
    summary: SearchSummary | None

    @property
    def provisional(self) -> bool:
        return is_provisional(self.study, self.job)

    def rung(self, number: int) -> int:
        """Return the number of a rung that the search has.

        Raises:
            InvalidInput: it has none of that number.
        """
        last = len(self.study.plan.get("rungs", [])) - 1
        if number > last:
            raise InvalidInput(
                f"rung is {number}; expected 0 to {last}, the rungs of study {self.study.id}",
                param="rung",
                hint="`plan.rungs` of the study says at which steps they are",
            )
        return number


def _read(database: Database, owner_id: str, study_id: str) -> _Read:
    with database.reading() as session:
        experiments = ExperimentRepository(session)
        study = experiments.study(owner_id, study_id)
        job = JobRepository(session).get(owner_id, study.job_id)
        return _Read(
            study=study,
            job=job,
            trials={row.id: row for row in experiments.trials(study.id)},
            measured=StudyRepository(session).measurements([study.id])[study.id],
            summary=search_summary(session, job),
        )


def _page(request: Request, views: list[Any], ids: list[str], *, has_more: bool) -> Response:
    page = list_of(views, ids, has_more=has_more)
    response = conditional(request, page)
    response.headers.update(next_page(request, page))
    return response


def _computed(
    request: Request,
    compute: Callable[[], bytes],
    *,
    of: tuple[object, ...],
    headers: dict[str, str],
) -> Response:
    """Return what is made from `of`, or 304: whoever has it already costs no computation."""
    digest = hashlib.sha256(version("kdpo").encode())
    for part in of:
        text = part.model_dump_json() if isinstance(part, BaseModel) else str(part)
        digest.update(text.encode())
    etag = f'W/"{digest.hexdigest()[:32]}"'
    validators = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=validators)
    return Response(content=compute(), headers=headers | validators)
