"""What a search says at any time: its best trial, its Pareto front, what mattered."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session

from app.responses import Schema
from app.study_views import TrialView, is_provisional, search_summary, trial_view
from core.lifecycle import JobStatus, TrialStatus
from core.results import Comparison, SearchSummary
from core.run_spec import CandidateSpec
from models.experiment import StudyRow, TrialRow
from models.job import Job
from selection.front import non_dominated
from selection.winner import FinishedTrial, Selection, select_winner

# 97.5 % of a normal distribution lies below it.
_Z = 1.959963984540054


class Gain(Schema):
    """How much lower the best trial's log-loss is than plain DPO's, on validation pairs.

    The interval (95 %) takes the two trials as independent. They share their pairs, so it is too
    wide rather than too narrow; the paired one on test pairs is in `final`.
    """

    log_loss: float = Field(description="plain DPO's minus the best trial's; above 0 is better")
    low: float | None = Field(description="null where a trial has no standard error")
    high: float | None
    basis: Literal["independent"] | None


class BestView(Schema):
    """The answer of a search at any time; final when it is not `provisional`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "study.best", "study_id": "study_01jd8", "job_id": "ftjob-01jd8",
                    "status": "running", "provisional": True, "measured": 3, "best": None,
                    "tied": [], "baseline": None,
                    "gain": {
                        "log_loss": 0.021, "low": -0.004, "high": 0.046, "basis": "independent"
                    },
                    "final": None,
                    "sentence": "So far: trial 3 (rbf × kl (penalty)) has the lowest …",
                }
            ]
        }
    )  # fmt: skip

    object: Literal["study.best"] = "study.best"
    study_id: str
    job_id: str
    status: JobStatus
    provisional: bool
    measured: int = Field(description="complete trials with a log-loss")
    best: TrialView | None
    tied: list[TrialView] = Field(description="not told apart from the best")
    baseline: TrialView | None = Field(description="the best of plain DPO's trials")
    gain: Gain | None = Field(description="null without one of the two, or when they are the same")
    final: Comparison | None = Field(
        description="winner against plain DPO, both trained in full, paired on test pairs"
    )
    sentence: str


class ParetoPoint(Schema):
    """One measured trial in the three objectives, all of which are better when lower."""

    number: int
    label: str
    log_loss: float
    drift: float
    gpu_seconds: float
    feasible: bool
    on_front: bool


class ParetoView(Schema):
    """Which feasible trials no other one beats in quality, drift and cost at once."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "study.pareto", "study_id": "study_01jd8", "provisional": False,
                    "objectives": ["log_loss", "drift", "gpu_seconds"], "front": [3, 0],
                    "left_out": 1,
                    "data": [
                        {
                            "number": 0, "label": "dpo", "log_loss": 0.63, "drift": 0.02,
                            "gpu_seconds": 7.1, "feasible": True, "on_front": True,
                        }
                    ],
                }
            ]
        }
    )  # fmt: skip

    object: Literal["study.pareto"] = "study.pareto"
    study_id: str
    provisional: bool
    objectives: tuple[Literal["log_loss", "drift", "gpu_seconds"], ...] = (
        "log_loss",
        "drift",
        "gpu_seconds",
    )
    front: list[int] = Field(description="numbers of its trials, lowest log-loss first")
    data: list[ParetoPoint] = Field(description="all measured trials by number")
    left_out: int = Field(description="trials without a measurement to compare")


class ParameterView(Schema):
    """One parameter; `share` adds up to 1 over those that have an importance."""

    name: str
    trials: int = Field(description="measured trials that use it")
    importance: float | None
    share: float | None
    noise: float | None = Field(description="what shuffled results reach in 5 of 100 cases")
    above_noise: bool | None
    reason: str | None = Field(description="why it has no importance")


class ImportanceView(Schema):
    """What set the best trials apart (PED-ANOVA); no figures when there are too few trials."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "study.importance", "study_id": "study_01jd8", "provisional": False,
                    "target": "log_loss", "method": "ped_anova", "trials": 40, "needed": 20,
                    "top_share": 0.125,
                    "data": [
                        {
                            "name": "beta", "trials": 40, "importance": 0.051, "share": 0.62,
                            "noise": 0.018, "above_noise": True, "reason": None,
                        }
                    ],
                    "sentence": "More than shuffled results would, the best 12% of 40 trials by "
                    "log_loss are set apart by: beta.",
                }
            ]
        }
    )  # fmt: skip

    object: Literal["study.importance"] = "study.importance"
    study_id: str
    provisional: bool
    target: Literal["log_loss", "drift", "gpu_seconds"]
    method: Literal["ped_anova"] = "ped_anova"
    trials: int
    needed: int
    top_share: float | None = Field(description="which share of the trials counts as the best")
    data: list[ParameterView]
    sentence: str


def best_view(session: Session, study: StudyRow, job: Job, rows: Sequence[TrialRow]) -> BestView:
    """Return the best feasible trial, its ties and plain DPO beside it.

    Once the search has ended its own verdict stands; before, or when it was stopped, the same rule
    is applied to what is there, with the standard errors of independent trials.
    """
    by_number = {row.number: row for row in rows}
    measured = [row for row in rows if _is_measured(row)]
    verdict = _verdict(search_summary(session, job), measured)
    provisional = is_provisional(session, job)
    best = None if verdict.winner is None else by_number.get(verdict.winner)
    plain = [row for row in measured if _candidate(row).objective.is_plain_dpo]
    baseline = min(plain, key=lambda row: (row.log_loss, row.number), default=None)
    return BestView(
        study_id=study.id,
        job_id=job.id,
        status=job.status,
        provisional=provisional,
        measured=len(measured),
        best=None if best is None else trial_view(best),
        tied=[trial_view(by_number[number]) for number in verdict.tied if number in by_number],
        baseline=None if baseline is None else trial_view(baseline),
        gain=_gain(best, baseline),
        final=_final(job.result),
        sentence=f"So far: {verdict.reason}" if provisional else verdict.reason,
    )


def _verdict(summary: SearchSummary | None, measured: Sequence[TrialRow]) -> Selection:
    if summary is not None:
        return Selection(
            winner=summary.winner_trial, tied=summary.tied_trials, reason=summary.sentence
        )
    usable = [row for row in measured if row.feasible]
    lowest = min(usable, key=lambda row: (row.log_loss, row.number), default=None)
    return select_winner(
        [
            FinishedTrial(
                number=row.number,
                label=_candidate(row).objective.label,
                log_loss=row.log_loss,
                drift=row.drift,
                feasible=bool(row.feasible),
                standard_error=0.0 if lowest is None else _error_of_difference(row, lowest) or 0.0,
            )
            for row in measured
        ]
    )


def _is_measured(row: TrialRow) -> bool:
    return row.status is TrialStatus.COMPLETE and row.log_loss is not None


def _candidate(row: TrialRow) -> CandidateSpec:
    return CandidateSpec.model_validate(row.candidate)


def _error_of_difference(one: TrialRow, other: TrialRow) -> float | None:
    """Standard error of two independent trials' difference; None where one of them has none."""
    if one.number == other.number:
        return 0.0
    errors = [row.metrics.get("standard_error") for row in (one, other)]
    found = [float(error) for error in errors if isinstance(error, int | float)]
    return math.hypot(*found) if len(found) == len(errors) else None


def _gain(best: TrialRow | None, baseline: TrialRow | None) -> Gain | None:
    if best is None or baseline is None or best.number == baseline.number:
        return None
    if best.log_loss is None or baseline.log_loss is None:
        return None
    value = baseline.log_loss - best.log_loss
    error = _error_of_difference(best, baseline)
    if error is None:
        return Gain(log_loss=value, low=None, high=None, basis=None)
    return Gain(
        log_loss=value, low=value - _Z * error, high=value + _Z * error, basis="independent"
    )


def _final(result: dict[str, Any] | None) -> Comparison | None:
    found = None if result is None else result.get("comparison")
    return None if found is None else Comparison.model_validate(found)


def pareto_view(study: StudyRow, rows: Sequence[TrialRow], *, provisional: bool) -> ParetoView:
    """Return the front of the feasible trials, and all measured ones as points."""
    placed = [
        (row, (row.log_loss, row.drift, row.gpu_seconds))
        for row in rows
        if row.status is TrialStatus.COMPLETE and row.log_loss is not None and row.drift is not None
    ]
    feasible = [(row, point) for row, point in placed if row.feasible]
    kept = non_dominated([point for _, point in feasible])
    front = sorted(
        (feasible[index][0] for index in kept), key=lambda row: (row.log_loss, row.number)
    )
    numbers = {row.number for row in front}
    return ParetoView(
        study_id=study.id,
        provisional=provisional,
        front=[row.number for row in front],
        data=[
            ParetoPoint(
                number=row.number,
                label=_candidate(row).objective.label,
                log_loss=log_loss,
                drift=drift,
                gpu_seconds=gpu_seconds,
                feasible=bool(row.feasible),
                on_front=row.number in numbers,
            )
            for row, (log_loss, drift, gpu_seconds) in placed
        ],
        left_out=len(rows) - len(placed),
    )
