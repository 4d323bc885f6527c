"""One forward of chosen and rejected rows: log-probs, embeddings, divergence from the reference.

Shapes: B pairs, 2B rows (chosen first), N response tokens, H width, V vocabulary. The output layer
is applied at response positions only, in chunks, so that memory does not grow with N * V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from objectives import Divergence, PairEmbeddings, per_pair_mean, segment_sum, token_log_probs
from worker.training.batches import PairBatch
from worker.training.model import Policy

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once (64 MiB in float32); beyond, chunks are recomputed in backward."""


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
    divergence: Divergence | None = None,
    entropy: bool = False,
) -> TokenScores:
    """Log-probs of `labels` (N,) after `states` (N, H); D(policy || reference) where asked for."""
    rows = max(1, CHUNK_ELEMENTS // head.out_features)
    chunks: list[TokenScores] = []
    for start in range(0, labels.shape[0], rows):
        part = slice(start, start + rows)
        arguments = (
            head,
            states[part],
            labels[part],
            None if reference_states is None else reference_states[part],
            divergence,
            entropy,
        )
        if labels.shape[0] > rows and torch.is_grad_enabled():
            chunks.append(checkpoint(_score_chunk, *arguments, use_reentrant=False))
        else:
            chunks.append(_score_chunk(*arguments))
    return TokenScores(
        log_prob=torch.cat([c.log_prob for c in chunks]),
        divergence=_joined([c.divergence for c in chunks]),
        entropy=_joined([c.entropy for c in chunks]),
    )


def _score_chunk(
    head: nn.Linear,
    states: Tensor,
    labels: Tensor,
    reference_states: Tensor | None,
    divergence: Divergence | None,
    entropy: bool,
) -> TokenScores:
    logits = head(states)
    # One formula whatever else is asked for: equal states give equal log-probs, to the bit.
    log_prob = token_log_probs(logits, labels)
    if divergence is None and not entropy:
        return TokenScores(log_prob, None, None)
    log_p = logits.float().log_softmax(-1)
    measured = None
    if divergence is not None:
        assert reference_states is not None
        with torch.no_grad():
            log_q = head(reference_states).float().log_softmax(-1)
        measured = divergence(log_p, log_q)
    return TokenScores(
        log_prob=log_prob,
        divergence=measured,
        entropy=-(log_p.exp() * log_p).sum(-1) if entropy else None,
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


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
