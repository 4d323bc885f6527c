"""The search step of an `auto` job: its plan, its tasks, and whom it chooses in the end.

Every part is a row before the next begins: a job killed between any two lines goes on with the
same tasks and, with the same results, ends with the same winner.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import orjson
from pydantic import Field

from core.errors import FailureCode, RunAborted
from core.lifecycle import Phase
from core.profile import Recommendation
from core.results import SearchSummary
from core.run_spec import CandidateSpec, SearchSpec
from core.seeds import levels
from core.spec import SpecModel
from models.experiment import StudyRow, TrialRow
from models.repositories.experiments import ExperimentRepository
from models.repositories.searches import SearchRepository, TaskRecord
from selection.rungs import answer
from selection.study import Plan, Study, ruled_out
from selection.winner import FinishedTrial, select_winner
from selection.wire import plan_from_json, plan_to_json
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.past import carry_over
from worker.jobs.runs import RunRequest
from worker.jobs.scopes import Span
from worker.jobs.search_losses import losses_path
from worker.jobs.search_plan import make_plan
from worker.jobs.search_record import record_trials
from worker.jobs.search_tasks import scope_of, work
from worker.jobs.search_turns import known
from worker.jobs.workbench import Workbench
from worker.training.evaluate import Floats, pair_groups

_PREPARED = 0.1


class Choice(SpecModel):
    """What a search ends with: its winner, and the best of the plain DPO it saw.

    `adopts` names the trials that are already the whole runs of the winner and of plain DPO.
    """

    winner: CandidateSpec
    baseline: CandidateSpec
    plain_trials: int
    adopts: dict[str, str] = Field(default={})
    summary: SearchSummary


def search(
    bench: Workbench, spec: SearchSpec, recommendation: Recommendation, *, span: Span
) -> Choice:
    """Do the tasks that are left, with whoever helps, and choose the winner.

    Raises:
        RunAborted: no trial ended within the constraints (`budget_exhausted`).
        CancelRequested, Preempted: the attempt was asked to stop.
        LeaseLost: another attempt owns the job.
    """
    context = bench.context
    context.phase(Phase.SEARCHING)
    bench.prepare(Span(span.start, span.at(_PREPARED)))
    study = _study(bench, spec, recommendation)
    work(bench, study.id, span=Span(span.at(_PREPARED), span.end), patience_s=None)
    context.raise_if_stopped()
    with context.database.reading() as session:
        repository = SearchRepository(session)
        study = repository.of(study.id)
        state, records = known(repository, study)
    record_trials(context, study, [record.trial for record in records])
    choice = _choose(bench, study, state, records)
    _clear(bench, records, kept=set(choice.adopts.values()))
    return choice


def _study(bench: Workbench, spec: SearchSpec, recommendation: Recommendation) -> StudyRow:
    context = bench.context
    with context.database.reading() as session:
        study = ExperimentRepository(session).study_of(context.fence.job_id)
    if study is not None:
        return study
    shape, plan = make_plan(bench, spec, recommendation)
    with context.transaction() as session:
        study = SearchRepository(session).create(
            context.fence, owner_id=context.job.owner_id, spec=spec.model_dump(mode="json"),
            plan=plan_to_json(plan), shape=shape,
        )  # fmt: skip
        carry_over(context, session, study, plan)
        return study


# ------------------------------------------------------------------ the winner


@dataclass(frozen=True)
class Config:
    """A configuration that may win: its trials at the rung that counts, one of each seed.

    `log_losses` are those of its seeds by number, `log_loss` what they come to on one level of
    seeds. `drift` is the largest over seeds, `own_drift` that of the search's own. `losses` are
    those of (seeds, pairs), None where some of them are not on this server.
    """

    trials: tuple[TrialRow, ...]
    log_losses: dict[int, float]
    log_loss: float
    drift: float
    own_drift: float
    feasible: bool
    losses: Floats | None

    @property
    def trial(self) -> TrialRow:
        """The trial with the search's own seed."""
        return self.trials[0]


def _choose(
    bench: Workbench, study: StudyRow, state: Study, records: Sequence[TaskRecord]
) -> Choice:
    plan = plan_from_json(study.plan)
    best_so_far = answer(plan, state)
    rung = best_so_far.rung
    if rung is None and not records:
        return _untried(study, plan, best_so_far.candidate)
    if rung is None:
        raise RunAborted(
            f"no usable trial: none of {len({r.trial.id for r in records})} ended with a log-loss "
            f"within the constraints ({study.stop_reason})",
            failure=FailureCode.BUDGET_EXHAUSTED,
            hint="raise drift_budget or the budget of the search, or lower the learning rate",
        )
    out = ruled_out(plan, state)
    usable = [
        config
        for config in _configs(bench.context, plan, records, rung)
        if (config.trial.arm, config.trial.draw, 0) not in out
    ]
    configs = within_budget(plan, usable)
    group = pair_groups(bench.pairs[Split.VALIDATION])
    selection = select_winner(_finished(configs), group)
    assert selection.winner is not None, "a rung that was reached has a feasible trial"
    by_number = {config.trial.number: config for config in configs}
    winner = by_number[selection.winner]
    plain = [config for config in configs if config.trial.arm == plan.plain.name]
    best = baseline_of(plain)
    wins = CandidateSpec.model_validate(winner.trial.candidate)
    baseline = plan.plain.candidate if best is None else best.trial.candidate
    adopts = {"train": scope_of(winner.trial.number)} if rung == plan.last else {}
    if best is not None and rung == plan.last:
        adopts["baseline"] = scope_of(best.trial.number)
    return Choice(
        winner=wins,
        baseline=wins
        if wins.objective.is_plain_dpo
        else CandidateSpec.model_validate(baseline, from_attributes=True),
        plain_trials=len({r.trial.id for r in records if r.trial.arm == plan.plain.name}),
        adopts=adopts,
        summary=SearchSummary(
            study_id=study.id,
            trials=len({r.trial.id for r in records}),
            infeasible=len({r.trial.id for r in records if r.trial.feasible is False}),
            winner_trial=selection.winner,
            tied_trials=selection.tied,
            stopped_by=cast('Literal["finished", "decided", "budget"]', study.stopped_by),
            sentence=selection.reason,
        ),
    )


def _untried(study: StudyRow, plan: Plan, recommended: CandidateSpec) -> Choice:
    """What is chosen where the budget has paid for nothing: the recommendation."""
    return Choice(
        winner=recommended,
        baseline=plan.plain.candidate,
        plain_trials=0,
        summary=SearchSummary(
            study_id=study.id, trials=0, infeasible=0, winner_trial=None, tied_trials=(),
            stopped_by="budget",
            sentence=f"No trial was made ({study.stop_reason}): "
            f"{recommended.objective.label} is what the metrics recommend.",
        ),
    )  # fmt: skip


def _configs(
    context: JobContext, plan: Plan, records: Sequence[TaskRecord], rung: int
) -> list[Config]:
    """Configurations that were measured at a rung."""
    found: dict[tuple[str, int], list[TaskRecord]] = defaultdict(list)
    seeds: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for record in sorted(records, key=lambda r: (r.trial.repeat, r.trial.number)):
        if record.task.rung == rung and record.task.log_loss is not None:
            found[record.trial.arm, record.trial.draw].append(record)
            seeds[record.trial.arm, record.trial.draw][record.trial.repeat] = record.task.log_loss
    configs, lost = [], []
    for (key, tasks), log_loss in zip(found.items(), levels(list(seeds.values())), strict=True):
        losses = [_losses(context, task) for task in tasks]
        known_losses = [each for each in losses if each is not None]
        if len(known_losses) < len(losses):
            lost += [task.trial.number for task in tasks]
        drifts = [math.inf if task.task.drift is None else task.task.drift for task in tasks]
        drift = max(drifts)
        configs.append(
            Config(
                trials=tuple(task.trial for task in tasks),
                log_losses=seeds[key],
                log_loss=log_loss,
                drift=drift,
                own_drift=drifts[0],
                feasible=plan.drift_budget is None or drift <= plan.drift_budget,
                losses=np.stack(known_losses) if len(known_losses) == len(losses) else None,
            )
        )
    if lost:
        context.warn(
            f"The losses of trials {lost} are not on this server; their ties are decided with the "
            "standard errors of independent trials.",
            trials=lost,
        )
    return configs


def baseline_of(plain: Sequence[Config]) -> Config | None:
    """The best of plain DPO, within the drift budget where any is."""
    return min(plain, key=lambda c: (not c.feasible, c.log_loss, c.trial.number), default=None)


def within_budget(plan: Plan, configs: list[Config]) -> list[Config]:
    """Where second seeds take everybody beyond the drift budget, the search's own one counts.

    Its weights are those that are published.
    """
    limit = plan.drift_budget
    if limit is None or any(config.feasible for config in configs):
        return configs
    return [replace(c, drift=c.own_drift, feasible=c.own_drift <= limit) for c in configs]


def _losses(context: JobContext, record: TaskRecord) -> Floats | None:
    path = losses_path(context, record.trial.number, record.task.rung)
    if not path.is_file():
        return None
    return np.array(orjson.loads(path.read_bytes()), dtype=np.float64)


def _finished(configs: Sequence[Config]) -> list[FinishedTrial]:
    """Trials as the winner is chosen from."""
    usable = [config for config in configs if config.feasible]
    best = min(usable, key=lambda config: (config.log_loss, config.trial.number))
    return [
        FinishedTrial(
            number=config.trial.number,
            label=CandidateSpec.model_validate(config.trial.candidate).objective.label,
            log_losses=config.log_losses,
            drift=config.drift,
            feasible=config.feasible,
            standard_error=_independent_error(config, best),
            losses=config.losses,
        )
        for config in configs
    ]


def _independent_error(config: Config, best: Config) -> float:
    """Standard error of (log-loss - the best one's) as if they shared no pairs: too large."""
    if config is best:
        return 0.0
    return math.hypot(*(float(each.trial.metrics["standard_error"]) for each in (config, best)))


def _clear(bench: Workbench, records: Sequence[TaskRecord], *, kept: set[str]) -> None:
    """Remove the resume points of all trials that no final run goes on from."""
    for trial in {record.trial.id: record.trial for record in records}.values():
        if scope_of(trial.number) not in kept:
            clear_trial(bench, trial)


def clear_trial(bench: Workbench, trial: TrialRow) -> None:
    """Remove the resume points of a trial."""
    candidate = CandidateSpec.model_validate(trial.candidate)
    bench.store(
        RunRequest(scope_of(trial.number), candidate.objective, candidate.learning_rate)
    ).clear()
