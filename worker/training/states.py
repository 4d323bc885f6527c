"""The reference's last hidden states before every response token, kept for penalties and drift.

Shapes: n pairs, T response tokens of all of them, H width, B pairs and N tokens of one batch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.training.batches import PairBatch, collate, micro_batches
from worker.training.forward import hidden_states
from worker.training.model import Policy
from worker.training.reference import FORWARD_TOKENS, Progress
from worker.training.tokenize import TokenizedPair

log = logging.getLogger("kdpo.training")


@dataclass(frozen=True)
class ReferenceStates:
    """`states` (T, H); row r of 2n (chosen answers, then rejected) begins at `starts[r]`."""

    states: Tensor
    starts: Tensor
    lengths: Tensor

    def of(self, batch: PairBatch) -> Tensor:
        """Return the states of a batch in the order of its labels, (N, H)."""
        rows = torch.cat([batch.index, batch.index + self.starts.shape[0] // 2])
        return self.states.index_select(0, self._places(rows, batch.labels.shape[0]))

    def _places(self, rows: Tensor, count: int) -> Tensor:
        lengths = self.lengths[rows]
        shift = self.starts[rows] - (lengths.cumsum(0) - lengths)
        places = torch.arange(count, device=rows.device)
        return places + shift.repeat_interleave(lengths, output_size=count)


@torch.no_grad()
def reference_states(
    policy: Policy, pairs: Sequence[TokenizedPair], *, budget_bytes: int, progress: Progress
) -> ReferenceStates | None:
    """Run the frozen trunk over all pairs once; None when the states would pass the budget.

    Batches are those of `evaluate.measure`, so that there an untrained policy has exactly these
    states. `progress(pairs done, pairs in all)` may raise to stop.
    """
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    lengths = torch.tensor([len(answer) for answer in answers], device=policy.device)
    total, dtype = int(lengths.sum()), next(policy.trunk.parameters()).dtype
    needed = total * policy.hidden_size * dtype.itemsize
    kept = needed <= budget_bytes
    log.info(
        "reference states of %d tokens need %d bytes, the budget is %d: %s",
        total, needed, budget_bytes, "kept" if kept else "the base is run again at every step",
    )  # fmt: skip
    if not kept:
        return None
    states = torch.empty(total, policy.hidden_size, dtype=dtype, device=policy.device)
    table = ReferenceStates(states, starts=lengths.cumsum(0) - lengths, lengths=lengths)
    done, n = 0, len(pairs)
    groups = micro_batches(pairs, range(n), max_tokens=FORWARD_TOKENS, form=policy.form)
    with policy.as_reference():
        for group in groups:
            batch = collate(pairs, group, form=policy.form, device=policy.device)
            rows = torch.cat([batch.index, batch.index + n])
            places = table._places(rows, batch.labels.shape[0])
            states[places] = hidden_states(policy, batch, embeddings=False).states
            done += len(group)
            progress(done, n)
    return table
