"""What `auto` becomes: device, threads, learning rate, numbers of steps."""

import math
import os
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from core.errors import FailureCode, RunAborted
from core.run_spec import TrainSpec
from core.settings import TrainingSettings

LR_TIMES_WIDTH = 0.35
LR_RANGE = (1e-6, 5e-3)
FULL_LR_SHARE = 0.1
WEIGHTS_LR = 0.05


@dataclass(frozen=True)
class TrainPlan:
    """A training run with nothing left to resolve; times and rates are per optimizer step."""

    learning_rate: float
    total_steps: int
    warmup_steps: int
    schedule: Literal["linear", "constant"]
    batch_size: int
    weight_decay: float
    max_grad_norm: float
    seed: int
    eval_steps: int | None = None
    patience: int | None = None
    micro_tokens: int = 0
    """Budget of a micro-batch; 0: the device's."""
    stop_after: int | None = None
    """The step after which a trial ends; its rates are those of the whole run."""

    @property
    def last_step(self) -> int:
        """Steps that are really made."""
        return self.total_steps if self.stop_after is None else self.stop_after

    def rate(self, step: int) -> float:
        """Factor on learning rates at step `step` (from 0): warm-up, then constant or linear to 0.

        A pure function of the step, so that a resumed run needs no scheduler state.
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        return (self.total_steps - step) / (self.total_steps - self.warmup_steps)

    def as_dict(self) -> dict[str, float | int | str | None]:
        """The plan as plain values, for identities and reports."""
        return asdict(self)


def auto_learning_rate(hidden_size: int, *, full: bool = False) -> float:
    """Heuristic 0.35 / H within [1e-6, 5e-3]; a tenth of 0.35 where all weights are trained.

    The rate at which Adam changes a layer's output grows with its width, hence ∝ 1 / width; the
    factor is that of LoRA runs on a model of width 192 (1.8e-3). For 4,096 it gives 8.5e-5. That
    adapters want about ten times the rate of full fine-tuning is an observation (Schulman et al.,
    "LoRA Without Regret", 2025).
    """
    factor = LR_TIMES_WIDTH * (FULL_LR_SHARE if full else 1.0)
    return min(max(factor / hidden_size, LR_RANGE[0]), LR_RANGE[1])


def resolve_plan(
    spec: TrainSpec,
    *,
    num_pairs: int,
    hidden_size: int,
    seed: int,
    learning_rate: float | None = None,
    stop_after: int | None = None,
    watched: bool = False,
) -> TrainPlan:
    """Resolve a spec against model and data; `learning_rate` stands above the spec's.

    A trial is the first `stop_after` steps of the whole run, or all of it where that is shorter.
    Only a `watched` run is scored on validation while it runs.
    """
    if learning_rate is None:
        given, full = spec.learning_rate, spec.adaptation == "full"
        learning_rate = auto_learning_rate(hidden_size, full=full) if given == "auto" else given
    batch_size = min(spec.batch_size, num_pairs)
    steps_per_epoch = num_pairs / batch_size
    total = max(1, round(spec.n_epochs * steps_per_epoch))
    if spec.max_steps is not None:
        total = min(total, spec.max_steps)
    return TrainPlan(
        learning_rate=learning_rate,
        total_steps=total,
        warmup_steps=min(math.ceil(spec.warmup_fraction * total), total - 1),
        schedule=spec.schedule,
        batch_size=batch_size,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=seed,
        eval_steps=_eval_steps(spec.eval_every, total) if watched else None,
        patience=spec.early_stopping_patience if watched else None,
        micro_tokens=spec.micro_batch_tokens or 0,
        stop_after=None if stop_after is None else min(stop_after, total),
    )


def _eval_steps(every: float | None, total_steps: int) -> int | None:
    if every is None:
        return None
    return max(1, round(every * total_steps)) if every < 1 else int(every)


def resolve_device(settings: TrainingSettings) -> torch.device:
    """The device to train on.

    Raises:
        RunAborted: a CUDA device is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if settings.device == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if settings.device.startswith("cuda") and not has_cuda:
        raise RunAborted(
            f"KDPO_TRAINING__DEVICE is {settings.device!r} and this machine has no CUDA device",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="set it to `auto` or `cpu`",
        )
    return torch.device(settings.device)


def apply_threads(settings: TrainingSettings) -> int:
    """Set and return the number of CPU threads; sums depend on it, so resume checks it."""
    available = len(os.sched_getaffinity(0))
    threads = min(available, 8) if settings.num_threads is None else settings.num_threads
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads
