"""The training loop of search trials: nothing between two steps but the steps.

Final runs take the same steps under `transformers.Trainer` (`trainer.py`), so that a trial is the
first steps of the run that follows it.
"""

import torch

from core.lifecycle import EndedBy
from objectives import HybridObjective
from worker.training.checkpoint import ResumeStore
from worker.training.model import Policy
from worker.training.resolve import TrainPlan
from worker.training.run import Ended, RunHooks, RunOutcome, TrainingRun, metric_interval
from worker.training.step import TrainingData


def train(
    policy: Policy,
    objective: HybridObjective,
    data: TrainingData,
    *,
    plan: TrainPlan,
    weights_learning_rate: float,
    hooks: RunHooks,
    store: ResumeStore | None = None,
) -> RunOutcome:
    """Train the adapter (and learned mixture weights) from the reference, or from a saved point.

    The adapter is left trained. A non-finite loss or gradient, or a device out of memory, ends the
    run with `ended_by` NAN or OOM and names step and pairs.

    Raises:
        RunAborted: the start check fails: a fresh adapter is not the reference (`internal`).
        Exception: what `hooks.raise_if_stopped` raises, after a point has been saved.
    """
    assert plan.eval_steps is None, "trials are scored when they are done"
    run = TrainingRun(
        policy, objective, data, plan=plan, weights_learning_rate=weights_learning_rate
    )
    saved = None if store is None else store.load()
    if saved is not None:
        run.restore(saved)
    ended_by, message = EndedBy.BUDGET, ""
    try:
        _go(run, hooks, store)
    except Ended as end:
        ended_by, message = end.ended_by, str(end)
    return run.outcome(ended_by, message)


def _go(run: TrainingRun, hooks: RunHooks, store: ResumeStore | None) -> None:
    total = run.plan.last_step
    every = metric_interval(total)
    started_complete = run.step == total
    while run.step < total:
        if hooks.stopping():
            if store is not None:
                store.save(run.state())
            hooks.raise_if_stopped()
        try:
            run.advance()
        except torch.OutOfMemoryError as error:
            raise Ended(
                EndedBy.OOM,
                f"step {run.step + 1} ran out of device memory in the optimizer",
            ) from error
        if run.step % every == 0 or run.step == total:
            hooks.metrics(run.step, run.close_window())
        hooks.stepped(run.step, total)
        if store is not None and store.is_due() and run.step < total:
            store.save(run.state())
    if store is not None and not started_complete:
        store.save(run.state())
