"""The search step: short runs, one after another, until the budget is spent.

The trial's row is written before Optuna is told, and a told trial is never run again: a job
killed between any two lines goes on with the same trials and ends with the same winner.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy, Phase, TrialStatus
from core.profile import Recommendation
from core.results import SearchSummary
from core.run_spec import CandidateSpec, SearchSpec
from core.spec import (
    SpecModel,
)
from models.experiment import StudyRow, TrialRow
from models.repositories.experiments import ExperimentRepository
from selection.search import Proposal, SearchDriver, TrialOutcome, initial_candidates
from selection.winner import FinishedTrial, select_winner
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.ingest.files import atomic_writer, full_disk_as_error
from worker.jobs.runs import RunRequest
from worker.jobs.scopes import Span
from worker.jobs.workbench import Workbench
from worker.training.evaluate import (
    Floats,
    Ints,
    clustered_standard_error,
    pair_groups,
    trial_score,
)
from worker.training.optuna_storage import open_storage

_TRAIN_SHARE = 0.85


class Choice(SpecModel):
    """What a search ends with: its winner, and the best of the plain DPO it saw."""

    winner: CandidateSpec
    baseline: CandidateSpec
    plain_trials: int
    summary: SearchSummary


@dataclass(frozen=True)
class _Finished:
    """How a trial ended, as its row and Optuna are told."""

    outcome: TrialOutcome
    metrics: dict[str, float | str]
    seconds: float
    losses: Floats | None = None


def search(
    bench: Workbench, spec: SearchSpec, recommendation: Recommendation, *, span: Span
) -> Choice:
    """Run the trials that are left and choose the winner.

    Raises:
        RunAborted: no trial ended within the constraints (`budget_exhausted`).
        CancelRequested, Preempted: the attempt was asked to stop.
        LeaseLost: another attempt owns the job.
    """
    context = bench.context
    context.phase(Phase.SEARCHING)
    with context.transaction() as session:
        study = ExperimentRepository(session).ensure_study(
            context.fence, owner_id=context.job.owner_id, spec=spec.model_dump(mode="json")
        )
    stopped_by: Literal["max_trials", "gpu_seconds"] = "max_trials"
    with open_storage(context.settings) as storage:
        driver = SearchDriver(
            storage=storage,
            study_name=study.name,
            initial=initial_candidates(
                recommendation, spec=spec, learning_rate=bench.learning_rate, seed=bench.seed
            ),
            spec=spec,
            learning_rate=bench.learning_rate,
            seed=bench.seed,
        )
        while True:
            if _is_spent(_trials(context, study), spec):
                stopped_by = "gpu_seconds"
                break
            proposal = driver.next()
            if proposal is None:
                break
            part = span.part(proposal.number, spec.max_trials)
            driver.tell(proposal.number, _run_once(bench, study, proposal, spec, span=part))
    rows = _trials(context, study)
    errors = _paired_errors(context, rows, group=pair_groups(bench.pairs[Split.VALIDATION]))
    return _choose(study, rows, stopped_by=stopped_by, paired_errors=errors)


def _is_spent(trials: list[TrialRow], spec: SearchSpec) -> bool:
    """Whether the finished trials used up the device time; one trial at least is always run."""
    finished = [row for row in trials if row.status is not TrialStatus.RUNNING]
    if spec.gpu_seconds is None or not finished or len(finished) < len(trials):
        return False
    return sum(row.gpu_seconds for row in finished) >= spec.gpu_seconds


def _run_once(
    bench: Workbench, study: StudyRow, proposal: Proposal, spec: SearchSpec, *, span: Span
) -> TrialOutcome:
    """Run a trial, or return what an earlier attempt has written down of it."""
    context = bench.context
    context.raise_if_stopped()
    request = RunRequest(
        scope=f"trial:{proposal.number}",
        objective=proposal.candidate.objective,
        learning_rate=proposal.candidate.learning_rate,
        trial_epochs=spec.trial_epochs,
    )
    with context.transaction() as session:
        row = ExperimentRepository(session).start_trial(
            context.fence,
            study,
            number=proposal.number,
            origin=proposal.origin,
            candidate=proposal.candidate.model_dump(mode="json"),
            label=proposal.candidate.objective.label,
        )
    if row.status is not TrialStatus.RUNNING:
        bench.store(request).clear()
        return _told(row)
    finished = _run(bench, request, spec, span=span)
    outcome = finished.outcome
    if finished.losses is not None:
        _write_losses(context, proposal.number, finished.losses)
    with context.transaction() as session:
        ExperimentRepository(session).finish_trial(
            context.fence,
            study,
            number=proposal.number,
            status=outcome.status,
            ended_by=outcome.ended_by,
            log_loss=outcome.log_loss,
            drift=outcome.drift,
            feasible=outcome.feasible,
            metrics=finished.metrics,
            gpu_seconds=finished.seconds,
        )
    bench.store(request).clear()
    return outcome


def _run(bench: Workbench, request: RunRequest, spec: SearchSpec, *, span: Span) -> _Finished:
    run = bench.train(request, span=Span(span.start, span.at(_TRAIN_SHARE)))
    if run.ended_by is not EndedBy.BUDGET:
        return _unusable(run.ended_by, run.message, seconds=run.seconds)
    started = time.monotonic()
    measured = bench.measure(Split.VALIDATION, span=Span(span.at(_TRAIN_SHARE), span.end))
    seconds = run.seconds + time.monotonic() - started
    if not measured.is_finite:
        message = "log-probs on validation are not finite"
        return _unusable(EndedBy.NAN, message, seconds=seconds)
    score = trial_score(measured)
    within = spec.drift_budget is None or score.drift <= spec.drift_budget
    outcome = TrialOutcome(
        log_loss=score.log_loss,
        drift=score.drift,
        feasible=within,
        status=TrialStatus.COMPLETE,
        ended_by=EndedBy.BUDGET,
    )
    metrics: dict[str, float | str] = {
        "standard_error": score.standard_error,
        "accuracy": score.accuracy,
        "chosen_displacement": score.chosen_displacement,
        "steps": float(run.steps),
    }
    metrics |= {f"hmk/{name}": weight for name, weight in (run.mixture_weights or {}).items()}
    return _Finished(outcome=outcome, metrics=metrics, seconds=seconds, losses=score.losses)


def _unusable(ended_by: EndedBy, message: str, *, seconds: float) -> _Finished:
    outcome = TrialOutcome(
        log_loss=None, drift=None, feasible=False, status=TrialStatus.FAIL, ended_by=ended_by
    )
    return _Finished(outcome=outcome, metrics={"message": message}, seconds=seconds)


def _told(row: TrialRow) -> TrialOutcome:
    assert row.ended_by is not None
    return TrialOutcome(
        log_loss=row.log_loss,
        drift=row.drift,
        feasible=bool(row.feasible),
        status=row.status,
        ended_by=row.ended_by,
    )


def _trials(context: JobContext, study: StudyRow) -> list[TrialRow]:
    with context.database.reading() as session:
        return ExperimentRepository(session).trials(study.id)


def _losses_path(context: JobContext, number: int) -> Path:
    return context.job_dir / "trials" / f"{number}.json"


def _write_losses(context: JobContext, number: int, losses: Floats) -> None:
    path = _losses_path(context, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_as_error(path.parent), atomic_writer(path) as file:
        file.write(orjson.dumps(losses.tolist()))


def _paired_errors(context: JobContext, rows: list[TrialRow], *, group: Ints) -> dict[int, float]:
    """Standard errors of (log-loss of a usable trial - the best one's), paired by pair.

    How hard a pair is cancels in the difference. Where the losses of a trial are lost, the error
    is that of independent trials, which is larger, and the job says so.
    """
    usable = {row.number: row for row in rows if row.feasible and row.log_loss is not None}
    if not usable:
        return {}
    losses, lost = {}, []
    for number in usable:
        path = _losses_path(context, number)
        if path.is_file():
            losses[number] = np.array(orjson.loads(path.read_bytes()), dtype=np.float64)
        else:
            lost.append(number)
    if lost:
        context.warn(
            f"The losses of trials {lost} are not on this server; their ties are decided with the "
            "standard errors of independent trials.",
            trials=lost,
        )
    best = min(usable, key=lambda number: (usable[number].log_loss, number))
    alone = {number: float(row.metrics["standard_error"]) for number, row in usable.items()}
    return {
        number: 0.0
        if number == best
        else clustered_standard_error(losses[number] - losses[best], group)
        if number in losses and best in losses
        else math.hypot(alone[number], alone[best])
        for number in usable
    }


def _choose(
    study: StudyRow,
    rows: list[TrialRow],
    *,
    stopped_by: Literal["max_trials", "gpu_seconds"],
    paired_errors: dict[int, float],
) -> Choice:
    candidates = {row.number: CandidateSpec.model_validate(row.candidate) for row in rows}
    selection = select_winner(
        [
            FinishedTrial(
                number=row.number,
                label=candidates[row.number].objective.label,
                log_loss=row.log_loss,
                drift=row.drift,
                feasible=bool(row.feasible),
                standard_error=paired_errors.get(row.number, 0.0),
            )
            for row in rows
        ]
    )
    if selection.winner is None:
        raise RunAborted(
            f"no usable trial: {selection.reason}",
            failure=FailureCode.BUDGET_EXHAUSTED,
            hint="raise drift_budget or max_trials, or lower the learning rate",
        )
    winner = candidates[selection.winner]
    plain = [
        (row.log_loss, row.number)
        for row in rows
        if candidates[row.number].objective.is_plain_dpo and row.log_loss is not None
    ]
    # Plain DPO is always trial 0; where it diverged, the same hyperparameters are the baseline.
    best_plain = candidates[min(plain)[1] if plain else rows[0].number]
    return Choice(
        winner=winner,
        baseline=winner if winner.objective.is_plain_dpo else best_plain,
        plain_trials=len(plain),
        summary=SearchSummary(
            study_id=study.id,
            trials=len(rows),
            infeasible=sum(not row.feasible for row in rows),
            winner_trial=selection.winner,
            tied_trials=selection.tied,
            stopped_by=stopped_by,
            sentence=selection.reason,
        ),
    )
