"""Final runs: `transformers.Trainer` around the steps that search trials take.

The loop, callbacks, trackers and accelerate are transformers'; what a step computes, its data
order, its rates and its resume points are those of `run.py`, so that a trial is the first steps of
the run that follows it. Nothing is pickled and nothing is sent anywhere.
"""

import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy
from worker.training.checkpoint import ResumeStore
from worker.training.evaluate import TrialScore
from worker.training.memory import free_memory
from worker.training.ranks import unsynced
from worker.training.reference import Progress
from worker.training.run import (
    DidNotFit,
    Ended,
    RunHooks,
    RunOutcome,
    TrainingRun,
    metric_interval,
)

log = logging.getLogger("kdpo.training")

Leave = Literal["best", "last"]
Validate = Callable[[Progress], TrialScore]


def train_final(
    run: TrainingRun,
    *,
    hooks: RunHooks,
    folder: Path,
    store: ResumeStore | None = None,
    validate: Validate | None = None,
    trackers: tuple[str, ...] = (),
    leave: Leave = "best",
) -> RunOutcome:
    """Train to the plan's end, go on from a saved point, or just restore what had ended.

    The policy is left with the best weights where the plan scores the run on validation, else (or
    when asked to) with the last. A non-finite loss or gradient, or a device out of memory, ends
    the run with `ended_by` NAN or OOM and names step and pairs.

    Raises:
        RunAborted: the start check fails: the policy does not begin as the reference (`internal`).
        Exception: what `hooks.raise_if_stopped` raises, after a point has been saved.
    """
    saved = None if store is None else store.load()
    if saved is not None:
        run.restore(saved)
    ended_by, message = EndedBy.BUDGET, ""
    if saved is None or not saved.ended:
        ended_by, message = drive(
            run, hooks=hooks, folder=folder, store=store, validate=validate, trackers=trackers
        )
    if ended_by is EndedBy.BUDGET and run.watch.best and leave == "best":
        run.put(run.watch.best)
    return run.outcome(ended_by, message)


def drive(
    run: TrainingRun,
    *,
    hooks: RunHooks,
    folder: Path,
    store: ResumeStore | None,
    validate: Validate | None,
    trackers: tuple[str, ...] = (),
) -> tuple[EndedBy, str]:
    """Train from where the run is to its end; return how it ended, and which pairs are to blame.

    Nothing but `run` itself holds its optimizer afterwards, and there are no gradients.

    Raises:
        DidNotFit: a micro-batch did not fit, where several processes train.
        RunAborted, Exception: as `train_final`.
    """
    assert (run.plan.eval_steps is None) == (validate is None)
    assert run.plan.stop_after is None, "a final run goes to the plan's end"
    trainer = PairTrainer(
        run, hooks=hooks, store=store, validate=validate, folder=folder, trackers=trackers
    )
    try:
        if trainer.is_scored_after(run.step):
            # An attempt that was stopped while it scored the run has left that to this one.
            trainer.evaluate()
        if run.step < run.plan.total_steps and not run.watch.is_over:
            trainer.train()
        trainer.save_end()
    except DidNotFit:
        raise
    except Ended as end:
        return end.ended_by, str(end)
    except torch.OutOfMemoryError:
        return EndedBy.OOM, (
            f"the device ran out of memory after step {run.step}, outside of the model's "
            "training passes: in the optimizer, or while the run was scored or saved"
        )
    finally:
        # It and its callback refer to each other, and both to the optimizer.
        trainer.remove_callback(_StepCallback)
        del trainer
        run.optimizer.zero_grad()
        if run.ranks.size == 1:
            # Else a GPU may be waiting for one that no longer comes, and this for the GPU.
            free_memory(run.policy.device)
    return EndedBy.BUDGET, ""


def check_trackers(names: tuple[str, ...]) -> None:
    """Make sure that every tracker is one that transformers can report to here.

    Raises:
        RunAborted: one is not installed, or not known (`dependency_error`).
    """
    available = sorted(get_available_reporting_integrations())
    missing = sorted(set(names) - set(available))
    if missing:
        raise RunAborted(
            f"KDPO_TRAINING__TRACKERS names {', '.join(missing)}; installed on this worker: "
            f"{', '.join(available) or 'none'}",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="install the tracker's package on the worker, or take it off the list",
        )


class PairTrainer(Trainer):
    """`Trainer` whose batches are whole optimizer steps of a `TrainingRun`.

    Gradient accumulation is inside a step (micro-batches by tokens), and so is the reading of
    metrics; Trainer's own logging, evaluation and checkpoints by steps are off.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        run: TrainingRun,
        *,
        hooks: RunHooks,
        folder: Path,
        store: ResumeStore | None = None,
        validate: Validate | None = None,
        trackers: tuple[str, ...] = (),
    ) -> None:
        self.training_run = run
        self.hooks = hooks
        self.store = store
        self.validate = validate
        self._started_at = run.step
        device = run.policy.device
        # Trainer seeds; the random state is the run's, which may have come from a point.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            super().__init__(
                model=run.loss,
                args=_arguments(run, folder, trackers),
                train_dataset=_Steps(run),
                callbacks=[_StepCallback(self)],
            )
        self.state.global_step = run.step
        # It prints what hooks and trackers are told.
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> "DataLoader[list[int]]":
        """Pairs of every step that is left, in order; not split, as ranks share out each step."""
        # A generator of its own: without one an epoch would draw from the saved random state.
        return DataLoader(
            _Steps(self.training_run),
            batch_size=1,
            collate_fn=lambda steps: steps[0],
            generator=torch.Generator(),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The run's optimizer."""
        self.optimizer = self.training_run.optimizer
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The plan's warm-up and decay, from the step at which this attempt begins."""
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        assert num_training_steps == self.training_run.plan.total_steps
        for group in optimizer.param_groups:
            group["initial_lr"] = group["base_lr"]
        rates: list[Callable[[int], float]] = [self.training_run.plan.rate]
        rates *= len(optimizer.param_groups)
        self.lr_scheduler = LambdaLR(optimizer, rates, last_epoch=self._started_at - 1)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        progress: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        self.state.global_step = self._started_at
        return progress

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        with warnings.catch_warnings():
            # Nothing that we pass: accelerate uses a name that torch has since replaced.
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            model, loader = super()._prepare_for_training(*args, **kwargs)
        if self.training_run.ranks.size > 1:
            self.training_run.wrapped(model, partial(unsynced, model))
        return model, loader

    def training_step(
        self,
        model: nn.Module,
        inputs: list[int],  # type: ignore[override]
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Leave the clipped gradients of the pairs numbered by `inputs`."""
        run = self.training_run
        return run.gradients(inputs).to(run.policy.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> None:
        """Gradients are clipped, over the adapter only, and their norm is noted in the step."""

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Score the run on validation, keep its weights if they are the best, see if it is over.

        Raises:
            Ended: a log-prob is not finite.
        """
        run = self.training_run
        assert self.validate is not None
        score = self.validate(self._between_batches)
        told = [score.log_loss, score.standard_error, score.accuracy, score.drift]
        names = ("log_loss", "standard_error", "accuracy", "drift")
        metrics = {
            f"eval_{name}": value for name, value in zip(names, run.ranks.agreed(told), strict=True)
        }
        if not all(math.isfinite(value) for value in metrics.values()):
            raise Ended(
                EndedBy.NAN, f"log-probs on validation are not finite after step {run.step}"
            )
        run.watch.record(run.step, metrics["eval_log_loss"], run.trained())
        log.info(
            "step %d: validation log-loss %.4f, best %.4f at step %s",
            run.step, metrics["eval_log_loss"], run.watch.best_log_loss, run.watch.best_step,
        )  # fmt: skip
        self.log(run.close_window() | metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if run.watch.is_over:
            self.control.should_training_stop = True
        return metrics

    def is_scored_after(self, step: int) -> bool:
        """Whether the plan scores the run after `step` and that is still to be done."""
        plan, watch = self.training_run.plan, self.training_run.watch
        if plan.eval_steps is None or step <= watch.scored_step:
            return False
        return step % plan.eval_steps == 0 or step == plan.total_steps

    def _between_batches(self, _done: int, _total: int) -> None:
        """Save and leave a long validation when asked to; the next attempt begins with it."""
        run = self.training_run
        if run.ranks.size == 1:
            self.hooks.stepped(run.step, run.plan.total_steps)
            self.leave_if_asked()

    def leave_if_asked(self) -> None:
        """Save, then raise why the run has to stop, in all processes at the same step.

        Raises:
            Exception: what the hooks raise.
        """
        if any(self.training_run.ranks.agreed([self.hooks.stopping()])):
            self._save_point()
            self.hooks.raise_if_stopped()

    def save_end(self) -> None:
        """Keep the point from which the run can be restored."""
        self._save_point(ended=True)

    def _save_point(self, *, ended: bool = False) -> None:
        """Keep a point; every process takes part, as parts of weights come together."""
        if self.store is not None:
            state = self.training_run.state(ended=ended)
            if self.training_run.ranks.is_first:
                self.store.save(state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell trackers, and the hooks what belongs to a step; the end's summary is no metric."""
        if "train_runtime" not in logs:
            self.hooks.metrics(self.training_run.step, logs)
        super().log(dict(logs), start_time)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self._save_point()


class _Steps(Dataset[list[int]]):
    """Pairs of the steps that are left of a run."""

    def __init__(self, run: TrainingRun) -> None:
        self._order = run.order
        self._start = run.step
        self._count = run.plan.total_steps - run.step

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, step: int) -> list[int]:
        return self._order.pairs_of(self._start + step)


class _StepCallback(TrainerCallback):
    """What happens at step boundaries: stopping, metrics, scores, resume points."""

    def __init__(self, trainer: PairTrainer) -> None:
        self._trainer = trainer
        self._every = metric_interval(trainer.training_run.plan.total_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save and leave when asked to."""
        self._trainer.leave_if_asked()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count the step, report it, and say what is due."""
        trainer, run = self._trainer, self._trainer.training_run
        run.stepped()
        state.epoch = run.step * run.order.batch_size / run.order.num_pairs
        is_last = run.step == run.plan.total_steps
        control.should_evaluate = trainer.is_scored_after(run.step)
        # One point of metrics has both where a step has both.
        if not control.should_evaluate and (run.step % self._every == 0 or is_last):
            trainer.log(run.close_window())
        trainer.hooks.stepped(run.step, run.plan.total_steps)
        is_due = trainer.store is not None and trainer.store.is_due() and not is_last
        control.should_save = any(run.ranks.agreed([is_due]))
        return control


def _arguments(run: TrainingRun, folder: Path, trackers: tuple[str, ...]) -> TrainingArguments:
    """Arguments that switch off whatever the run or the callback does itself."""
    device = run.policy.device
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=run.plan.total_steps,
        per_device_train_batch_size=run.plan.batch_size,
        learning_rate=run.plan.learning_rate,
        max_grad_norm=0.0,
        seed=run.plan.seed,
        use_cpu=device.type == "cpu",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=list(trackers) if run.ranks.is_first and trackers else "none",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    if device.type == "cuda" and run.ranks.size == 1:
        # Trainer takes the first GPU, and all of them in threads where there are several.
        index = torch.cuda.current_device() if device.index is None else device.index
        args._setup_devices = torch.device("cuda", index)
        args._n_gpu = 1
        torch.cuda.set_device(index)
    return args
