"""One optimizer step's loss and gradient: micro-batches of packed pairs, exact denominators.

The one place where an objective meets a model: search trials and final runs, on one device or on
several, go through `PairLoss`, so that a trial is the first steps of the run that follows it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.spec import PenaltyTerm
from objectives import HybridObjective, PairEmbeddings, PreferenceBatch, streamed_divergence
from worker.training.batches import PairBatch, collate, computed_tokens
from worker.training.evaluate import scored_batch
from worker.training.forward import hidden_states, score_tokens
from worker.training.lanes import in_lanes, lanes_of
from worker.training.model import Policy
from worker.training.ranks import ALONE, Ranks
from worker.training.states import ReferenceStates, states_missing
from worker.training.tokenize import TokenizedPair

log = logging.getLogger("kdpo.training")

MICRO_TOKENS = {"cpu": 2_048, "cuda": 32_768}
"""Tokens of a micro-batch: on a CPU what its cache serves well, on a GPU what fills it."""


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


@dataclass(frozen=True)
class ReferenceBatch:
    """What the reference says about a batch: log-probs (B,), states (N, H), embeddings (B, H)."""

    chosen: Tensor
    rejected: Tensor
    states: Tensor | None
    embeddings: PairEmbeddings | None


class PairLoss(nn.Module):
    """Policy and objective as one module, so that what wraps it sees every parameter in forward.

    Gradients of data-parallel wrappers are exchanged only for what runs inside their `forward`.
    """

    is_distributed_loading_by_transformers = False
    """Trainer's name for a model that is sharded already and must not be wrapped again."""

    def __init__(self, policy: Policy, objective: HybridObjective) -> None:
        super().__init__()
        self.model = policy.model
        self.objective = objective.to(policy.device)
        self._policy = policy
        term = objective.spec.divergence_term
        self.divergence = (
            streamed_divergence(term.divergence, objective.divergence)
            if isinstance(term, PenaltyTerm) and objective.divergence is not None
            else None
        )

    def forward(
        self, batch: PairBatch, reference: ReferenceBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of the pairs' losses, the objective's regularizer, and metrics ((B,) or scalar)."""
        spec = self.objective.spec
        from_policy = spec.kernel_term is not None and spec.kernel_term.embedding == "policy"
        states = reference.states
        if states is None and self.divergence is not None:
            with torch.no_grad(), self._policy.as_reference():
                states = hidden_states(self._policy, batch, embeddings=False).states
        hidden = hidden_states(self._policy, batch, embeddings=from_policy)
        scores = score_tokens(
            self._policy.head,
            hidden.states,
            batch.labels,
            reference_states=states if self.divergence is not None else None,
            reference_head=self._policy.reference_head if self.divergence is not None else None,
            divergence=self.divergence,
        )
        chosen, rejected = scores.sequence_log_probs(batch)
        output = self.objective(
            PreferenceBatch(
                log_ratio_chosen=chosen - reference.chosen,
                log_ratio_rejected=rejected - reference.rejected,
                embeddings=hidden.embeddings if from_policy else reference.embeddings,
                token_divergence=None if self.divergence is None else scores.pair_divergence(batch),
                weight=batch.weight,
            )
        )
        metrics = {"logps/chosen": chosen.detach(), "logps/rejected": rejected.detach()}
        return output.loss.sum(), output.regularizer, metrics | output.metrics

    def scored(self, batch: PairBatch, base: Tensor) -> Tensor:
        """`scored_batch` of the policy, for wrappers that must know when the model runs."""
        return scored_batch(self._policy, batch, base)


class _Part(NamedTuple):
    """A micro-batch that is done: its pairs, its part of the loss, and metrics."""

    group: list[int]
    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class PairStep:
    """Gradients and metrics of the pairs of one optimizer step.

    `module` is a `PairLoss` or what wraps it; `unsynced` makes the context in which a wrapper keeps
    its gradients to itself. A micro-batch that runs out of device memory halves `max_tokens` for
    good and the step begins again: sums over pairs do not depend on how they are cut.
    """

    loss: PairLoss
    policy: Policy
    data: TrainingData
    module: nn.Module | None = None
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext
    max_tokens: int = 0
    ranks: Ranks = ALONE
    _lanes: int = field(init=False)
    _chosen: Tensor = field(init=False)
    _rejected: Tensor = field(init=False)
    _frozen: PairEmbeddings | None = field(init=False)

    def __post_init__(self) -> None:
        device = self.policy.device
        if self.policy.is_full and self.loss.divergence and self.data.reference_states is None:
            raise states_missing("a divergence penalty is measured from")
        # The adapter is switched off for the base, in all lanes at once; and a lane's gradients are
        # as large as what is trained.
        runs_base = self.loss.divergence is not None and self.data.reference_states is None
        is_alone = self.ranks.size > 1 or runs_base or self.policy.is_full
        self._lanes = 1 if is_alone else lanes_of(self.policy)
        self.max_tokens = self.max_tokens or MICRO_TOKENS.get(device.type, MICRO_TOKENS["cuda"])
        self._chosen = self.data.chosen_log_prob.to(device)
        self._rejected = self.data.rejected_log_prob.to(device)
        frozen = self.data.frozen_embeddings
        self._frozen = None if frozen is None else _moved(frozen, device)

    def accumulate(
        self, index: Sequence[int], *, denominator: int, clear: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Backward over `index`, with every pair's loss over `denominator`; returns mean metrics.

        `clear` drops gradients; it is called first, and again when the step has to begin again.
        Where several processes train, each does its part, and both results are of the whole.

        Raises:
            torch.OutOfMemoryError: a micro-batch of one pair does not fit, or, where several
                processes train, any does not: the others are at another point of the step.
        """
        while True:
            clear()
            try:
                return self.ranks.sum(self._accumulate(index, denominator=denominator))
            except torch.OutOfMemoryError:
                if self.ranks.size > 1 or not self._halve(index):
                    raise
            # Outside the handler: the exception's frames hold the tensors that did not fit.
            clear()
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()

    def _halve(self, index: Sequence[int]) -> bool:
        """Cut the token budget; False when every micro-batch is a single pair already."""
        groups = self._groups(index)
        if all(len(group) == 1 for group in groups):
            return False
        largest = max(
            sum(computed_tokens(self.data.pairs[i], self.policy.form) for i in group)
            for group in groups
        )
        self.max_tokens = max(1, min(self.max_tokens, largest) // 2)
        log.warning("out of device memory: micro-batches have %d tokens now", self.max_tokens)
        return True

    def _groups(self, index: Sequence[int]) -> list[list[int]]:
        return self.ranks.micro_batches(
            self.data.pairs,
            index,
            max_tokens=self.max_tokens,
            form=self.policy.form,
            lanes=self._lanes,
        )

    def _accumulate(self, index: Sequence[int], *, denominator: int) -> dict[str, Tensor]:
        groups, size = self._groups(index), self.ranks.size
        parts = (
            self._side_by_side(groups, denominator)
            if self._lanes > 1
            else self._one_by_one(groups, denominator / size, stand_in=index[0])
        )
        loss_total = self._chosen.new_zeros(())
        totals: dict[str, Tensor] = {}
        for group, loss, metrics in parts:
            loss_total = loss_total + loss / size
            for name, value in metrics.items():
                if value.ndim == 0:
                    totals[name] = value / size
                elif group:
                    share = value.sum() / len(index)
                    totals[name] = totals[name] + share if name in totals else share
        return {"loss": loss_total, **totals}

    def _one_by_one(
        self, groups: Sequence[list[int]], denominator: float, *, stand_in: int
    ) -> Iterator[_Part]:
        """Micro-batches one after another; gradients go where backward leaves them."""
        module = self.loss if self.module is None else self.module
        for is_last, group in _with_last(groups):
            # Without pairs of its own a process runs one that does not count: others wait for it.
            batch = self._collated(group or [stand_in])
            with nullcontext() if is_last else self.unsynced():
                losses, regularizer, metrics = module(batch, self._reference(batch))
                # What wraps the loss takes the mean over processes; the sum is wanted.
                loss = losses / denominator if group else losses * 0.0
                if is_last:
                    loss = loss + regularizer
                loss.backward()
            yield _Part(group, loss.detach(), metrics)

    def _side_by_side(self, groups: Sequence[list[int]], denominator: float) -> Iterator[_Part]:
        """Micro-batches in lanes; their gradients are added in the order of the groups.

        The same sums whichever lane is faster: lanes that all add to `.grad` would add in the
        order in which they end.
        """
        trained = [p for p in self.loss.parameters() if p.requires_grad]

        def part(numbered: tuple[bool, list[int]]) -> tuple[_Part, tuple[Tensor | None, ...]]:
            is_last, group = numbered
            batch = self._collated(group)
            losses, regularizer, metrics = self.loss(batch, self._reference(batch))
            loss = losses / denominator + regularizer if is_last else losses / denominator
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            return _Part(group, loss.detach(), metrics), gradients

        numbered = list(_with_last(groups))
        with closing(in_lanes(numbered, part, lanes=self._lanes, gradients=True)) as parts:
            for found, gradients in parts:
                for parameter, gradient in zip(trained, gradients, strict=True):
                    if gradient is not None:
                        parameter.grad = (
                            gradient if parameter.grad is None else parameter.grad.add_(gradient)
                        )
                yield found

    def _collated(self, group: Sequence[int]) -> PairBatch:
        return collate(self.data.pairs, group, form=self.policy.form, device=self.policy.device)

    def _reference(self, batch: PairBatch) -> ReferenceBatch:
        states = self.data.reference_states
        frozen = self._frozen
        return ReferenceBatch(
            chosen=self._chosen[batch.index],
            rejected=self._rejected[batch.index],
            states=states.of(batch) if states is not None and self.loss.divergence else None,
            embeddings=None
            if frozen is None
            else PairEmbeddings(
                frozen.prompt[batch.index],
                frozen.chosen[batch.index],
                frozen.rejected[batch.index],
            ),
        )


def _with_last(groups: Sequence[list[int]]) -> Iterator[tuple[bool, list[int]]]:
    for number, group in enumerate(groups, start=1):
        yield number == len(groups), group


def _moved(embeddings: PairEmbeddings, device: torch.device) -> PairEmbeddings:
    return PairEmbeddings(
        embeddings.prompt.to(device), embeddings.chosen.to(device), embeddings.rejected.to(device)
    )
