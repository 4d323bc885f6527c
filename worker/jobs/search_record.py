"""Ended trials of a search in Optuna's own storage, for its own tools.

Optuna records and plots; who trains what is decided and counted in our tables (ADR 0017).
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from core.run_spec import CandidateSpec
from models.experiment import StudyRow, TrialRow
from selection.optuna_copy import TrialRecord, add_to_storage
from worker.context import JobContext
from worker.training.optuna_storage import open_storage


def record_trials(context: JobContext, study: StudyRow, trials: Sequence[TrialRow]) -> None:
    """Add the ended trials that the storage lacks; calling it again changes nothing."""
    ended = {trial.id: trial for trial in trials if trial.finished_at is not None}
    with open_storage(context.settings) as storage:
        add_to_storage(storage, study.name, [_record(trial, study) for trial in ended.values()])


def _record(trial: TrialRow, study: StudyRow) -> TrialRecord:
    limit = study.spec.get("drift_budget")
    over = -1.0 if limit is None or trial.drift is None else trial.drift - limit
    return TrialRecord(
        number=trial.number,
        candidate=CandidateSpec.model_validate(trial.candidate),
        status=trial.status,
        value=trial.log_loss,
        started=_time(trial.created_at),
        finished=None if trial.finished_at is None else _time(trial.finished_at),
        constraints={"drift": over},
        attributes={
            "number": trial.number, "trial_id": trial.id, "origin": trial.origin,
            "arm": trial.arm, "draw": trial.draw, "repeat": trial.repeat, "rung": trial.rung,
            "log_loss": trial.log_loss, "drift": trial.drift, "gpu_seconds": trial.gpu_seconds,
            "ended_by": None if trial.ended_by is None else trial.ended_by.value,
        },
    )  # fmt: skip


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
