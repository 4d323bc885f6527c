"""One forward of chosen and rejected rows: log-probs, embeddings, divergence from the reference.

Shapes: B pairs, 2B rows (chosen first), N response tokens, H width, V vocabulary. The output layer
is applied at response positions only, in tiles, so that memory does not grow with N * V.
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
    states = policy.trunk(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    flat = states.reshape(-1, states.shape[-1])
    return Hidden(
        states=flat.index_select(0, batch.positions),
        embeddings=_pool(states, batch) if embeddings else None,
    )


def score_tokens(
    head: nn.Linear,
    states: Tensor,
    labels: Tensor,
    *,
    reference_states: Tensor | None = None,
    divergence: StreamedDivergence | None = None,
    entropy: bool = False,
) -> TokenScores:
    """Log-probs of `labels` (N,) after `states` (N, H); D(policy || reference) where asked for."""
    scores = stream_scores(
        states,
        labels,
        Head(head.weight, head.bias),
        divergence=divergence,
        reference_states=reference_states,
        entropy=entropy,
    )
    return TokenScores(scores.log_prob, scores.divergence, scores.entropy)


def _pool(states: Tensor, batch: PairBatch) -> PairEmbeddings:
    """Mean hidden state over the prompt (of the chosen row) and over each response, (B, H)."""
    b = batch.pairs
    column = torch.arange(states.shape[1], device=states.device)
    prompt_end = batch.prompt_lengths[:, None]
    of_prompt = (column < prompt_end).float()
    of_answer = ((column >= prompt_end.repeat(2, 1)) & (column < batch.lengths[:, None])).float()
    answers = _masked_mean(states, of_answer)
    return PairEmbeddings(
        prompt=_masked_mean(states[:b], of_prompt), chosen=answers[:b], rejected=answers[b:]
    )


def _masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over T of (R, T, H) where mask (R, T) is 1, float32, shape (R, H)."""
    total = torch.bmm(mask[:, None, :], states.float()).squeeze(1)
    return total / mask.sum(-1, keepdim=True)
