"""What trials of a search look like from outside."""

from collections.abc import Sequence
from typing import Any, Literal, assert_never

from pydantic import ConfigDict, Field

from app.responses import Schema, unix
from core.lifecycle import EndedBy, TaskStatus, TrialStatus
from core.run_spec import CandidateSpec
from core.spec import ObjectiveSpec, PenaltyTerm
from models.experiment import StudyRow, TaskRow, TrialRow
from models.repositories.studies import Measurement

TRIAL_EXAMPLE: dict[str, Any] = {
    "id": "trial_01jd9", "object": "trial", "study_id": "study_01jd8", "number": 3,
    "status": "complete", "ended_by": "budget", "origin": "incumbent",
    "arm": "rbf × jensen_shannon", "draw": 2, "repeat": 0, "rung": 3,
    "setting": {"learning_rate": 1.4, "beta": 0.8, "gamma": 1.0, "alpha": 2.1, "mixture": None},
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

    model_config = ConfigDict(json_schema_extra={"examples": [TRIAL_EXAMPLE]})

    id: str
    object: Literal["trial"] = "trial"
    study_id: str
    number: int
    status: TrialStatus = Field(
        description="`waiting`: for a worker, or measured at its rung and may go on; `pruned`: the "
        "search ended before it went on, or its limit of time did"
    )
    ended_by: EndedBy | None
    origin: str = Field(
        description="why it was tried: `baseline`, `screen`, drawn from `prior`, `incumbent` or "
        "`uniform`, `repeat` with another seed, asked for by `hand`"
    )
    arm: str = Field(description="the pair, or plain DPO, whose strengths it varies")
    draw: int = Field(description="0: as recommended; else the number of the setting in its arm")
    repeat: int = Field(description="0: the seed of the search; else another one")
    rung: int | None = Field(description="the highest that it has reached; its figures are of it")
    setting: dict[str, Any] = Field(description="factors on the strengths recommended for its arm")
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


class TaskView(Schema):
    """A trial on its way to a rung: from step `start` to `stop`."""

    rung: int
    start: int
    stop: int
    status: TaskStatus
    reason: str = Field(description="why it was started")
    ended_by: EndedBy | None = Field(description="`budget`: the rung was reached")
    message: str | None = Field(description="why it was not reached")
    job_id: str | None = Field(description="who trained it: the job itself, or one that helps it")
    seconds: float = Field(description="device seconds of the last attempt")
    lost_seconds: float = Field(description="device seconds of attempts that came to nothing")
    losses: int = Field(description="workers that were lost with it")
    limit_seconds: float | None = Field(description="after which it is cut; null: no limit")
    log_loss: float | None
    drift: float | None
    started_at: int | None
    finished_at: int | None


class TrialDetail(TrialView):
    """One trial with everything that is known of it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                TRIAL_EXAMPLE
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
                    "tasks": [
                        {
                            "rung": 3, "start": 200, "stop": 1000, "status": "ended",
                            "reason": "among the best at step 200", "ended_by": "budget",
                            "message": None, "job_id": "ftjob-01jd8", "seconds": 9.4,
                            "lost_seconds": 0.0, "losses": 0, "limit_seconds": 21.5,
                            "log_loss": 0.6112, "drift": 0.031, "started_at": 1795441000,
                            "finished_at": 1795441010,
                        }
                    ],
                }
            ]
        }
    )  # fmt: skip

    job_id: str
    words: str
    constraints: list[ConstraintView]
    metrics_url: str = Field(description="its training curves, step by step")
    tasks: list[TaskView] = Field(description="its way from rung to rung, lowest first")


def trial_view(row: TrialRow) -> TrialView:
    """Return the view of a trial."""
    return TrialView(**_members(row))


def trial_at(row: TrialRow, measured: Measurement, *, feasible: bool) -> TrialView:
    """Return the view of a trial with its figures at a rung that it has come to."""
    return trial_view(row).model_copy(
        update={
            "rung": measured.rung, "log_loss": measured.log_loss, "drift": measured.drift,
            "feasible": feasible, "metrics": measured.metrics,
            "gpu_seconds": measured.gpu_seconds,
        }
    )  # fmt: skip


def trial_detail(row: TrialRow, study: StudyRow, tasks: Sequence[TaskRow]) -> TrialDetail:
    """Return the view of a trial with its constraints, its tasks and where its curves are."""
    return TrialDetail(
        **_members(row),
        job_id=study.job_id,
        words=in_words(CandidateSpec.model_validate(row.candidate)),
        constraints=constraints(row, study.plan.get("drift_budget")),
        metrics_url=f"/v1/jobs/{study.job_id}/metrics?scope=trial:{row.number}",
        tasks=[_task_view(task, study) for task in tasks],
    )


def _task_view(task: TaskRow, study: StudyRow) -> TaskView:
    return TaskView(
        rung=task.rung,
        start=task.start,
        stop=study.plan["rungs"][task.rung],
        status=task.status,
        reason=task.reason,
        ended_by=task.ended_by,
        message=task.metrics.get("message"),
        job_id=task.job_id,
        seconds=task.seconds,
        lost_seconds=task.lost_seconds,
        losses=task.losses,
        limit_seconds=task.limit_seconds,
        log_loss=task.log_loss,
        drift=task.drift,
        started_at=unix(task.started_at),
        finished_at=unix(task.finished_at),
    )


def _members(row: TrialRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "study_id": row.study_id,
        "number": row.number,
        "status": row.status,
        "ended_by": row.ended_by,
        "origin": row.origin,
        "arm": row.arm,
        "draw": row.draw,
        "repeat": row.repeat,
        "rung": row.rung,
        "setting": row.setting,
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
