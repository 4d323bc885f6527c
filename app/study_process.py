"""Asks a process of its own for what needs numpy, Optuna or Arrow: it loads them, and ends."""

import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import assert_never

from app.search_tasks import LimitsTask, QuoteTask, RaceTask, SettingTask
from app.study_table import Column, trial_table
from app.study_tasks import (
    ColumnCopy,
    ImportanceTask,
    JournalTask,
    MeasuredCandidate,
    ParquetTask,
    Target,
    TrialCopy,
)
from app.trial_views import constraints
from core.errors import FailureCode, RunAborted, Unavailable
from core.logs import scrub
from core.run_spec import CandidateSpec
from models.experiment import StudyRow, TrialRow
from models.repositories.studies import Measurement

_log = logging.getLogger("kdpo.api")

TIME_LIMIT_S = 60.0
_WAIT_S = 30.0
# Each holds some 100 MB and one core: more at once would only be slower.
_SLOTS = threading.BoundedSemaphore(2)


def importance_task(
    rows: Sequence[TrialRow], measured: Sequence[Measurement], target: Target
) -> ImportanceTask:
    """Return the question which parameters made a target low; all were measured at one rung."""
    candidates = {row.id: row.candidate for row in rows}
    values = [(candidates[one.trial_id], _value(one, target)) for one in measured]
    return ImportanceTask(
        target=target,
        trials=tuple(
            MeasuredCandidate(candidate=CandidateSpec.model_validate(candidate), value=value)
            for candidate, value in values
            if value is not None
        ),
    )


def _value(one: Measurement, target: Target) -> float | None:
    match target:
        case "log_loss":
            return one.log_loss
        case "drift":
            return one.drift
        case "gpu_seconds":
            return one.gpu_seconds
        case _:
            assert_never(target)


def journal_task(study: StudyRow, rows: Sequence[TrialRow]) -> JournalTask:
    """Return the study as it is copied for Optuna; our columns become user attributes."""
    return JournalTask(name=study.name, trials=tuple(_copy(row, study) for row in rows))


def _copy(row: TrialRow, study: StudyRow) -> TrialCopy:
    candidate = CandidateSpec.model_validate(row.candidate)
    violations: dict[str, float] = {}
    if row.log_loss is not None:
        drift = constraints(row, study.plan.get("drift_budget"))[0].violation
        over = -1.0 if drift is None else drift
        violations = {"drift": over, "unusable": 0.0 if row.feasible or over > 0.0 else 1.0}
    metrics = {f"metrics.{name}": value for name, value in row.metrics.items()}
    return TrialCopy(
        number=row.number,
        candidate=candidate,
        status=row.status,
        value=row.log_loss,
        started=row.created_at,
        finished=row.finished_at,
        constraints=violations,
        attributes={
            "trial_id": row.id,
            "origin": row.origin,
            "arm": row.arm,
            "draw": row.draw,
            "repeat": row.repeat,
            "rung": row.rung,
            "log_loss": row.log_loss,
            "label": candidate.objective.label,
            "ended_by": None if row.ended_by is None else row.ended_by.value,
            "drift": row.drift,
            "feasible": row.feasible,
            "gpu_seconds": row.gpu_seconds,
            "candidate": candidate.model_dump_json(),
            **metrics,
        },
    )


def parquet_task(rows: Sequence[TrialRow]) -> ParquetTask:
    """Return the table of the trials."""
    return ParquetTask(columns=tuple(_column(column) for column in trial_table(rows)))


def _column(column: Column) -> ColumnCopy:
    return ColumnCopy(name=column.name, kind=column.kind, cells=column.cells)


Question = (
    ImportanceTask | JournalTask | ParquetTask | QuoteTask | LimitsTask | SettingTask | RaceTask
)


def _tool(task: Question) -> str:
    match task:
        case ImportanceTask() | JournalTask() | ParquetTask():
            return "app.study_tool"
        case QuoteTask() | LimitsTask() | SettingTask() | RaceTask():
            return "app.search_tool"
        case _:
            assert_never(task)


def run_task(task: Question) -> bytes:
    """Return the answer of a process of its own.

    Raises:
        Unavailable: two others run for half a minute, or it does not end within a minute.
        RunAborted: it ended with an error, which is in the server's log.
    """
    if not _SLOTS.acquire(timeout=_WAIT_S):
        raise Unavailable(
            "other analyses are being computed", hint="ask again in a minute", code="overloaded"
        )
    try:
        done = subprocess.run(
            # -P: the folder that the API runs in must not be searched for modules.
            [sys.executable, "-P", "-m", _tool(task)],
            input=task.model_dump_json().encode(),
            capture_output=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"the {task.kind} of this study took more than {TIME_LIMIT_S:.0f} seconds",
            hint="ask again when the server is less busy",
        ) from error
    finally:
        _SLOTS.release()
    if done.returncode != 0:
        _log.error("%s: %s", _tool(task), scrub(done.stderr.decode(errors="replace")))
        raise RunAborted(
            f"the {task.kind} of this study could not be computed (exit status {done.returncode})",
            failure=FailureCode.INTERNAL,
            hint="the log of the API says why",
        )
    return done.stdout
