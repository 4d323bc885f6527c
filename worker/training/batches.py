"""Pairs as tensors, and where their response tokens are.

Shapes: B pairs, N response tokens of all answers (chosen answers pair by pair, then rejected), T
tokens of a packed row. Two forms: `SHARED` packs `[prompt | chosen | rejected]` of one pair after
another into one row, so that each prompt is computed once and nothing is padded; `PLAIN` is 2B
right-padded rows, chosen first, for models that cannot attend in a packed row.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from worker.training.attention import PairLengths, Segments, packed_positions, packed_starts
from worker.training.tokenize import TokenizedPair


class Form(StrEnum):
    """How pairs lie in a batch."""

    SHARED = "shared"
    PLAIN = "plain"


@dataclass(frozen=True)
class PairBatch:
    """`states_at` (N,) index flattened hidden states whose next token is `labels` (N,).

    `row` (N,) in [0, 2B) says whose token it is, chosen answers first; `order` and `index` (B,) are
    which pairs of the data these are, `weight` (B,) what multiplies their losses. `part` says for
    every flattened state which text it belongs to: prompts are [0, B), chosen answers [B, 2B),
    rejected ones [2B, 3B), and 3B is none of them; `part_lengths` (3B,) are their tokens.
    """

    order: tuple[int, ...]
    index: Tensor
    weight: Tensor
    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    segments: Segments | None
    states_at: Tensor
    labels: Tensor
    row: Tensor
    part: Tensor
    part_lengths: Tensor

    @property
    def pairs(self) -> int:
        """B, the number of pairs."""
        return len(self.order)


def collate(
    pairs: Sequence[TokenizedPair], index: Sequence[int], *, form: Form, device: torch.device
) -> PairBatch:
    """Build the batch of `pairs[i] for i in index`."""
    picked = [pairs[i] for i in index]
    layout = _packed(picked) if form is Form.SHARED else _padded(picked)
    answers = [p.chosen for p in picked] + [p.rejected for p in picked]
    lengths = torch.tensor([len(p.prompt) for p in picked] + [len(a) for a in answers])
    tensors = {
        "index": torch.tensor(list(index)),
        "weight": torch.tensor([p.weight for p in picked]),
        "labels": torch.tensor([token for answer in answers for token in answer]),
        "row": torch.arange(len(answers)).repeat_interleave(lengths[len(picked) :]),
        "part_lengths": lengths,
        "input_ids": layout.input_ids,
        "states_at": layout.states_at,
        "part": layout.part,
    }
    segments = Segments(tuple(_lengths(p) for p in picked), device) if form is Form.SHARED else None
    position_ids, mask = layout.position_ids, layout.attention_mask
    return PairBatch(
        order=tuple(index),
        position_ids=None if position_ids is None else position_ids.to(device, non_blocking=True),
        attention_mask=None if mask is None else mask.to(device, non_blocking=True),
        segments=segments,
        **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()},
    )


@dataclass(frozen=True)
class _Layout:
    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    states_at: Tensor
    part: Tensor


def _lengths(pair: TokenizedPair) -> PairLengths:
    return PairLengths(len(pair.prompt), len(pair.chosen), len(pair.rejected))


def _packed(picked: Sequence[TokenizedPair]) -> _Layout:
    lengths = tuple(_lengths(p) for p in picked)
    ids = [token for p in picked for part in (p.prompt, p.chosen, p.rejected) for token in part]
    chosen, rejected = [], []
    for start, n in zip(packed_starts(lengths), lengths, strict=True):
        # Both answers begin after the prompt's last token.
        prompt_end, chosen_end = start + n.prompt - 1, start + n.prompt + n.chosen - 1
        chosen.append(torch.arange(prompt_end, chosen_end))
        rejected += [
            torch.tensor([prompt_end]),
            torch.arange(chosen_end + 1, chosen_end + n.rejected),
        ]
    b = len(picked)
    numbers = torch.tensor([[i, b + i, 2 * b + i] for i in range(b)]).flatten()
    counts = torch.tensor([[n.prompt, n.chosen, n.rejected] for n in lengths]).flatten()
    return _Layout(
        input_ids=torch.tensor([ids]),
        position_ids=packed_positions(lengths)[None],
        attention_mask=None,
        states_at=torch.cat([*chosen, *rejected]),
        part=numbers.repeat_interleave(counts),
    )


def _padded(picked: Sequence[TokenizedPair]) -> _Layout:
    rows = [(p.prompt, p.chosen) for p in picked] + [(p.prompt, p.rejected) for p in picked]
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
    width, b = int(lengths.max()), len(picked)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    part = torch.full((len(rows), width), 3 * b)
    states_at = []
    for r, (prompt, answer) in enumerate(rows):
        p, end = len(prompt), len(prompt) + len(answer)
        ids[r, :end] = torch.tensor(prompt + answer)
        states_at.append(torch.arange(r * width + p - 1, r * width + end - 1))
        if r < b:
            part[r, :p] = r
        part[r, p:end] = b + r
    return _Layout(
        input_ids=ids,
        position_ids=None,
        attention_mask=(torch.arange(width) < lengths[:, None]).long(),
        states_at=torch.cat(states_at),
        part=part.flatten(),
    )


def computed_tokens(pair: TokenizedPair, form: Form) -> int:
    """Tokens that a model runs through for a pair, padding not counted."""
    answers = len(pair.chosen) + len(pair.rejected)
    return answers + len(pair.prompt) * (1 if form is Form.SHARED else 2)


def micro_batches(
    pairs: Sequence[TokenizedPair],
    index: Sequence[int],
    *,
    max_tokens: int,
    form: Form,
    lanes: int = 1,
) -> list[list[int]]:
    """Split pairs into groups of at most `max_tokens` tokens each, padding included.

    A pair above the limit is a group of its own. A pure function of its arguments. Packed rows are
    filled evenly: longest pair first, each into the row that has least; padded ones are cut from
    the pairs sorted by length, so that little is padded. Where several run at once, in `lanes`, as
    many groups as keep all of them busy.
    """
    if form is Form.PLAIN and lanes == 1:
        return _sorted_groups(pairs, index, max_tokens=max_tokens)
    sizes = {i: computed_tokens(pairs[i], form) for i in index}
    count = lanes * max(1, math.ceil(sum(sizes[i] for i in index) / (lanes * max_tokens)))
    while True:
        if form is Form.PLAIN:
            groups = _even_groups(pairs, index, count)
            tokens = [2 * len(g) * max(pairs[i].length for i in g) for g in groups]
        else:
            groups = spread(index, sizes, count)
            tokens = [sum(sizes[i] for i in g) for g in groups]
        fits = all(len(g) == 1 or n <= max_tokens for g, n in zip(groups, tokens, strict=True))
        if fits:
            return groups
        if count >= len(index):
            return [[i] for i in index]
        count += lanes


def spread(index: Sequence[int], sizes: Mapping[int, int], count: int) -> list[list[int]]:
    """Up to `count` groups of about the same size: largest first, each into the emptiest group."""
    groups: list[list[int]] = [[] for _ in range(min(count, len(index)))]
    heap = [(0, number) for number in range(len(groups))]
    for i in sorted(index, key=lambda i: (-sizes[i], i)):
        filled, number = heapq.heappop(heap)
        groups[number].append(i)
        heapq.heappush(heap, (filled + sizes[i], number))
    return groups


def _even_groups(
    pairs: Sequence[TokenizedPair], index: Sequence[int], count: int
) -> list[list[int]]:
    """Up to `count` groups of about as many tokens, cut from the pairs sorted by length."""
    order = sorted(index, key=lambda i: (pairs[i].length, i))
    total, before = sum(pairs[i].length for i in order), 0
    groups: list[list[int]] = [[] for _ in range(min(count, len(order)))]
    for i in order:
        middle = before + pairs[i].length / 2
        groups[min(len(groups) - 1, int(middle * len(groups) / total))].append(i)
        before += pairs[i].length
    return [group for group in groups if group]


def _sorted_groups(
    pairs: Sequence[TokenizedPair], index: Sequence[int], *, max_tokens: int
) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in sorted(index, key=lambda i: (pairs[i].length, i)):
        if groups and 2 * (len(groups[-1]) + 1) * pairs[i].length <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
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
