"""What a search will cost and when it ends, as it looks now."""

from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session

from app.deps import Db, ReadsJobs
from app.responses import Schema
from app.search_tasks import QuoteTask
from app.study_bodies import StudyId
from app.study_process import run_task
from app.study_views import BudgetView, budget_view, is_provisional
from core.lifecycle import JobStatus
from core.queue import QueueName
from models.experiment import StudyRow
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.searches import SearchRepository
from models.repositories.studies import StudyRepository
from models.repositories.workers import WorkerRepository

router = APIRouter(prefix="/studies", tags=["studies"])

_LIVE_S = 60.0


class QuoteView(Schema):
    """What a search will have cost when it ends, and how long that takes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "study.quote", "study_id": "study_01jd8", "status": "running",
                    "provisional": True, "shape": "lean",
                    "budget": {
                        "gpu_seconds": 3600.0, "max_trials": None, "deadline_seconds": None
                    },
                    "workers": 2, "tasks": 31, "spent": 1204.5, "p50": 3105.2, "p90": 3441.0,
                    "low": 2790.5, "high": 3520.8, "elapsed": 640.2, "eta": 980.1,
                    "eta_p90": 1130.4,
                }
            ]
        }
    )  # fmt: skip

    object: Literal["study.quote"] = "study.quote"
    study_id: str
    status: JobStatus = Field(description="that of its job")
    provisional: bool = Field(description="false: the search has ended, and nothing is left to pay")
    shape: str
    budget: BudgetView | None = Field(description="null: a search of an old version of kdpo")
    workers: int = Field(description="how many are counted on from now")
    tasks: int = Field(description="how many are left")
    spent: float = Field(description="device seconds up to now, lost attempts included")
    p50: float = Field(description="device seconds of the whole search, as likely more as less")
    p90: float = Field(description="what it will not pass in 9 of 10 cases")
    low: float = Field(description="what it will pass in 95 of 100 cases")
    high: float = Field(description="what it will not pass in 95 of 100 cases")
    elapsed: float = Field(description="wall seconds since its start")
    eta: float = Field(description="wall seconds left with so many workers, once it goes on")
    eta_p90: float = Field(description="enough in 9 of 10 cases")


@router.get("/{study_id}/quote", operation_id="get_study_quote")
def get_study_quote(
    caller: ReadsJobs,
    database: Db,
    study_id: StudyId,
    workers: Annotated[
        int | None,
        Query(ge=1, le=64, description="null: those that there are, at most `parallelism`"),
    ] = None,
) -> QuoteView:
    """Return what a search will cost in all and when it ends, from what has been timed up to now.

    What was promised at the start and after screening is in `quotes` of the study.
    """
    with database.reading() as session:
        study = ExperimentRepository(session).study(caller.owner_id, study_id)
        job = JobRepository(session).get(caller.owner_id, study.job_id)
        searches = SearchRepository(session)
        tally = StudyRepository(session).tallies([study.id])[study.id]
        facts = tuple(record.facts() for record in searches.records(study.id))
        elapsed = searches.elapsed(study)
        counted = workers or workers_for(session, study.spec)
    provisional = is_provisional(study, job)
    found = (
        _priced(study, facts, elapsed=elapsed, workers=counted)
        if provisional and study.plan
        else _paid(tally.gpu_seconds + tally.lost_seconds, workers=counted)
    )
    if study.ended_at is not None:
        elapsed = study.ended_at - study.created_at
    return QuoteView(
        study_id=study.id, status=job.status, provisional=provisional, shape=study.shape,
        budget=budget_view(study.plan), elapsed=elapsed, **found,
    )  # fmt: skip


def workers_for(session: Session, spec: dict[str, Any]) -> int:
    """Return how many workers there are for a search, at most its `parallelism`, at least one."""
    there = WorkerRepository(session).ready(QueueName.GPU, within_s=_LIVE_S)
    return max(1, min(there, spec.get("parallelism") or there))


def _priced(
    study: StudyRow, facts: tuple[dict[str, Any], ...], *, elapsed: float, workers: int
) -> dict[str, Any]:
    task = QuoteTask(plan=study.plan, facts=facts, elapsed_seconds=elapsed, workers=workers)
    found: dict[str, Any] = orjson.loads(run_task(task))
    return found


def _paid(seconds: float, *, workers: int) -> dict[str, Any]:
    """The quote of a search that has ended: what it has cost."""
    same = dict.fromkeys(("spent", "p50", "p90", "low", "high"), seconds)
    return {**same, "eta": 0.0, "eta_p90": 0.0, "tasks": 0, "workers": workers}
