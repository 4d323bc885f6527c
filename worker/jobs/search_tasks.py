"""Tasks of a search: claimed one at a time by whoever is free, run, and written down.

The decision what comes next and the row that says who does it are one transaction under the lock
of the study (docs/decisions/0017), so that no task is done twice and none is forgotten. A killed
worker's task waits again as soon as its attempt has ended, and goes on from its last point.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import assert_never

from sqlalchemy.orm import Session

from core.lifecycle import EndedBy, JobKind
from core.queue import QueueName
from models.experiment import StudyRow
from models.repositories.jobs import JobRepository
from models.repositories.searches import SearchRepository, TaskEnd, TaskRecord, TrialKey
from models.repositories.workers import WorkerRepository
from selection.quote import Quote, quote
from selection.rungs import decide
from selection.study import Plan, Running, Start, Stop, Study, Wait
from selection.wire import TaskFacts, plan_from_json, setting_to_json, study_of
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.runs import RunRequest
from worker.jobs.scopes import TRIAL_SCOPE, ScopeHooks, Span
from worker.jobs.search_losses import write_groups, write_losses
from worker.jobs.workbench import Workbench
from worker.training.evaluate import Floats, trial_score
from worker.training.run import Ended, RunOutcome

log = logging.getLogger("kdpo.search")

MAX_TASK_LOSSES = 3
"""Workers that a task may take with it before it is given up."""
WAIT_S = 0.5
SPEND_EVERY_S = 1.0
_TRAIN_SHARE = 0.85
_HELPER_PRIORITY = -1
_LIVE_S = 60.0


@dataclass(frozen=True)
class Sight:
    """How far a search is: tasks done and expected in all, and the part of its price that is spent.

    `eta` are wall seconds with one worker, as likely too short as too long, and in 9 of 10 cases
    enough.
    """

    done: int
    tasks: int
    fraction: float
    eta: float
    eta_p90: float


@dataclass(frozen=True)
class Claimed:
    """A task that is now this attempt's; `after` is the fraction when it has ended."""

    study: StudyRow
    plan: Plan
    record: TaskRecord
    start: Start
    sight: Sight
    after: float


@dataclass(frozen=True)
class Waiting:
    """What comes next depends on tasks that others have."""

    sight: Sight


@dataclass(frozen=True)
class Closed:
    """The search takes no more tasks: it has ended, or its job has stopped."""


Turn = Claimed | Waiting | Closed


def scope_of(number: int) -> str:
    """Name of a trial's metrics and points."""
    return f"{TRIAL_SCOPE}{number}"


def known(repository: SearchRepository, study: StudyRow) -> tuple[Study, list[TaskRecord]]:
    """All that is known of a search, as a value and as rows."""
    records = repository.records(study.id)
    facts = [TaskFacts(**record.facts()) for record in records]
    return study_of(facts, elapsed_seconds=repository.elapsed(study)), records


def claim(context: JobContext, study_id: str) -> Turn:
    """Decide what this attempt does next, and write it down; one at a time per study.

    Raises:
        LeaseLost: the attempt does not own its job (any more).
    """
    with context.transaction() as session:
        repository = SearchRepository(session)
        study = repository.lock(study_id)
        if not repository.is_open(study):
            return Closed()
        for task in repository.reclaim(study, max_losses=MAX_TASK_LOSSES):
            log.warning("task %s was left by its worker", task.id)
        plan = plan_from_json(study.plan)
        state, records = known(repository, study)
        price = quote(plan, state)
        _promise(repository, study, plan, state, price)
        action = decide(plan, state)
        match action:
            case Start():
                record = _take(context, repository, study, records, action)
                _call_for_help(context, session, study, plan, state, action)
                after = price.spent + action.expected_seconds
                return Claimed(
                    study, plan, record, action, _sight(state, price), _share(after, price)
                )
            case Stop(by=by, reason=reason):
                repository.end(study, by=by.value, reason=reason)
                return Closed()
            case Wait():
                return Waiting(_sight(state, price))
            case _:
                assert_never(action)


def _sight(state: Study, price: Quote) -> Sight:
    done = len(state.ended)
    return Sight(done, done + price.tasks, _share(price.spent, price), price.eta, price.eta_p90)


def _share(seconds: float, price: Quote) -> float:
    return min(seconds / price.p50, 1.0) if price.p50 > 0.0 else 0.0


def _take(
    context: JobContext,
    repository: SearchRepository,
    study: StudyRow,
    records: list[TaskRecord],
    start: Start,
) -> TaskRecord:
    task = start.task
    key = TrialKey(task.trial.arm, task.trial.draw, task.trial.repeat)
    record = next((r for r in records if _key(r) == key and r.task.rung == task.rung), None)
    if record is None:
        record = repository.add(
            study, key, rung=task.rung, start=task.start,
            setting=setting_to_json(task.trial.setting), origin=task.trial.origin.value,
            candidate=start.candidate.model_dump(mode="json"), reason=start.reason,
        )  # fmt: skip
    repository.take(
        context.fence, study, record,
        limit_seconds=start.limit_seconds if math.isfinite(start.limit_seconds) else None,
        label=start.candidate.objective.label,
    )  # fmt: skip
    return record


def _key(record: TaskRecord) -> TrialKey:
    return TrialKey(record.trial.arm, record.trial.draw, record.trial.repeat)


def _call_for_help(
    context: JobContext, session: Session, study: StudyRow, plan: Plan, state: Study, start: Start
) -> None:
    """Queue another job for this search where a free worker would find a task of it."""
    spec = study.spec
    with_this = replace(
        state,
        running=(*state.running, Running(start.task, start.limit_seconds)),
        waiting=tuple(task for task in state.waiting if task.key != start.task.key),
    )
    if not isinstance(decide(plan, with_this), Start):
        return
    helpers = SearchRepository(session).open_helpers(study.job_id)
    workers = WorkerRepository(session).ready(QueueName.GPU, within_s=_LIVE_S)
    if helpers + 1 >= min(workers, spec.get("parallelism") or workers):
        return
    job = context.job
    JobRepository(session).create(
        owner_id=job.owner_id, kind=JobKind.SEARCH, spec={**job.spec, "study_id": study.id},
        dataset_id=job.dataset_id, model=job.model, seed=job.seed, parent_id=study.job_id,
        priority=_HELPER_PRIORITY,
    )  # fmt: skip


def _promise(
    repository: SearchRepository, study: StudyRow, plan: Plan, state: Study, price: Quote
) -> None:
    """Keep the quotes of the beginning and of the end of screening."""
    screened = {arm.name for arm in plan.screened} - {
        ended.task.trial.arm for ended in state.ended if ended.task.rung == 0
    }
    begun = state.ended or state.running
    moment = "start" if not begun else None if screened else "screened"
    if moment is None or any(kept["at"] == moment for kept in study.quotes):
        return
    repository.quote(
        study,
        {"at": moment, **{name: round(value, 3) for name, value in asdict(price).items()}},
        f"The search will take {price.p50:.0f} device seconds (P90 {price.p90:.0f}), "
        f"{price.spent:.0f} of them spent; with one worker it ends in about {price.eta:.0f} s.",
    )


# ------------------------------------------------------------------- running


@dataclass
class TaskHooks:
    """Hooks of a trial on its way to a rung: it notes what it costs and stops at its limit."""

    inner: ScopeHooks
    task_id: str
    limit_s: float
    began: float = field(default_factory=time.monotonic)
    _noted: float = 0.0

    @property
    def spent(self) -> float:
        """Seconds since the task was taken."""
        return time.monotonic() - self.began

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Store the means of a window of steps."""
        self.inner.metrics(step, values)

    def stepped(self, step: int, total: int) -> None:
        """Report progress.

        Raises:
            Ended: the task has used up its limit (`pruner`).
            LeaseLost: the task is somebody else's.
        """
        self.inner.stepped(step, total)
        spent = self.spent
        if spent - self._noted >= SPEND_EVERY_S:
            self._noted = spent
            context = self.inner.context
            with context.transaction() as session:
                SearchRepository(session).spend(context.fence, self.task_id, spent)
        if spent > self.limit_s and step < total:
            raise Ended(
                EndedBy.PRUNER, f"step {step} of {total}: its limit of {self.limit_s:.1f} s is over"
            )

    def stopping(self) -> bool:
        """Whether the user or the worker wants the attempt to end."""
        return self.inner.stopping()

    def raise_if_stopped(self) -> None:
        """Raise why the attempt ends."""
        self.inner.raise_if_stopped()


def run_task(bench: Workbench, claimed: Claimed, *, span: Span) -> None:
    """Train a trial to its rung, score it, and write down what came of it.

    Raises:
        CancelRequested, Preempted: the attempt was asked to stop; a point was saved.
        LeaseLost: the task is somebody else's now.
    """
    context, start, record = bench.context, claimed.start, claimed.record
    number = record.trial.number
    request = RunRequest(
        scope=scope_of(number),
        objective=start.candidate.objective,
        learning_rate=start.candidate.learning_rate,
        stop_after=start.stop,
        repeat=start.task.trial.repeat,
    )
    train, score = Span(span.start, span.at(_TRAIN_SHARE)), Span(span.at(_TRAIN_SHARE), span.end)
    hooks = TaskHooks(
        ScopeHooks(context, request.scope, train),
        record.task.id,
        limit_s=max(start.limit_seconds - claimed.plan.score_seconds, 0.0),
    )
    run = bench.train(request, span=train, hooks=hooks)
    end, losses = _judged(bench, claimed, run, hooks, score)
    if losses is not None:
        write_groups(bench)
        write_losses(context, number, start.task.rung, losses)
    with context.transaction() as session:
        repository = SearchRepository(session)
        study = repository.lock(claimed.study.id)
        repository.finish(context.fence, study, record, end)
    if end.ended_by is not EndedBy.BUDGET:
        bench.store(request).clear()


def _judged(
    bench: Workbench, claimed: Claimed, run: RunOutcome, hooks: TaskHooks, span: Span
) -> tuple[TaskEnd, Floats | None]:
    plan, rung = claimed.plan, claimed.start.task.rung
    if run.ended_by is not EndedBy.BUDGET:
        return _unusable(run.ended_by, run.message, hooks), None
    measured = bench.measure(Split.VALIDATION, span=span)
    if not measured.is_finite:
        message = "log-probs on validation are not finite"
        return _unusable(EndedBy.NAN, message, hooks), None
    score = trial_score(measured)
    metrics: dict[str, float | str] = {
        "standard_error": score.standard_error,
        "accuracy": score.accuracy,
        "chosen_displacement": score.chosen_displacement,
        "steps": float(run.steps),
    }
    metrics |= {f"hmk/{name}": weight for name, weight in (run.mixture_weights or {}).items()}
    end = TaskEnd(
        ended_by=EndedBy.BUDGET,
        seconds=hooks.spent,
        log_loss=score.log_loss,
        drift=score.drift,
        feasible=plan.drift_budget is None or score.drift <= plan.drift_budget,
        metrics=metrics,
        is_last=rung == plan.last,
    )
    return end, score.losses


def _unusable(ended_by: EndedBy, message: str, hooks: TaskHooks) -> TaskEnd:
    return TaskEnd(
        ended_by=ended_by, seconds=hooks.spent, log_loss=None, drift=None, feasible=False,
        metrics={"message": message}, is_last=False,
    )  # fmt: skip


# ------------------------------------------------------------------- working


def work(bench: Workbench, study_id: str, *, span: Span, patience_s: float | None) -> int:
    """Do tasks of a search until there are none left; return how many were done.

    While all that is left depends on others' tasks it waits, at most `patience_s` at a time; None:
    until the search has ended.

    Raises:
        CancelRequested, Preempted, LeaseLost: as `run_task`.
    """
    context, idle_since, done = bench.context, time.monotonic(), 0
    while True:
        context.raise_if_stopped()
        turn = claim(context, study_id)
        match turn:
            case Claimed(sight=sight):
                _report(context, sight, span)
                part = Span(span.at(sight.fraction), span.at(turn.after))
                run_task(bench, turn, span=part)
                idle_since, done = time.monotonic(), done + 1
            case Waiting(sight=sight):
                if patience_s is not None and time.monotonic() - idle_since > patience_s:
                    return done
                _report(context, sight, span)
                context.stop.wait(WAIT_S)
            case Closed():
                return done
            case _:
                assert_never(turn)


def _report(context: JobContext, sight: Sight, span: Span) -> None:
    """Report the search as a whole; this is also how the attempt learns of a cancel."""
    context.progress(
        unit="tasks", done=sight.done, total=sight.tasks, overall=span.at(sight.fraction),
        eta=(sight.eta, sight.eta_p90),
    )  # fmt: skip
