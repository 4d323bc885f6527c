"""Tasks of a search: taken one at a time by whoever is free, run, and written down."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import torch

from core.lifecycle import EndedBy
from models.repositories.searches import SearchRepository, TaskEnd
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.runs import RunRequest
from worker.jobs.scopes import TRIAL_SCOPE, Reporter, ScopeHooks, Span
from worker.jobs.search_losses import write_groups, write_losses
from worker.jobs.search_turns import MAX_TASK_LOSSES as MAX_TASK_LOSSES
from worker.jobs.search_turns import Claimed as Claimed
from worker.jobs.search_turns import Closed, Pausing, Sight, Waiting, claim
from worker.jobs.workbench import Workbench
from worker.training.evaluate import Floats, Measured, trial_score
from worker.training.run import Ended, RunOutcome

log = logging.getLogger("kdpo.search")

WAIT_S = 0.5
SPEND_EVERY_S = 1.0
_TRAIN_SHARE = 0.85


def scope_of(number: int) -> str:
    """Name of a trial's metrics and points."""
    return f"{TRIAL_SCOPE}{number}"


# ------------------------------------------------------------------- running


@dataclass
class TaskHooks:
    """Hooks of a trial on its way to a rung: it notes what it costs and stops at its limit.

    `score_s` of its limit are for scoring. No step is begun that would pass it, if it takes as long
    as the longest one so far.
    """

    inner: ScopeHooks
    task_id: str
    limit_s: float
    score_s: float
    began: float = field(default_factory=time.monotonic)
    _noted: float = 0.0
    _last: float | None = None
    _longest: float = 0.0

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
        self._note()
        spent = self.spent
        if self._last is not None:
            self._longest = max(self._longest, spent - self._last)
        self._last = spent
        if step < total and spent + self._longest > self.limit_s - self.score_s:
            raise Ended(
                EndedBy.PRUNER, f"step {step} of {total}: its limit of {self.limit_s:.1f} s is over"
            )

    def scoring(self, span: Span) -> Callable[[int, int], None]:
        """What is called while the trial is scored; it raises as `stepped` does."""
        reporter = Reporter(self.inner.context, "pairs", span)

        def scored(done: int, total: int) -> None:
            reporter(done, total)
            self._note()
            if done < total and self.spent > self.limit_s:
                raise Ended(
                    EndedBy.PRUNER,
                    f"pair {done} of {total} on validation: its limit of {self.limit_s:.1f} s is "
                    "over",
                )

        return scored

    def _note(self) -> None:
        spent = self.spent
        if spent - self._noted >= SPEND_EVERY_S:
            self._noted = spent
            context = self.inner.context
            with context.transaction() as session:
                SearchRepository(session).spend(context.fence, self.task_id, spent)

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
        limit_s=start.limit_seconds,
        score_s=start.score_seconds,
    )
    end, losses = _judged(bench, claimed, request, hooks, train=train, score=score)
    if losses is not None:
        write_groups(bench)
        write_losses(context, number, start.task.rung, losses)
    with context.transaction() as session:
        repository = SearchRepository(session)
        study = repository.lock(claimed.study.id)
        repository.finish(context.fence, study, record, end)
    if end.ended_by is EndedBy.PRUNER:  # of others a person may want another try
        bench.store(request).clear()


def _judged(
    bench: Workbench,
    claimed: Claimed,
    request: RunRequest,
    hooks: TaskHooks,
    *,
    train: Span,
    score: Span,
) -> tuple[TaskEnd, Floats | None]:
    """Train and score a trial; what it cannot do is a fact about it."""
    try:
        run = bench.train(request, span=train, hooks=hooks)
        if run.ended_by is not EndedBy.BUDGET:
            return _unusable(run.ended_by, run.message, hooks), None
        measured = bench.measure(Split.VALIDATION, span=score, progress=hooks.scoring(score))
    except Ended as end:
        return _unusable(end.ended_by, str(end), hooks), None
    except torch.OutOfMemoryError as error:
        log.warning("trial %s ran out of device memory: %s", request.scope, error)
        return _unusable(EndedBy.OOM, "its objective or its scoring does not fit", hooks), None
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        log.warning("trial %s has no solution: %s", request.scope, error)
        return _unusable(EndedBy.NAN, str(error), hooks), None
    if not measured.is_finite:
        return _unusable(EndedBy.NAN, "log-probs on validation are not finite", hooks), None
    return _scored(claimed, run, measured, hooks)


def _scored(
    claimed: Claimed, run: RunOutcome, measured: Measured, hooks: TaskHooks
) -> tuple[TaskEnd, Floats]:
    plan, rung = claimed.plan, claimed.start.task.rung
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
            case Pausing():
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
