"""A training run between any two of its steps: what it is, what a step does, how it is saved.

Killed at any step and started again from a saved point, a run goes on bit for bit: everything it
depends on is a pure function of the step (data order, learning rate) or part of the point.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.errors import FailureCode, KdpoError, RunAborted
from core.lifecycle import EndedBy
from objectives import HybridObjective
from worker.training.batches import DataOrder, computed_tokens
from worker.training.checkpoint import SavedState
from worker.training.model import Policy
from worker.training.ranks import ALONE, Ranks
from worker.training.resolve import TrainPlan
from worker.training.step import PairLoss, PairStep, TrainingData
from worker.training.watch import Watch

METRIC_POINTS = 60
_NAMED_PAIRS = 32
_ADAPTER, _OPTIMIZER, _WEIGHTS, _WINDOW = "adapter.", "optimizer.", "objective.", "window."
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class RunHooks(Protocol):
    """How a run reports and learns that it should stop."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Take the means of a window of steps that ends with `step`."""
        ...

    def stepped(self, step: int, total: int) -> None:
        """Take note that a step is done; called at every step."""
        ...

    def stopping(self) -> bool:
        """Whether the run must stop at this step boundary."""
        ...

    def raise_if_stopped(self) -> None:
        """Raise the reason to stop."""
        ...


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: as planned when `ended_by` is BUDGET, else where and with which pairs.

    A run that is scored on validation may end early; its best weights, those of `best_step`, are
    the ones that it leaves.
    """

    steps: int
    pairs_seen: int
    seconds: float
    ended_by: EndedBy
    message: str = ""
    mixture_weights: dict[str, float] | None = None
    best_step: int | None = None


class Ended(KdpoError):
    """The run cannot go on; carries how it ended."""

    default_code = "run_ended"

    def __init__(self, ended_by: EndedBy, message: str) -> None:
        super().__init__(message)
        self.ended_by = ended_by


class DidNotFit(Ended):
    """A micro-batch did not fit a device where several processes train; smaller ones may."""


def metric_interval(total_steps: int) -> int:
    """Steps in a window of metrics."""
    return max(1, math.ceil(total_steps / METRIC_POINTS))


class TrainingRun:
    """Everything that changes during a run, from the reference's weights on."""

    def __init__(
        self,
        policy: Policy,
        objective: HybridObjective,
        data: TrainingData,
        *,
        plan: TrainPlan,
        weights_learning_rate: float,
        ranks: Ranks = ALONE,
        shard: Callable[[PairLoss], None] | None = None,
    ) -> None:
        policy.reset_adapter(plan.seed)
        # Nothing draws in a step today; what may some day must not depend on earlier runs.
        torch.manual_seed(plan.seed)
        self.policy = policy
        self.objective = objective
        self.data = data
        self.plan = plan
        self.ranks = ranks
        self.order = DataOrder(len(data.pairs), batch_size=plan.batch_size, seed=plan.seed)
        self.step = 0
        self.num_tokens = 0
        self.watch = Watch(patience=plan.patience)
        self.loss = PairLoss(policy, objective)
        self.pair_step = PairStep(
            self.loss, policy, data, max_tokens=plan.micro_tokens, ranks=ranks
        )
        if shard is not None:
            # Before the parameters are asked for: it replaces them.
            shard(self.loss)
        self._adapter = policy.adapter()
        self._weights = dict(objective.named_parameters())
        self.optimizer = torch.optim.AdamW(
            [
                *_adapter_groups(self._adapter, plan),
                *_weight_groups(self._weights, weights_learning_rate),
            ],
            lr=plan.learning_rate,
            fused=True,
        )
        self._window: dict[str, Tensor] = {}
        self._window_steps = 0
        self._finite: list[tuple[int, Tensor]] = []
        self._seconds_before = 0.0
        self._since = time.monotonic()

    def wrapped(
        self, module: nn.Module, unsynced: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """Take note of what trains in place of the plain loss."""
        self.pair_step.module = module
        self.pair_step.unsynced = unsynced

    def seconds(self) -> float:
        """Time spent by all attempts, not counting work that was lost."""
        return self._seconds_before + time.monotonic() - self._since

    def outcome(self, ended_by: EndedBy, message: str) -> RunOutcome:
        """What to tell about the run when it has ended."""
        return RunOutcome(
            steps=self.step,
            pairs_seen=self.step * self.order.batch_size,
            seconds=self.seconds(),
            ended_by=ended_by,
            message=message,
            mixture_weights=self.objective.mixture_weights(),
            best_step=self.watch.best_step,
        )

    def advance(self) -> None:
        """Do one optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step) * group["base_lr"]
        self.gradients(self.order.pairs_of(self.step))
        self.optimizer.step()
        self.stepped()

    def gradients(self, index: list[int]) -> Tensor:
        """Leave the clipped gradients of a step's pairs and note its metrics; returns the loss.

        Raises:
            Ended: on a CPU at once, on a GPU when metrics are read: not finite; or a pair alone
                does not fit the device.
            DidNotFit: a micro-batch does not fit, where several processes train.
            RunAborted: the first step does not begin at the reference.
        """
        try:
            metrics = self.pair_step.accumulate(
                index, denominator=len(index), clear=self.optimizer.zero_grad
            )
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        norm = torch.nn.utils.clip_grad_norm_(
            list(self._adapter.values()), self.plan.max_grad_norm, foreach=True
        )
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        metrics["grad_norm"] = norm.detach()
        rate = self.plan.rate(self.step) * self.plan.learning_rate
        metrics["learning_rate"] = norm.new_full((), rate)
        self._finite.append((self.step, torch.isfinite(norm) & torch.isfinite(metrics["loss"])))
        if self.policy.device.type == "cpu":
            self._raise_if_not_finite()
        if self.step == 0:
            self._check_start(metrics)
        for name, value in metrics.items():
            self._window[name] = self._window.get(name, torch.zeros_like(value)) + value
        self.num_tokens += sum(computed_tokens(self.data.pairs[i], self.policy.form) for i in index)
        return metrics["loss"]

    def _out_of_memory(self) -> Ended:
        what = f"step {self.step + 1} ran out of device memory with"
        if self.ranks.size == 1:
            return Ended(EndedBy.OOM, f"{what} one pair at a time")
        return DidNotFit(
            EndedBy.OOM,
            f"{what} micro-batches of {self.pair_step.max_tokens} tokens in each of "
            f"{self.ranks.size} processes; set `micro_batch_tokens` lower",
        )

    def stepped(self) -> None:
        """Count a step when the optimizer has done it."""
        self.step += 1
        self._window_steps += 1

    def close_window(self) -> dict[str, float]:
        """Return means over the steps since the last call; the one place that waits for a GPU."""
        self._raise_if_not_finite()
        names = list(self._window)
        means = torch.stack([self._window[n] for n in names]).double() / self._window_steps
        self._window, self._window_steps = {}, 0
        return {
            **dict(zip(names, means.tolist(), strict=True)),
            "epoch": self.step * self.order.batch_size / self.order.num_pairs,
            "num_tokens": float(self.num_tokens),
        }

    def trained(self) -> dict[str, Tensor]:
        """Copies of what is trained, by the names that a point has for it.

        Sharded tensors are put together, for which every process has to call this; only the first
        is given them.
        """
        named = {f"{_ADAPTER}{name}": p for name, p in self._adapter.items()}
        named |= {f"{_WEIGHTS}{name}": p for name, p in self._weights.items()}
        return {name: self._whole(parameter) for name, parameter in named.items()}

    def state(self, *, ended: bool = False) -> SavedState:
        """Copy everything that later steps depend on; refuses to save what is not finite.

        Every process has to call it, as parts of sharded tensors come together.
        """
        self._raise_if_not_finite()
        tensors = self.trained()
        for name, parameter in (self._adapter | self._weights).items():
            for moment in _MOMENTS:
                value = self.optimizer.state.get(parameter, {}).get(moment)
                if value is not None:
                    tensors[f"{_OPTIMIZER}{name}.{moment}"] = self._whole(value)
        tensors |= {f"{_WINDOW}{name}": self._whole(value) for name, value in self._window.items()}
        tensors |= self.watch.tensors()
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.policy.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.policy.device)
        epoch, offset = self.order.position(self.step)
        return SavedState(
            step=self.step,
            epoch=epoch,
            offset=offset,
            seconds=self.seconds(),
            tensors=tensors,
            window_steps=self._window_steps,
            num_tokens=self.num_tokens,
            watch=self.watch.values(),
            ended=ended,
        )

    def restore(self, saved: SavedState) -> None:
        """Go on from a point: the next step is the one that would have been next."""
        assert (saved.epoch, saved.offset) == self.order.position(saved.step)
        self.step = saved.step
        self.num_tokens = saved.num_tokens
        self._seconds_before = saved.seconds
        self._window_steps = saved.window_steps
        tensors = saved.tensors
        self.watch.restore(saved.watch, tensors)
        self.put(tensors)
        # Of an ended run only the weights are wanted: no optimizer step follows.
        trained = {} if saved.ended else self._adapter | self._weights
        for name, parameter in trained.items():
            moments = {m: tensors.get(f"{_OPTIMIZER}{name}.{m}") for m in _MOMENTS}
            kept = {m: _like(parameter, v) for m, v in moments.items() if v is not None}
            if kept:
                self.optimizer.state[parameter] = kept
        self._window = {
            name.removeprefix(_WINDOW): value.to(self.policy.device)
            for name, value in tensors.items()
            if name.startswith(_WINDOW)
        }
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.policy.device)

    def _whole(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the host, put together where it is sharded; nothing but on the first."""
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        return whole.to("cpu", copy=True) if self.ranks.is_first else whole.new_empty(0)

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Put weights that `trained` has returned into policy and objective."""
        with torch.no_grad():
            for name, parameter in self._adapter.items():
                parameter.copy_(_like(parameter, tensors[f"{_ADAPTER}{name}"]))
            for name, parameter in self._weights.items():
                parameter.copy_(_like(parameter, tensors[f"{_WEIGHTS}{name}"]))

    def _raise_if_not_finite(self) -> None:
        flags, self._finite = self._finite, []
        if not flags:
            return
        finite = torch.stack([flag for _, flag in flags]).tolist()
        for (step, _), good in zip(flags, finite, strict=True):
            if not good:
                ids = [self.data.pairs[i].id for i in self.order.pairs_of(step)]
                more = f" and {len(ids) - _NAMED_PAIRS} more" if len(ids) > _NAMED_PAIRS else ""
                raise Ended(
                    EndedBy.NAN,
                    f"loss or gradient is not finite at step {step + 1}; pairs "
                    f"{', '.join(ids[:_NAMED_PAIRS])}{more}",
                )

    def _check_start(self, metrics: dict[str, Tensor]) -> None:
        """Before the first update the policy is the reference: margins 0, plain DPO's loss ln 2."""
        spec = self.objective.spec
        margin = float(metrics["rewards/margins"]) / spec.beta
        tolerance = 0.01 if self.policy.device.type == "cpu" else 1.0
        is_plain = spec.is_plain_dpo and all(pair.weight == 1.0 for pair in self.data.pairs)
        excess = abs(float(metrics["loss"]) - math.log(2)) if is_plain else 0.0
        if abs(margin) > tolerance or excess > tolerance * max(1.0, spec.beta):
            raise RunAborted(
                f"a fresh adapter differs from the reference: mean margin {margin:.4f}, expected "
                f"0; loss {float(metrics['loss']):.4f}",
                failure=FailureCode.INTERNAL,
                hint="the stored reference belongs to other weights; report this",
            )


def _adapter_groups(adapter: dict[str, nn.Parameter], plan: TrainPlan) -> list[dict[str, object]]:
    """Weights decay, norms and biases do not; an adapter has weights only."""
    matrices = [p for p in adapter.values() if p.ndim > 1]
    vectors = [p for p in adapter.values() if p.ndim <= 1]
    return [
        {
            "params": params,
            "lr": plan.learning_rate,
            "base_lr": plan.learning_rate,
            "weight_decay": decay,
        }
        for params, decay in ((matrices, plan.weight_decay), (vectors, 0.0))
        if params
    ]


def _weight_groups(weights: dict[str, nn.Parameter], rate: float) -> list[dict[str, object]]:
    if not weights:
        return []
    return [{"params": list(weights.values()), "lr": rate, "base_lr": rate, "weight_decay": 0.0}]


def _like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as `parameter` is placed: on its device, sharded as it is."""
    placed = whole.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor) and whole.shape == parameter.shape:
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements)
    return placed
