"""Pairs as padded tensors: [chosen; rejected] rows and where their response tokens are.

Shapes: B pairs, 2B rows (chosen first), T padded length, N response tokens of all rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.training.tokenize import TokenizedPair


@dataclass(frozen=True)
class PairBatch:
    """`positions` (N,) index flattened (2B * T) hidden states whose next token is `labels` (N,).

    `row` (N,) in [0, 2B) says whose token it is; `index` (B,) which pairs of the data these are,
    `weight` (B,) what multiplies their losses.
    """

    index: Tensor
    weight: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    positions: Tensor
    labels: Tensor
    row: Tensor

    @property
    def pairs(self) -> int:
        """B, the number of pairs."""
        return self.prompt_lengths.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """Number of response tokens, (2B,), chosen first."""
        return self.lengths - self.prompt_lengths.repeat(2)


def collate(
    pairs: Sequence[TokenizedPair], index: Sequence[int], *, pad_id: int, device: torch.device
) -> PairBatch:
    """Build the batch of `pairs[i] for i in index`, right-padded."""
    picked = [pairs[i] for i in index]
    rows = [(p.prompt, p.chosen) for p in picked] + [(p.prompt, p.rejected) for p in picked]
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    width = max(lengths)
    ids = torch.full((len(rows), width), pad_id)
    positions: list[Tensor] = []
    labels: list[int] = []
    row_of: list[int] = []
    for r, (prompt, answer) in enumerate(rows):
        ids[r, : lengths[r]] = torch.tensor(prompt + answer)
        start = r * width + len(prompt) - 1
        positions.append(torch.arange(start, start + len(answer)))
        labels.extend(answer)
        row_of.extend([r] * len(answer))
    total = torch.tensor(lengths)
    tensors = {
        "index": torch.tensor(list(index)),
        "weight": torch.tensor([p.weight for p in picked]),
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < total[:, None]).long(),
        "prompt_lengths": torch.tensor([len(p.prompt) for p in picked]),
        "lengths": total,
        "positions": torch.cat(positions),
        "labels": torch.tensor(labels),
        "row": torch.tensor(row_of),
    }
    return PairBatch(**{name: t.to(device, non_blocking=True) for name, t in tensors.items()})


def micro_batches(
    pairs: Sequence[TokenizedPair], index: Sequence[int], *, max_pairs: int, max_tokens: int
) -> list[list[int]]:
    """Split pairs into groups of similar length, none above both limits unless it is one pair.

    Sorted by length (ties by position), so that little is padded; a pure function of its
    arguments. Group sizes are as equal as the limits allow.
    """
    ordered = sorted(index, key=lambda i: pairs[i].length)
    groups: list[list[int]] = []
    size = math.ceil(len(ordered) / max(1, math.ceil(len(ordered) / max_pairs)))
    group: list[int] = []
    for i in ordered:
        if group and (len(group) == size or 2 * (len(group) + 1) * pairs[i].length > max_tokens):
            groups.append(group)
            group = []
        group.append(i)
    if group:
        groups.append(group)
    return groups


def permutation(num_pairs: int, *, seed: int, epoch: int) -> list[int]:
    """The order of pairs in an epoch: a pure function of seed and epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(num_pairs, generator=generator).tolist()
    return order


class DataOrder:
    """Which pairs an optimizer step takes: epochs' permutations one after another, cut evenly."""

    def __init__(self, num_pairs: int, *, batch_size: int, seed: int) -> None:
        self.num_pairs = num_pairs
        self.batch_size = min(batch_size, num_pairs)
        self._seed = seed
        self._epochs: dict[int, list[int]] = {}

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and offset at which step `step` (from 0) begins."""
        return divmod(step * self.batch_size, self.num_pairs)

    def pairs_of(self, step: int) -> list[int]:
        """Return the pairs of a step."""
        return list(self._stream(*self.position(step), self.batch_size))

    def _stream(self, epoch: int, offset: int, count: int) -> Iterator[int]:
        while count > 0:
            if epoch not in self._epochs:
                # Earlier epochs are never asked for again.
                self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch}
                self._epochs[epoch] = permutation(self.num_pairs, seed=self._seed, epoch=epoch)
            taken = self._epochs[epoch][offset : offset + count]
            yield from taken
            count -= len(taken)
            epoch, offset = epoch + 1, 0
