"""What searches and trials look like from outside."""

from collections.abc import Sequence
from typing import Any, Literal, assert_never

from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session

from app.responses import Schema, unix
from core.lifecycle import EndedBy, JobStatus, StepStatus, TrialStatus
from core.results import SearchSummary
from core.run_spec import CandidateSpec
from core.spec import ObjectiveSpec, PenaltyTerm
from models.experiment import StudyRow, TrialRow
from models.job import Job
from models.repositories.jobs import JobRepository
from models.repositories.steps import StepRepository
from models.repositories.studies import StudyRepository

_TRIAL_EXAMPLE: dict[str, Any] = {
    "id": "trial_01jd9", "object": "trial", "study_id": "study_01jd8", "number": 3,
    "status": "complete", "ended_by": "budget", "origin": "recommended",
    "label": "rbf × jensen_shannon (penalty)",
    "candidate": {
        "objective": {
            "beta": 0.1, "label_smoothing": 0.0,
            "kernel_term": {"kernel": {"type": "rbf", "width": 1.0}, "gamma": 0.1},
            "divergence_term": {
                "mode": "penalty", "divergence": {"type": "jensen_shannon"}, "alpha": 1.0
            },
        },
        "learning_rate": 0.001,
    },
    "log_loss": 0.6112, "drift": 0.031, "feasible": True,
    "metrics": {"standard_error": 0.011, "accuracy": 0.68, "steps": 12.0},
    "gpu_seconds": 9.4, "created_at": 1795441000, "finished_at": 1795441010,
}  # fmt: skip


class TrialView(Schema):
    """One candidate and how it did on the validation pairs."""

    model_config = ConfigDict(json_schema_extra={"examples": [_TRIAL_EXAMPLE]})

    id: str
    object: Literal["trial"] = "trial"
    study_id: str
    number: int
    status: TrialStatus
    ended_by: EndedBy | None
    origin: str = Field(description="why it was tried: `baseline`, `recommended`, `sampler` …")
    label: str = Field(description="`dpo`, or kernel × divergence")
    candidate: dict[str, Any]
    log_loss: float | None = Field(description="calibrated, on validation pairs, nats")
    drift: float | None = Field(description="mean token KL(policy || reference), nats")
    feasible: bool | None
    metrics: dict[str, Any]
    gpu_seconds: float
    created_at: int
    finished_at: int | None


class ConstraintView(Schema):
    """What a trial has to keep; `violation` is at most 0 where it does."""

    name: Literal["drift", "measured"]
    value: float | None
    limit: float | None = Field(description="null: none was set")
    violation: float | None
    kept: bool | None = Field(description="null while the trial has not ended")


class TrialDetail(TrialView):
    """One trial with everything that is known of it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                _TRIAL_EXAMPLE
                | {
                    "job_id": "ftjob-01jd8",
                    "words": "kernel rbf (gamma 0.1) and jensen_shannon as a penalty (alpha 1); "
                    "beta 0.1, learning rate 0.001",
                    "constraints": [
                        {
                            "name": "drift", "value": 0.031, "limit": 0.05, "violation": -0.019,
                            "kept": True,
                        },
                        {
                            "name": "measured", "value": 1.0, "limit": 1.0, "violation": 0.0,
                            "kept": True,
                        },
                    ],
                    "metrics_url": "/v1/jobs/ftjob-01jd8/metrics?scope=trial:3",
                }
            ]
        }
    )  # fmt: skip

    job_id: str
    words: str
    constraints: list[ConstraintView]
    metrics_url: str = Field(description="its training curves, step by step")


class StudyView(Schema):
    """One search."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "study_01jd8", "object": "study", "job_id": "ftjob-01jd8",
                    "status": "running", "provisional": True, "dataset_id": "ds_01jd",
                    "model": "tiny-lm", "seed": 7, "created_at": 1795440900,
                    "spec": {
                        "max_trials": 12, "gpu_seconds": None, "trial_epochs": 0.5,
                        "drift_budget": 0.05,
                    },
                    "trials": {"waiting": 0, "running": 1, "complete": 3, "pruned": 0, "fail": 0},
                    "best_trial": _TRIAL_EXAMPLE, "gpu_seconds": 36.1,
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
    spec: dict[str, Any] = Field(description="its budget, as the job asked for it")
    trials: dict[str, int] = Field(description="how many are in which state")
    best_trial: TrialView | None = Field(description="the lowest feasible log-loss so far")
    gpu_seconds: float


def study_views(session: Session, rows: Sequence[StudyRow]) -> list[StudyView]:
    """Return the views of studies of one owner."""
    ids = [row.id for row in rows]
    studies = StudyRepository(session)
    tallies, best = studies.tallies(ids), studies.best(ids)
    views = []
    for row in rows:
        job = JobRepository(session).get(row.owner_id, row.job_id)
        found = best.get(row.id)
        views.append(
            StudyView(
                id=row.id,
                job_id=row.job_id,
                status=job.status,
                provisional=is_provisional(session, job),
                dataset_id=job.dataset_id,
                model=job.model,
                seed=job.seed,
                created_at=int(row.created_at),
                spec=row.spec,
                trials={s.value: tallies[row.id].counts.get(s, 0) for s in TrialStatus},
                best_trial=None if found is None else trial_view(found),
                gpu_seconds=tallies[row.id].gpu_seconds,
            )
        )
    return views


def is_provisional(session: Session, job: Job) -> bool:
    """Whether the search of a job goes on: neither the job nor its step has ended."""
    if job.status.is_terminal:
        return False
    return not any(
        step.name == "search" and step.status is StepStatus.SUCCEEDED
        for step in StepRepository(session).of_job(job.id)
    )


def search_summary(session: Session, job: Job) -> SearchSummary | None:
    """Return what the search said when it ended; None before, and when it did not get so far."""
    for step in StepRepository(session).of_job(job.id):
        if step.name == "search" and step.result is not None and "summary" in step.result:
            return SearchSummary.model_validate(step.result["summary"])
    return None


def trial_view(row: TrialRow) -> TrialView:
    """Return the view of a trial."""
    return TrialView(**_members(row))


def trial_detail(row: TrialRow, study: StudyRow) -> TrialDetail:
    """Return the view of a trial with its constraints and where its curves are."""
    return TrialDetail(
        **_members(row),
        job_id=study.job_id,
        words=in_words(CandidateSpec.model_validate(row.candidate)),
        constraints=constraints(row, study.spec.get("drift_budget")),
        metrics_url=f"/v1/jobs/{study.job_id}/metrics?scope=trial:{row.number}",
    )


def _members(row: TrialRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "study_id": row.study_id,
        "number": row.number,
        "status": row.status,
        "ended_by": row.ended_by,
        "origin": row.origin,
        "label": CandidateSpec.model_validate(row.candidate).objective.label,
        "candidate": row.candidate,
        "log_loss": row.log_loss,
        "drift": row.drift,
        "feasible": row.feasible,
        "metrics": row.metrics,
        "gpu_seconds": row.gpu_seconds,
        "created_at": int(row.created_at),
        "finished_at": unix(row.finished_at),
    }


def constraints(row: TrialRow, drift_budget: float | None) -> list[ConstraintView]:
    """Return what the trial had to keep: the drift budget, and a log-loss at its end."""
    over = None if drift_budget is None or row.drift is None else row.drift - drift_budget
    ended = _has_ended(row.status)
    measured = float(row.log_loss is not None)
    kept_drift = None if row.drift is None else over is None or over <= 0.0
    return [
        ConstraintView(
            name="drift", value=row.drift, limit=drift_budget, violation=over, kept=kept_drift
        ),
        ConstraintView(
            name="measured",
            value=measured if ended else None,
            limit=1.0,
            violation=1.0 - measured if ended else None,
            kept=measured == 1.0 if ended else None,
        ),
    ]


def _has_ended(status: TrialStatus) -> bool:
    match status:
        case TrialStatus.WAITING | TrialStatus.RUNNING:
            return False
        case TrialStatus.COMPLETE | TrialStatus.PRUNED | TrialStatus.FAIL:
            return True
        case _:
            assert_never(status)


def in_words(candidate: CandidateSpec) -> str:
    """Return a candidate as a person would say it."""
    objective = candidate.objective
    rest = f"beta {objective.beta:.3g}, learning rate {candidate.learning_rate:.3g}"
    if objective.label_smoothing > 0:
        rest += f", label smoothing {objective.label_smoothing:.3g}"
    return f"{_terms(objective)}; {rest}"


def _terms(objective: ObjectiveSpec) -> str:
    if objective.is_plain_dpo:
        return "plain DPO"
    parts = []
    kernel, divergence = objective.kernel_term, objective.divergence_term
    if kernel is not None:
        parts.append(f"kernel {kernel.kernel.type} (gamma {kernel.gamma:.3g})")
    if isinstance(divergence, PenaltyTerm):
        name = divergence.divergence.type
        parts.append(f"{name} as a penalty (alpha {divergence.alpha:.3g})")
    elif divergence is not None:
        parts.append(f"{divergence.divergence.type} as the link")
    return " and ".join(parts)
