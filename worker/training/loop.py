"""The training core, of trials and of full runs alike.

Killed at any step and started again from a saved point, a run goes on bit for bit: everything it
depends on is a pure function of the step (data order, learning rate) or part of the point.
"""

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.errors import FailureCode, KdpoError, RunAborted
from core.lifecycle import EndedBy
from objectives import HybridObjective
from worker.training.batches import DataOrder
from worker.training.checkpoint import ResumeStore, SavedState
from worker.training.model import Policy
from worker.training.resolve import TrainPlan
from worker.training.step import PairLoss, PairStep, TrainingData

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
    """How a run ended: in full when `ended_by` is BUDGET, else where and with which pairs."""

    steps: int
    pairs_seen: int
    seconds: float
    ended_by: EndedBy
    message: str = ""
    mixture_weights: dict[str, float] | None = None


class _Ended(KdpoError):
    """The run cannot go on; carries how it ended."""

    default_code = "run_ended"

    def __init__(self, ended_by: EndedBy, message: str) -> None:
        super().__init__(message)
        self.ended_by = ended_by


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
    run = _Run(policy, objective, data, plan=plan, weights_learning_rate=weights_learning_rate)
    saved = None if store is None else store.load()
    if saved is not None:
        run.restore(saved)
    ended_by, message = EndedBy.BUDGET, ""
    try:
        _go(run, hooks, store)
    except _Ended as end:
        ended_by, message = end.ended_by, str(end)
    return RunOutcome(
        steps=run.step,
        pairs_seen=run.step * run.order.batch_size,
        seconds=run.seconds(),
        ended_by=ended_by,
        message=message,
        mixture_weights=objective.mixture_weights(),
    )


def _go(run: "_Run", hooks: RunHooks, store: ResumeStore | None) -> None:
    total = run.plan.total_steps
    every = max(1, math.ceil(total / METRIC_POINTS))
    started_complete = run.step == total
    while run.step < total:
        if hooks.stopping():
            if store is not None:
                store.save(run.state())
            hooks.raise_if_stopped()
        try:
            run.advance()
        except torch.OutOfMemoryError as error:
            raise _Ended(
                EndedBy.OOM,
                f"step {run.step + 1} ran out of device memory with one pair at a time",
            ) from error
        if run.step % every == 0 or run.step == total:
            hooks.metrics(run.step, run.close_window())
        hooks.stepped(run.step, total)
        if store is not None and store.is_due() and run.step < total:
            store.save(run.state())
    if store is not None and not started_complete:
        store.save(run.state())


class _Run:
    """Everything that changes during a run."""

    def __init__(
        self,
        policy: Policy,
        objective: HybridObjective,
        data: TrainingData,
        *,
        plan: TrainPlan,
        weights_learning_rate: float,
    ) -> None:
        policy.reset_adapter(plan.seed)
        self.policy = policy
        self.objective = objective
        self.data = data
        self.plan = plan
        self.order = DataOrder(len(data.pairs), batch_size=plan.batch_size, seed=plan.seed)
        self.step = 0
        self._pair_step = PairStep(PairLoss(policy, objective), policy, data)
        self._adapter = policy.adapter()
        self._weights = dict(objective.named_parameters())
        groups: list[dict[str, object]] = [
            {
                "params": list(self._adapter.values()),
                "base_lr": plan.learning_rate,
                "weight_decay": plan.weight_decay,
            }
        ]
        if self._weights:
            groups.append(
                {
                    "params": list(self._weights.values()),
                    "base_lr": weights_learning_rate,
                    "weight_decay": 0.0,
                }
            )
        self._optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, fused=True)
        self._window: dict[str, Tensor] = {}
        self._window_steps = 0
        self._finite: list[tuple[int, Tensor]] = []
        self._seconds_before = 0.0
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Time spent by all attempts, not counting work that was lost."""
        return self._seconds_before + time.monotonic() - self._since

    def advance(self) -> None:
        """Do one optimizer step."""
        rate = self.plan.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["base_lr"]
        index = self.order.pairs_of(self.step)
        metrics = self._pair_step.accumulate(
            index, denominator=len(index), clear=self._optimizer.zero_grad
        )
        norm = torch.nn.utils.clip_grad_norm_(
            list(self._adapter.values()), self.plan.max_grad_norm, foreach=True
        )
        metrics["grad_norm"] = norm.detach()
        metrics["learning_rate"] = norm.new_tensor(rate * self.plan.learning_rate)
        self._finite.append((self.step, torch.isfinite(norm) & torch.isfinite(metrics["loss"])))
        if self.policy.device.type == "cpu":
            self._raise_if_not_finite()
        if self.step == 0:
            self._check_start(metrics)
        self._optimizer.step()
        self.step += 1
        self._window_steps += 1
        for name, value in metrics.items():
            self._window[name] = self._window.get(name, torch.zeros_like(value)) + value

    def close_window(self) -> dict[str, float]:
        """Return means over the steps since the last call; the one place that waits for a GPU."""
        self._raise_if_not_finite()
        names = list(self._window)
        means = torch.stack([self._window[n] for n in names]).double() / self._window_steps
        self._window, self._window_steps = {}, 0
        return dict(zip(names, means.tolist(), strict=True))

    def state(self) -> SavedState:
        """Copy everything that later steps depend on; refuses to save what is not finite."""
        self._raise_if_not_finite()
        tensors = {f"{_ADAPTER}{name}": p.detach() for name, p in self._adapter.items()}
        tensors |= {f"{_WEIGHTS}{name}": p.detach() for name, p in self._weights.items()}
        for name, parameter in (self._adapter | self._weights).items():
            for moment in _MOMENTS:
                value = self._optimizer.state.get(parameter, {}).get(moment)
                if value is not None:
                    tensors[f"{_OPTIMIZER}{name}.{moment}"] = value
        tensors |= {f"{_WINDOW}{name}": value for name, value in self._window.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.policy.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.policy.device)
        epoch, offset = self.order.position(self.step)
        return SavedState(
            step=self.step,
            epoch=epoch,
            offset=offset,
            seconds=self.seconds(),
            tensors={name: tensor.clone() for name, tensor in tensors.items()},
            window_steps=self._window_steps,
        )

    def restore(self, saved: SavedState) -> None:
        """Go on from a point: the next step is the one that would have been next."""
        assert (saved.epoch, saved.offset) == self.order.position(saved.step)
        self.step = saved.step
        self._seconds_before = saved.seconds
        self._window_steps = saved.window_steps
        tensors = saved.tensors
        with torch.no_grad():
            for name, parameter in self._adapter.items():
                parameter.copy_(tensors[f"{_ADAPTER}{name}"])
            for name, parameter in self._weights.items():
                parameter.copy_(tensors[f"{_WEIGHTS}{name}"])
        for name, parameter in (self._adapter | self._weights).items():
            moments = {m: tensors.get(f"{_OPTIMIZER}{name}.{m}") for m in _MOMENTS}
            kept = {m: v.to(parameter.device) for m, v in moments.items() if v is not None}
            if kept:
                self._optimizer.state[parameter] = kept
        self._window = {
            name.removeprefix(_WINDOW): value.to(self.policy.device)
            for name, value in tensors.items()
            if name.startswith(_WINDOW)
        }
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.policy.device)

    def _raise_if_not_finite(self) -> None:
        flags, self._finite = self._finite, []
        if not flags:
            return
        finite = torch.stack([flag for _, flag in flags]).tolist()
        for (step, _), good in zip(flags, finite, strict=True):
            if not good:
                ids = [self.data.pairs[i].id for i in self.order.pairs_of(step)]
                more = f" and {len(ids) - _NAMED_PAIRS} more" if len(ids) > _NAMED_PAIRS else ""
                raise _Ended(
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
