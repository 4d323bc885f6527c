"""The training core, of trials and of full runs alike.

Killed at any step and started again from a saved point, a run goes on bit for bit: everything it
depends on is a pure function of the step (data order, learning rate) or part of the point.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.errors import FailureCode, KdpoError, RunAborted
from core.lifecycle import EndedBy
from core.spec import PenaltyTerm
from objectives import HybridObjective, PairEmbeddings, PreferenceBatch, streamed_divergence
from worker.training.batches import DataOrder, PairBatch, collate, micro_batches
from worker.training.checkpoint import ResumeStore, SavedState
from worker.training.forward import hidden_states, score_tokens
from worker.training.model import Policy
from worker.training.resolve import TrainPlan
from worker.training.states import ReferenceStates
from worker.training.tokenize import TokenizedPair

MICRO_PAIRS = {"cpu": 4, "cuda": 64}
MICRO_TOKENS = {"cpu": 8_192, "cuda": 32_768}
METRIC_POINTS = 60
_NAMED_PAIRS = 32
_ADAPTER, _OPTIMIZER, _WEIGHTS, _WINDOW = "adapter.", "optimizer.", "objective.", "window."
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class TrainingData:
    """Pairs to train on, what the reference says about them, and frozen embeddings if used.

    Without `reference_states` the base is run again at every step with a penalty.
    """

    pairs: Sequence[TokenizedPair]
    chosen_log_prob: Tensor
    rejected_log_prob: Tensor
    frozen_embeddings: PairEmbeddings | None = None
    reference_states: ReferenceStates | None = None


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
        except torch.cuda.OutOfMemoryError as error:
            raise _Ended(EndedBy.OOM, f"step {run.step + 1} ran out of device memory") from error
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
        self.objective = objective.to(policy.device)
        self.data = data
        self.plan = plan
        self.order = DataOrder(len(data.pairs), batch_size=plan.batch_size, seed=plan.seed)
        self.step = 0
        term = objective.spec.divergence_term
        self._divergence = (
            streamed_divergence(term.divergence, objective.divergence)
            if isinstance(term, PenaltyTerm) and objective.divergence is not None
            else None
        )
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
        device = policy.device
        self._reference = (data.chosen_log_prob.to(device), data.rejected_log_prob.to(device))
        frozen = data.frozen_embeddings
        self._frozen = None if frozen is None else _embeddings_to(frozen, device)

    def seconds(self) -> float:
        """Time spent by all attempts, not counting work that was lost."""
        return self._seconds_before + time.monotonic() - self._since

    def advance(self) -> None:
        """Do one optimizer step."""
        rate = self.plan.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["base_lr"]
        self._optimizer.zero_grad(set_to_none=True)
        metrics = self._accumulate(self.order.pairs_of(self.step))
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

    def _accumulate(self, index: list[int]) -> dict[str, Tensor]:
        """Backward over the micro-batches of a step; the denominator is the step's pairs."""
        pairs, kind = self.data.pairs, self.policy.device.type
        groups = micro_batches(
            pairs, index, max_pairs=MICRO_PAIRS[kind], max_tokens=MICRO_TOKENS[kind]
        )
        loss_total = self._reference[0].new_zeros(())
        totals: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            batch = collate(pairs, group, pad_id=0, device=self.policy.device)
            inputs, logps = self._inputs(batch)
            output = self.objective(inputs)
            loss = output.loss.sum() / len(index)
            if number == 0:
                loss = loss + output.regularizer
            loss.backward()
            loss_total = loss_total + loss.detach()
            for name, value in (logps | output.metrics).items():
                if value.ndim == 0:
                    totals[name] = value
                else:
                    totals[name] = totals.get(name, value.new_zeros(())) + value.sum() / len(index)
        return {"loss": loss_total, **totals}

    def _inputs(self, batch: PairBatch) -> tuple[PreferenceBatch, dict[str, Tensor]]:
        spec = self.objective.spec
        divergence = self._divergence
        from_policy = spec.kernel_term is not None and spec.kernel_term.embedding == "policy"
        reference_states = None if divergence is None else self._reference_states(batch)
        hidden = hidden_states(self.policy, batch, embeddings=from_policy)
        scores = score_tokens(
            self.policy.head,
            hidden.states,
            batch.labels,
            reference_states=reference_states,
            divergence=divergence,
        )
        embeddings = hidden.embeddings
        if spec.kernel_term is not None and not from_policy:
            assert self._frozen is not None
            embeddings = PairEmbeddings(
                self._frozen.prompt[batch.index],
                self._frozen.chosen[batch.index],
                self._frozen.rejected[batch.index],
            )
        chosen, rejected = scores.sequence_log_probs(batch)
        inputs = PreferenceBatch(
            log_ratio_chosen=chosen - self._reference[0][batch.index],
            log_ratio_rejected=rejected - self._reference[1][batch.index],
            embeddings=embeddings,
            token_divergence=None if divergence is None else scores.pair_divergence(batch),
            weight=batch.weight,
        )
        return inputs, {"logps/chosen": chosen.detach(), "logps/rejected": rejected.detach()}

    def _reference_states(self, batch: PairBatch) -> Tensor:
        if self.data.reference_states is not None:
            return self.data.reference_states.of(batch)
        with torch.no_grad(), self.policy.as_reference():
            return hidden_states(self.policy, batch, embeddings=False).states

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


def _embeddings_to(embeddings: PairEmbeddings, device: torch.device) -> PairEmbeddings:
    return PairEmbeddings(
        embeddings.prompt.to(device), embeddings.chosen.to(device), embeddings.rejected.to(device)
    )
