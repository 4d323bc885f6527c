"""One forward of a batch of pairs: log-probs, embeddings, divergence from the reference.

Shapes: B pairs, 2B answers (chosen first), N response tokens, H width, V vocabulary. The output
layer is applied at response positions only, in tiles, so that memory does not grow with N * V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from objectives import (
    Head,
    PairEmbeddings,
    StreamedDivergence,
    per_pair_mean,
    segment_sum,
    stream_scores,
)
from worker.training.batches import PairBatch
from worker.training.model import Policy
from worker.training.sharing import run_trunk


@dataclass(frozen=True)
class Hidden:
    """Last hidden states: (N, H) before each response token, and pooled ones where asked for."""

    states: Tensor
    embeddings: PairEmbeddings | None


@dataclass(frozen=True)
class TokenScores:
    """Per response token, (N,) float32: log-prob, divergence from the reference, entropy."""

    log_prob: Tensor
    divergence: Tensor | None
    entropy: Tensor | None

    def sequence_log_probs(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Summed over response tokens, (B,) chosen and (B,) rejected."""
        sums = segment_sum(self.log_prob, batch.row, 2 * batch.pairs)
        return sums[: batch.pairs], sums[batch.pairs :]

    def pair_divergence(self, batch: PairBatch) -> Tensor:
        """Mean over the response tokens of both answers, (B,)."""
        assert self.divergence is not None
        return per_pair_mean(self.divergence, batch.row % batch.pairs, batch.pairs)


def hidden_states(policy: Policy, batch: PairBatch, *, embeddings: bool) -> Hidden:
    """Run the trunk once; the adapter counts unless the caller is in `policy.as_reference()`."""
    with policy.computing():
        states = run_trunk(policy.causal, batch, attention=policy.attention)
    return Hidden(
        states=states.index_select(0, batch.states_at),
        embeddings=_pool(states, batch) if embeddings else None,
    )


def score_tokens(
    head: nn.Linear | Head,
    states: Tensor,
    labels: Tensor,
    *,
    reference_states: Tensor | None = None,
    reference_head: Head | None = None,
    divergence: StreamedDivergence | None = None,
    entropy: bool = False,
) -> TokenScores:
    """Log-probs of `labels` (N,) after `states` (N, H); D(policy || reference) where asked for.

    `reference_head` is given where the policy's own output layer is trained.
    """
    scores = stream_scores(
        states,
        labels,
        Head(head.weight, head.bias),
        divergence=divergence,
        reference_states=reference_states,
        reference_head=reference_head,
        entropy=entropy,
    )
    return TokenScores(scores.log_prob, scores.divergence, scores.entropy)


def _pool(states: Tensor, batch: PairBatch) -> PairEmbeddings:
    """Mean hidden state over each prompt and each answer, float32, (B, H) each."""
    parts = torch.arange(batch.part_lengths.shape[0], device=states.device)
    share = (batch.part == parts[:, None]) / batch.part_lengths[:, None]
    return PairEmbeddings(*(share @ states.float()).split(batch.pairs))
