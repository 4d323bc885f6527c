"""Attention over packed pairs: each prompt once, both answers after it, pairs apart.

A packed row is `[prompt | chosen | rejected]` of one pair after another. Chosen tokens see prompt
and chosen, rejected tokens see prompt and rejected, as if both had been run as two sequences.
Three ways to compute that, equal up to rounding: `SEGMENTS` goes from pair to pair and touches no
masked block; `FLEX` is FlexAttention with a block mask, for CUDA; both are one attention function
registered with transformers. `MASK` hands a dense 4-D mask to `sdpa`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from core.errors import KdpoError

PACKED = "kdpo_packed"


class SharedAttention(StrEnum):
    """Ways to attend in a packed row."""

    SEGMENTS = "segments"
    MASK = "mask"
    FLEX = "flex"

    @property
    def implementation(self) -> str:
        """The name of transformers' attention implementation."""
        return "sdpa" if self is SharedAttention.MASK else PACKED


@dataclass(frozen=True)
class PairLengths:
    """Numbers of tokens of one packed pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def total(self) -> int:
        """Tokens of the pair in a packed row."""
        return self.prompt + self.chosen + self.rejected

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two sequences."""
        return self.prompt + max(self.chosen, self.rejected)


@dataclass(frozen=True)
class Segments:
    """Where the pairs of one packed row lie; T tokens in all."""

    pairs: tuple[PairLengths, ...]
    device: torch.device
    windows: set[int] = field(default_factory=set, compare=False)
    """Sliding windows that layers have asked for."""

    @cached_property
    def splits(self) -> list[int]:
        """Lengths into which queries, keys and values are split: prompt + chosen, rejected, ..."""
        return [n for p in self.pairs for n in (p.prompt + p.chosen, p.rejected)]

    @cached_property
    def rejected_masks(self) -> tuple[Tensor, ...]:
        """For each pair, which of prompt and rejected (columns) each rejected token sees."""
        return tuple(
            torch.ones(p.rejected, p.prompt + p.rejected, dtype=torch.bool, device=self.device)
            .tril(p.prompt)
            for p in self.pairs
        )  # fmt: skip

    @cached_property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Per token (T,): the number of its pair, and 0, 1, 2 for prompt, chosen, rejected."""
        lengths = torch.tensor([[p.prompt, p.chosen, p.rejected] for p in self.pairs])
        part = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())
        part = part.to(self.device, non_blocking=True)
        return part // 3, part % 3

    def dense_mask(self) -> Tensor:
        """What every token sees, (1, 1, T, T) bool."""
        pair, part = self.labels
        place = torch.arange(pair.shape[0], device=self.device)
        seen = (pair[:, None] == pair) & (place[:, None] >= place)
        return (seen & ((part[:, None] == part) | (part == 0)))[None, None]

    def block_mask(self) -> BlockMask:
        """The same for FlexAttention."""
        pair, part = self.labels

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            inside = (pair[query] == pair[key]) & (query >= key)
            return inside & ((part[query] == part[key]) | (part[key] == 0))

        count = pair.shape[0]
        make = _compiled_block_mask() if self.device.type == "cuda" else create_block_mask
        return make(sees, None, None, count, count, device=str(self.device))


class UnsupportedAttention(KdpoError):
    """A layer asks for something that attention over packed pairs does not compute."""

    default_code = "unsupported_attention"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    block_mask: BlockMask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' signature; (1, heads, T, d) in, (1, T, heads, d) out.

    With `segments` pair by pair, with a `block_mask` by FlexAttention, without both (generation,
    padded batches) by `sdpa`. Raises UnsupportedAttention for dropout, attention sinks, biases and
    soft caps, which it would otherwise leave out.
    """
    if segments is None and block_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    refused = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
    if dropout or refused:
        raise UnsupportedAttention(
            f"{type(module).__name__} attends with {', '.join(refused) or 'dropout'}, which packed "
            "pairs do not support"
        )
    if segments is not None and sliding_window is not None:
        segments.windows.add(sliding_window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if query.dtype != value.dtype:
        # Rotary embeddings leave float32 under autocast, which only `sdpa` knows to cast.
        query, key = query.to(value.dtype), key.to(value.dtype)
    if segments is None:
        whole: Tensor = compiled_flex()(query, key, value, block_mask=block_mask, scale=scaling)
        return whole.transpose(1, 2), None
    outputs = [
        scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        for q, k, v, mask in _blocks(segments, query, key, value, sliding_window)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _blocks(
    segments: Segments, query: Tensor, key: Tensor, value: Tensor, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Queries, keys, values and mask of every sequence; no mask means plainly causal."""
    queries, keys, values = (x.split(segments.splits, dim=2) for x in (query, key, value))
    for number, pair in enumerate(segments.pairs):
        first, second = 2 * number, 2 * number + 1
        mask = None
        if window is not None and window < pair.prompt + pair.chosen:
            mask = _windowed(pair.prompt + pair.chosen, pair.prompt + pair.chosen, window, query)
        yield queries[first], keys[first], values[first], mask
        mask = segments.rejected_masks[number]
        if window is not None and window < pair.prompt + pair.rejected:
            mask = _windowed(pair.rejected, pair.prompt + pair.rejected, window, query)
        yield (
            queries[second],
            *(torch.cat([x[first][:, :, : pair.prompt], x[second]], dim=2) for x in (keys, values)),
            mask,
        )


def _windowed(rows: int, columns: int, window: int, like: Tensor) -> Tensor:
    """The last `rows` of a causal mask in which a token sees itself and window - 1 before it."""
    ones = torch.ones(rows, columns, dtype=torch.bool, device=like.device)
    return ones.tril(columns - rows).triu(columns - rows - window + 1)


def packed_positions(pairs: tuple[PairLengths, ...]) -> Tensor:
    """Position of every token in its own sequence, (T,): rejected begins where chosen does."""
    parts = [
        torch.arange(start, start + count)
        for p in pairs
        for start, count in ((0, p.prompt), (p.prompt, p.chosen), (p.prompt, p.rejected))
    ]
    return torch.cat(parts)


def packed_starts(pairs: tuple[PairLengths, ...]) -> list[int]:
    """Where each pair begins in its row."""
    return [0, *accumulate(p.total for p in pairs)][:-1]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for rows of any length."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    """Made without the dense mask of the whole row."""
    compiled: Callable[..., BlockMask] = torch.compile(create_block_mask, dynamic=True)
    return compiled


def register() -> None:
    """Make `PACKED` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
