"""Tiles of tokens × vocabulary: logits of policy and reference become P and slopes in place."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from objectives.divergences.closed_forms import REACH, Block, Form
from objectives.numerics import token_log_probs
from objectives.types import Divergence

_UPCAST_ROWS = 4096
_PLAIN_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class StreamedDivergence:
    """A divergence for streaming: its closed form, and the plain function for extreme tokens."""

    form: Form
    exact: Divergence


@dataclass(frozen=True)
class Head:
    """An output layer: weight (V, H) and bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Job:
    """What to compute, and how much of it at once; `shared`: one head for both sides."""

    divergence: StreamedDivergence | None
    shared: bool
    entropy: bool
    gradients: bool
    tile: int
    block: int


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call, as `stream_scores` has them; no reference is an empty tensor."""

    states: Tensor
    labels: Tensor
    head: Head
    reference_states: Tensor
    reference_head: Head

    @property
    def dtype(self) -> torch.dtype:
        """Precision of all that is computed."""
        return torch.float64 if self.states.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Scores:
    """Results (N,), filled tile by tile."""

    log_prob: Tensor
    divergence: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Tile:
    """Tokens of one tile after element-wise work.

    `softmax` (n, V) is P = Z p and `slope` (n, V) that of D, their rows to be multiplied with
    `inverse_z` and `slope_scale` (n, 1) for p and dD/dlogits. They lie one after the other.
    """

    rows: Tensor
    softmax: Tensor
    slope: Tensor | None
    inverse_z: Tensor
    slope_scale: Tensor


def tiles(
    job: Job, inputs: Inputs, scores: Scores, *, slopes: bool
) -> Iterator[tuple[slice, Tile]]:
    """Go through the tokens; fills `scores` and yields what gradients are made of."""
    count, vocabulary = inputs.states.shape[0], inputs.head.weight.shape[0]
    if count == 0:
        return
    sides = 1 if job.divergence is None else 2
    height = min(count, max(1, job.tile // vocabulary))
    block = min(height, max(1, job.block // vocabulary))
    make = inputs.states.new_empty
    buffer = make((sides * height, vocabulary), dtype=inputs.dtype)
    scratch = make((2, block, vocabulary), dtype=inputs.dtype)
    for start, stop in spans(count, height):
        part, size = slice(start, stop), stop - start
        rows = buffer[: sides * size]
        differences = _logits(job, inputs, part, rows)
        scales = make((2, size, 1), dtype=inputs.dtype)
        for first, last in spans(size, block):
            inner = slice(first, last)
            _measure(
                job,
                _BlockView(
                    logits=rows[inner],
                    other=None if sides == 1 else rows[size + first : size + last],
                    differences=differences,
                    labels=inputs.labels[start + first : start + last],
                    spare=scratch[:, : last - first],
                ),
                Scores(
                    scores.log_prob[start + first : start + last],
                    scores.divergence[start + first : start + last],
                    scores.entropy[start + first : start + last],
                ),
                scales[:, inner],
                slopes=slopes,
            )
        yield (
            part,
            Tile(rows, rows[:size], None if sides == 1 else rows[size:], scales[0], scales[1]),
        )


def _logits(job: Job, inputs: Inputs, part: slice, out: Tensor) -> bool:
    """Policy logits into the first half of `out`; into the second the reference's.

    With one head for both, the second half gets differences W (h0 - h) instead and True comes
    back: small drift then keeps its digits, which two rounded logits would lose.
    """
    size = part.stop - part.start
    states = inputs.states[part]
    if job.divergence is None:
        project(states, inputs.head, out)
        return False
    base = inputs.reference_states[part]
    exact = states.dtype == inputs.head.weight.dtype == inputs.dtype
    if job.shared and (exact or states.device.type == "cpu"):
        wide = states.to(inputs.dtype)
        project(torch.cat([wide, base.to(inputs.dtype) - wide]), Head(inputs.head.weight), out)
        if inputs.head.bias is not None:
            out[:size] += inputs.head.bias
        return True
    project(states, inputs.head, out[:size])
    project(base, inputs.reference_head, out[size:])
    return False


@dataclass(frozen=True)
class _BlockView:
    """Rows of a tile that are worked on at once, each (n, V); `spare` is (2, n, V)."""

    logits: Tensor
    other: Tensor | None
    differences: bool
    labels: Tensor
    spare: Tensor


def _measure(job: Job, view: _BlockView, scores: Scores, scales: Tensor, *, slopes: bool) -> None:
    """Turn logits into P and its partner into the slope of D, in place; fill scores and scales.

    Rows outside the domain of the closed forms are kept, and done by the plain functions after.
    """
    logits, other = view.logits, view.other
    # amin and amax are vectorised, aminmax along a dimension is not.
    high = logits.amax(-1, keepdim=True)
    ordinary = high[:, 0] - logits.amin(-1) <= REACH
    if other is not None:
        assert job.divergence is not None
        if not view.differences:
            torch.sub(other, logits, out=view.spare[0])
        gap = other if view.differences else view.spare[0]
        ordinary &= gap.amax(-1) - gap.amin(-1) <= job.divergence.form.reach
    extreme = (~ordinary).nonzero()[:, 0]
    count = extreme.shape[0]
    kept = [x.index_select(0, extreme) for x in (logits, other) if x is not None and count]
    if count < logits.shape[0]:
        _measure_closed(job, view, high, scores, scales, slopes=slopes)
    for start, stop in spans(count, max(1, _PLAIN_ELEMENTS // logits.shape[-1])):
        rows, here = extreme[start:stop], slice(start, stop)
        few = _BlockView(
            logits=kept[0][here],
            other=None if other is None else kept[1][here],
            differences=view.differences,
            labels=view.labels[rows],
            spare=view.spare,
        )
        of_rows = Scores(*(logits.new_empty(stop - start) for _ in range(3)))
        _measure_plainly(job, few, of_rows, slopes=slopes)
        for whole, part in (
            (logits, few.logits),
            (other, few.other),
            (scores.log_prob, of_rows.log_prob),
            (scores.divergence, of_rows.divergence),
            (scores.entropy, of_rows.entropy),
        ):
            if whole is not None and part is not None:
                whole.index_copy_(0, rows, part)
        scales.index_fill_(1, rows, 1.0)


def _measure_closed(
    job: Job, view: _BlockView, high: Tensor, scores: Scores, scales: Tensor, *, slopes: bool
) -> None:
    """By closed forms; `high` (n, 1) are the largest logits, and rows out of reach are not used."""
    logits, other = view.logits, view.other
    chosen = logits.gather(-1, view.labels[:, None]) - high
    z = logits.sub_(high).exp_().sum(-1, keepdim=True)
    torch.reciprocal(z, out=scales[0])
    log_z = z.log_()
    torch.sub(chosen[:, 0], log_z[:, 0], out=scores.log_prob)
    if job.entropy:
        terms = torch.special.entr(logits, out=view.spare[1]).sum(-1)
        torch.add(log_z[:, 0], terms * scales[0, :, 0], out=scores.entropy)
    if other is None:
        return
    assert job.divergence is not None
    if not view.differences:
        other.copy_(view.spare[0])
    measured = job.divergence.form(_block(job, logits, other, view.spare, scales[0]))
    scores.divergence.copy_(measured.value[:, 0])
    if slopes:
        scales[1].copy_(measured.scale * scales[0])
        torch.addcmul(measured.slope, logits, -measured.total, out=other)


def _block(job: Job, p: Tensor, gap: Tensor, spare: Tensor, inverse_z: Tensor) -> Block:
    """V = log q - log p from differences of logits, so that Σ p e^v = 1 to the last digit."""
    assert job.divergence is not None
    centre = torch.mul(p, gap, out=spare[0]).sum(-1, keepdim=True).mul_(inverse_z)
    gap.sub_(centre)
    mass = torch.expm1(gap, out=spare[0]).mul_(p)
    shift = mass.sum(-1, keepdim=True).mul_(inverse_z)
    gap.sub_(shift.log1p())
    if job.divergence.form.uses_mass:
        mass.addcmul_(p, -shift).div_(1.0 + shift)
    return Block(p=p, v=gap, mass=mass, spare=spare[1], inverse_z=inverse_z)


def _measure_plainly(job: Job, view: _BlockView, scores: Scores, *, slopes: bool) -> None:
    """The same by the plain functions and autograd: floors, knees, infinite logits; Z is 1."""
    logits, other = view.logits, view.other
    slopes = slopes and other is not None
    scores.log_prob.copy_(token_log_probs(logits, view.labels))
    leaf = logits.clone().requires_grad_(slopes)
    with torch.set_grad_enabled(slopes):
        log_p = leaf.log_softmax(-1)
        if other is not None:
            assert job.divergence is not None
            base = other + logits if view.differences else other
            value = job.divergence.exact(log_p, base.log_softmax(-1))
    scores.entropy.copy_(torch.special.entr(log_p.detach().exp()).sum(-1))
    if other is not None:
        scores.divergence.copy_(value.detach())
        if slopes:
            other.copy_(torch.autograd.grad(value, leaf, torch.ones_like(value))[0])
    torch.exp(log_p.detach(), out=logits)


def project(states: Tensor, head: Head, out: Tensor) -> None:
    """Logits states Wᵀ + b (n, V) in the precision of `out`, whatever that of the head."""
    weight = head.weight
    if states.dtype == weight.dtype == out.dtype:
        torch.mm(states, weight.T, out=out)
    elif states.is_cuda and states.dtype == weight.dtype and out.dtype == torch.float32:
        torch.mm(states, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = states.to(out.dtype)
        for start, stop in spans(weight.shape[0], _UPCAST_ROWS):
            out[:, start:stop] = wide @ weight[start:stop].to(out.dtype).T
    if head.bias is not None:
        out += head.bias


def back_project(rows: Tensor, weight: Tensor) -> Tensor:
    """Products rows W (n, H) in the precision of `rows`."""
    if rows.dtype == weight.dtype:
        return rows @ weight
    if rows.is_cuda and rows.dtype == torch.float32:
        return torch.mm(rows.to(weight.dtype), weight, out_dtype=torch.float32)
    product = rows.new_zeros(rows.shape[0], weight.shape[1])
    for start, stop in spans(weight.shape[0], _UPCAST_ROWS):
        product.addmm_(rows[:, start:stop], weight[start:stop].to(rows.dtype))
    return product


def spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of `step` numbers that make up range(count), the last one shorter."""
    return pairwise([*range(0, count, step), count])
