"""What searches look like from outside."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session

from app.responses import Schema, unix
from app.study_rungs import Config, answer_rung, configs_at, lowest
from app.trial_views import TRIAL_EXAMPLE, TrialView, trial_at
from core.lifecycle import JobStatus, TrialStatus
from core.results import SearchSummary
from models.experiment import StudyRow
from models.job import Job
from models.repositories.jobs import JobRepository
from models.repositories.searches import SearchRepository
from models.repositories.steps import StepRepository
from models.repositories.studies import Measurement, StudyRepository


class BudgetView(Schema):
    """Limits of a search, whichever comes first; null: no such limit."""

    gpu_seconds: float | None
    max_trials: int | None
    deadline_seconds: float | None


class PlanView(Schema):
    """What a search is going to do, as far as its budget goes (docs/search.md)."""

    shape: str
    budget: BudgetView
    rungs: list[int] = Field(description="steps at which trials are measured; the last: the run")
    arms: list[str] = Field(description="what is compared, in the order of the recommendation")
    screened: int = Field(description="arms of the first rung, plain DPO aside")
    kept: list[int] = Field(description="how many go on from each rung, plain DPO aside")
    leading: int = Field(description="arms whose strengths are drawn, plain DPO aside")
    draws: int = Field(description="settings drawn in each of them")
    repeats: int = Field(description="finalists that get a second seed when too close to tell")
    drift_budget: float | None
    step_seconds: float = Field(description="of a step of plain DPO here, measured at the start")
    score_seconds: float


class StudyView(Schema):
    """One search."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "study_01jd8", "object": "study", "job_id": "ftjob-01jd8",
                    "status": "running", "provisional": True, "dataset_id": "ds_01jd",
                    "model": "tiny-lm", "seed": 7, "created_at": 1795440900,
                    "ended_at": None, "stopped_by": None, "stop_reason": None,
                    "spec": {
                        "max_trials": None, "gpu_seconds": 3600.0, "deadline_seconds": None,
                        "shape": None, "drift_budget": 0.05, "parallelism": 2,
                    },
                    "plan": {
                        "shape": "lean",
                        "budget": {
                            "gpu_seconds": 3600.0, "max_trials": None, "deadline_seconds": None
                        },
                        "rungs": [20, 60, 200, 1000],
                        "arms": ["dpo", "rbf × jensen_shannon", "polynomial × kl"],
                        "screened": 28, "kept": [8, 5, 2], "leading": 2, "draws": 2, "repeats": 0,
                        "drift_budget": 0.05, "step_seconds": 0.4, "score_seconds": 2.1,
                    },
                    "quotes": [
                        {
                            "at": "start", "spent": 0.0, "p50": 3105.2, "p90": 3441.0,
                            "low": 2790.5, "high": 3520.8, "eta": 3105.2, "eta_p90": 3441.0,
                            "tasks": 51, "workers": 1,
                        }
                    ],
                    "helpers": 1, "parallelism": 2, "cloned_from": None,
                    "trials": {"waiting": 20, "running": 1, "complete": 3, "pruned": 0, "fail": 0},
                    "best_trial": TRIAL_EXAMPLE, "gpu_seconds": 36.1, "lost_seconds": 0.0,
                }
            ]
        }
    )  # fmt: skip

    id: str
    object: Literal["study"] = "study"
    job_id: str
    status: JobStatus = Field(description="that of its job, which goes on after the search")
    provisional: bool = Field(description="the search goes on: its best trial may still change")
    dataset_id: str | None
    model: str | None
    seed: int
    created_at: int
    ended_at: int | None = Field(description="end of the search; its job goes on with the winner")
    stopped_by: str | None = Field(description="`finished`, `decided` or `budget`")
    stop_reason: str | None
    spec: dict[str, Any] = Field(description="what was asked for, last")
    plan: PlanView | None = Field(description="null: a search of an old version of kdpo")
    quotes: list[dict[str, Any]] = Field(
        description="what was promised at the `start` and when all arms were `screened`, as "
        "`GET …/quote` has it now"
    )
    helpers: int = Field(description="jobs that work on it besides its own, or are queued to")
    cloned_from: str | None = Field(description="the study that it was made from")
    parallelism: int | None = Field(description="most workers at once; null: all there are")
    trials: dict[str, int] = Field(description="how many are in which state")
    best_trial: TrialView | None = Field(
        description="the lowest feasible log-loss of the highest rung that a pair has reached"
    )
    gpu_seconds: float = Field(description="device time of all ended tasks")
    lost_seconds: float = Field(description="device time of attempts that came to nothing")


def study_views(session: Session, rows: Sequence[StudyRow]) -> list[StudyView]:
    """Return the views of studies of one owner."""
    ids = [row.id for row in rows]
    studies = StudyRepository(session)
    tallies, measured = studies.tallies(ids), studies.measurements(ids)
    best = {row.id: _best(row, measured[row.id]) for row in rows}
    trials = studies.trials(
        [found.seeds[0].trial_id for found in best.values() if found is not None]
    )
    views = []
    for row in rows:
        job = JobRepository(session).get(row.owner_id, row.job_id)
        found = best[row.id]
        views.append(
            StudyView(
                id=row.id,
                job_id=row.job_id,
                status=job.status,
                provisional=is_provisional(row, job),
                dataset_id=job.dataset_id,
                model=job.model,
                seed=job.seed,
                created_at=int(row.created_at),
                ended_at=unix(row.ended_at),
                stopped_by=row.stopped_by,
                stop_reason=row.stop_reason,
                spec=row.spec,
                plan=_plan_view(row),
                quotes=row.quotes,
                helpers=SearchRepository(session).open_helpers(row.job_id),
                cloned_from=job.spec.get("cloned_from"),
                parallelism=row.spec.get("parallelism"),
                trials={s.value: tallies[row.id].counts.get(s, 0) for s in TrialStatus},
                best_trial=None
                if found is None
                else trial_at(
                    trials[found.seeds[0].trial_id], found.seeds[0], feasible=found.feasible
                ),
                gpu_seconds=tallies[row.id].gpu_seconds,
                lost_seconds=tallies[row.id].lost_seconds,
            )
        )
    return views


def budget_view(plan: dict[str, Any]) -> BudgetView | None:
    """Return the budget of a stored plan; searches of old versions have none."""
    if not plan:
        return None
    budget = plan["budget"]
    return BudgetView(
        gpu_seconds=budget["gpu_seconds"],
        max_trials=budget["trials"],
        deadline_seconds=budget["deadline_seconds"],
    )


def _plan_view(study: StudyRow) -> PlanView | None:
    """Return the plan of a study in short; searches of old versions have none."""
    plan, budget = study.plan, budget_view(study.plan)
    if budget is None:
        return None
    return PlanView(
        shape=study.shape,
        budget=budget,
        rungs=plan["rungs"],
        arms=[arm["name"] for arm in plan["arms"]],
        drift_budget=plan["drift_budget"],
        step_seconds=plan["step_seconds"],
        score_seconds=plan["score_seconds"],
        **plan["shape"],
    )


def _best(study: StudyRow, measured: Sequence[Measurement]) -> Config | None:
    return lowest(configs_at(measured, answer_rung(measured, study.plan), study.plan))


def is_provisional(study: StudyRow, job: Job) -> bool:
    """Whether a search goes on: neither it nor its job has ended."""
    return study.ended_at is None and not job.status.is_terminal


def search_summary(session: Session, job: Job) -> SearchSummary | None:
    """Return what the search said when it ended; None before, and when it did not get so far."""
    for step in StepRepository(session).of_job(job.id):
        if step.name == "search" and step.result is not None and "summary" in step.result:
            return SearchSummary.model_validate(step.result["summary"])
    return None
