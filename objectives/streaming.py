"""Log-probabilities and divergences from hidden states, in tiles of tokens × vocabulary.

For N tokens, width H and V tokens in the vocabulary no more than two tiles of `tile_elements`
numbers exist at once, forward and backward. A tile holds whole rows of logits, so normalisation is
exact. With a frozen head the forward pass leaves d log p / d states and d D / d states (N, H), and
backward only weighs them by token: three products of policy, reference and head, as many as
without tiles. With a trained head backward makes the tiles again, once the weights are known.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from core.spec import DivergenceSpec
from objectives.divergences.closed_forms import REACH, Block, Form, Measured, closed_form
from objectives.numerics import token_log_probs, upcast
from objectives.types import Divergence

TILE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Numbers in a tile: few passes over the head, and little beside a model's own activations."""

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}
"""Numbers that element-wise work goes through at once: on a CPU, what its cache holds."""

_UPCAST_ROWS = 4096


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
class StreamedScores:
    """Per token (N,), float32 at least: label log-probability, D(p‖q), entropy of p (detached)."""

    log_prob: Tensor
    divergence: Tensor | None
    entropy: Tensor | None


def streamed_divergence(spec: DivergenceSpec, exact: Divergence) -> StreamedDivergence:
    """A divergence for `stream_scores`; `exact` is what `build_divergence` made of the same spec.

    Raises ValueError when a wasserstein spec comes with something else.
    """
    return StreamedDivergence(form=closed_form(spec, exact), exact=exact)


@torch.compiler.disable
def stream_scores(
    states: Tensor,
    labels: Tensor,
    head: Head,
    *,
    divergence: StreamedDivergence | None = None,
    reference_states: Tensor | None = None,
    reference_head: Head | None = None,
    entropy: bool = False,
    tile_elements: int | None = None,
) -> StreamedScores:
    """Score labels (N,) after states (N, H), and D to the reference's next-token distribution.

    The reference has its own states (N, H0), taken as constants, and the policy's head unless
    `reference_head` is given: give one where the policy's head is trained. Gradients go to states
    and to a head that requires them, whatever the loss does with the tokens. Computed in float32
    at least, under autocast too. Raises ValueError when shapes do not fit together or reference
    states come without a divergence (or the other way round).
    """
    _check(states, labels, head, divergence, reference_states, reference_head)
    job = _Job(
        divergence=divergence,
        shared=reference_head is None,
        entropy=entropy,
        tile=_budget(TILE_ELEMENTS, states) if tile_elements is None else tile_elements,
        block=_budget(BLOCK_ELEMENTS, states),
    )
    if reference_states is None:
        reference_states = states.new_empty(0)
    base = head if reference_head is None else reference_head
    log_prob, measured, entropies = _Stream.apply(
        job,
        states,
        labels,
        head.weight,
        head.bias,
        reference_states.detach(),
        base.weight.detach(),
        None if base.bias is None else base.bias.detach(),
    )
    return StreamedScores(
        log_prob=log_prob,
        divergence=None if divergence is None else measured,
        entropy=entropies if entropy else None,
    )


@dataclass(frozen=True)
class _Job:
    """What to compute, and how much of it at once."""

    divergence: StreamedDivergence | None
    shared: bool
    entropy: bool
    tile: int
    block: int


@dataclass(frozen=True)
class _Inputs:
    """Tensors of one call. `shared`: the reference's logits come of the policy's own head."""

    states: Tensor
    labels: Tensor
    head: Head
    reference_states: Tensor
    reference_head: Head

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.states.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Scores:
    """Results (N,), filled tile by tile."""

    log_prob: Tensor
    divergence: Tensor
    entropy: Tensor


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        job: _Job,
        states: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference_states: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = _Inputs(
            states,
            labels,
            Head(weight, bias),
            reference_states,
            Head(reference_weight, reference_bias),
        )
        count = states.shape[0]
        scores = _Scores(*(states.new_zeros(count, dtype=inputs.dtype) for _ in range(3)))
        trained = any(ctx.needs_input_grad[3:5])  # type: ignore[attr-defined]
        slopes = ctx.needs_input_grad[1] and not trained  # type: ignore[attr-defined]
        of_log_prob = of_divergence = states.new_empty(0)
        if slopes:
            of_log_prob = states.new_empty(states.shape, dtype=inputs.dtype)
            if job.divergence is not None:
                of_divergence = torch.empty_like(of_log_prob)
        with torch.no_grad(), _no_autocast(states):
            for part, tile in _tiles(job, inputs, scores, slopes=slopes):
                if slopes:
                    _states_gradients(tile, part, inputs, of_log_prob, of_divergence)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(scores.entropy)
        ctx.job, ctx.trained = job, trained  # type: ignore[attr-defined]
        if trained:
            ctx.save_for_backward(
                states,
                labels,
                weight,
                bias,
                reference_states,
                reference_weight,
                reference_bias,
            )
        else:
            ctx.save_for_backward(of_log_prob, of_divergence)
            ctx.states_dtype = states.dtype  # type: ignore[attr-defined]
        return scores.log_prob, scores.divergence, scores.entropy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: FunctionCtx,
        to_log_prob: Tensor | None,
        to_divergence: Tensor | None,
        _to_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        job: _Job = ctx.job  # type: ignore[attr-defined]
        if to_log_prob is None and to_divergence is None:
            return (None,) * 8
        with _no_autocast(saved[0]):
            if ctx.trained:  # type: ignore[attr-defined]
                needs: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
                gradients = _all_gradients(job, saved, to_log_prob, to_divergence, needs)
                return (None, gradients[0], None, *gradients[1:], None, None, None)
            of_log_prob, of_divergence = saved
            gradient = None
            for weights, slope in ((to_log_prob, of_log_prob), (to_divergence, of_divergence)):
                if weights is None or slope.ndim != 2:
                    continue
                weighed = slope * weights[:, None]
                gradient = weighed if gradient is None else gradient.add_(weighed)
            assert gradient is not None
            dtype: torch.dtype = ctx.states_dtype  # type: ignore[attr-defined]
            return (None, gradient.to(dtype), *(None,) * 6)


@dataclass(frozen=True)
class _Tile:
    """Tokens of one tile after element-wise work.

    `softmax` (n, V) is P = Z p and `slope` (n, V) that of D, their rows to be multiplied with
    `inverse_z` and `slope_scale` (n, 1) for p and dD/dlogits. They lie one after the other.
    """

    rows: Tensor
    softmax: Tensor
    slope: Tensor | None
    inverse_z: Tensor
    slope_scale: Tensor


def _tiles(
    job: _Job, inputs: _Inputs, scores: _Scores, *, slopes: bool
) -> Iterator[tuple[slice, _Tile]]:
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
    for start, stop in _spans(count, height):
        part, size = slice(start, stop), stop - start
        rows = buffer[: sides * size]
        differences = _logits(job, inputs, part, rows)
        scales = make((2, size, 1), dtype=inputs.dtype)
        for first, last in _spans(size, block):
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
                _Scores(
                    scores.log_prob[start + first : start + last],
                    scores.divergence[start + first : start + last],
                    scores.entropy[start + first : start + last],
                ),
                scales[:, inner],
                slopes=slopes,
            )
        yield (
            part,
            _Tile(rows, rows[:size], None if sides == 1 else rows[size:], scales[0], scales[1]),
        )


def _logits(job: _Job, inputs: _Inputs, part: slice, out: Tensor) -> bool:
    """Policy logits into the first half of `out`; into the second the reference's.

    With one head for both, the second half gets differences W (h0 - h) instead and True comes
    back: small drift then keeps its digits, which two rounded logits would lose.
    """
    size = part.stop - part.start
    states = inputs.states[part]
    if job.divergence is None:
        _project(states, inputs.head, out)
        return False
    base = inputs.reference_states[part]
    exact = states.dtype == base.dtype == inputs.head.weight.dtype == inputs.dtype
    if job.shared and (exact or states.device.type == "cpu"):
        wide = states.to(inputs.dtype)
        _project(torch.cat([wide, base.to(inputs.dtype) - wide]), Head(inputs.head.weight), out)
        if inputs.head.bias is not None:
            out[:size] += inputs.head.bias
        return True
    _project(states, inputs.head, out[:size])
    _project(base, inputs.reference_head, out[size:])
    return False


@dataclass(frozen=True)
class _BlockView:
    """Rows of a tile that are worked on at once, each (n, V); `spare` is (2, n, V)."""

    logits: Tensor
    other: Tensor | None
    differences: bool
    labels: Tensor
    spare: Tensor


def _measure(
    job: _Job, view: _BlockView, scores: _Scores, scales: Tensor, *, slopes: bool
) -> None:
    """Turn logits into P and its partner into the slope of D, in place; fill scores and scales."""
    logits, other = view.logits, view.other
    low, high = (bound[:, None] for bound in logits.aminmax(dim=-1))
    ordinary = high - low <= REACH
    if other is not None:
        assert job.divergence is not None
        if not view.differences:
            torch.sub(other, logits, out=view.spare[0])
        least, most = (view.spare[0] if not view.differences else other).aminmax(dim=-1)
        ordinary &= (most - least)[:, None] <= job.divergence.form.reach
    if not bool(ordinary.all()):
        _measure_plainly(job, view, scores, scales, slopes=slopes)
        return
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


def _block(job: _Job, p: Tensor, gap: Tensor, spare: Tensor, inverse_z: Tensor) -> Block:
    """v = log q - log p from differences of logits, so that Σ p e^v = 1 to the last digit."""
    assert job.divergence is not None
    centre = torch.bmm(p[:, None, :], gap[:, :, None])[:, :, 0].mul_(inverse_z)
    gap.sub_(centre)
    mass = torch.expm1(gap, out=spare[0]).mul_(p)
    shift = mass.sum(-1, keepdim=True).mul_(inverse_z)
    gap.sub_(shift.log1p())
    if job.divergence.form.uses_mass:
        mass.addcmul_(p, -shift).div_(1.0 + shift)
    return Block(p=p, v=gap, mass=mass, spare=spare[1], inverse_z=inverse_z)


def _measure_plainly(
    job: _Job, view: _BlockView, scores: _Scores, scales: Tensor, *, slopes: bool
) -> None:
    """The same by the plain functions and autograd: floors, knees, infinite logits."""
    logits, other = view.logits, view.other
    scales.fill_(1.0)
    scores.log_prob.copy_(token_log_probs(logits, view.labels))
    leaf = logits.clone().requires_grad_(slopes and other is not None)
    with torch.set_grad_enabled(slopes and other is not None):
        log_p = leaf.log_softmax(-1)
        if other is not None:
            assert job.divergence is not None
            base = other + logits if view.differences else other
            value = job.divergence.exact(log_p, base.log_softmax(-1))
    if job.entropy:
        scores.entropy.copy_(torch.special.entr(log_p.detach().exp()).sum(-1))
    if other is not None:
        scores.divergence.copy_(value.detach())
        if slopes:
            other.copy_(torch.autograd.grad(value, leaf, torch.ones_like(value))[0])
    torch.exp(log_p.detach(), out=logits)


def _states_gradients(
    tile: _Tile, part: slice, inputs: _Inputs, of_log_prob: Tensor, of_divergence: Tensor
) -> None:
    """Into rows of (N, H): d log p / d states = W_label - p W, and d D / d states."""
    weight, size = inputs.head.weight, part.stop - part.start
    product = _back_project(tile.rows, weight)
    rows = weight.index_select(0, inputs.labels[part]).to(inputs.dtype)
    torch.addcmul(rows, product[:size], -tile.inverse_z, out=of_log_prob[part])
    if tile.slope is not None:
        torch.mul(product[size:], tile.slope_scale, out=of_divergence[part])


def _all_gradients(
    job: _Job,
    saved: tuple[Tensor, ...],
    to_log_prob: Tensor | None,
    to_divergence: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of states, weight and bias, from tiles that are made again."""
    states, labels, weight, bias, reference_states, reference_weight, reference_bias = saved
    inputs = _Inputs(
        states,
        labels,
        Head(weight, bias),
        reference_states,
        Head(reference_weight, reference_bias),
    )
    scores = _Scores(*(states.new_zeros(states.shape[0], dtype=inputs.dtype) for _ in range(3)))
    zeros = states.new_zeros(states.shape[0], dtype=inputs.dtype)
    to_log_prob = zeros if to_log_prob is None else to_log_prob.to(inputs.dtype)
    to_divergence = zeros if to_divergence is None else to_divergence.to(inputs.dtype)
    of_states = states.new_empty(states.shape, dtype=inputs.dtype) if needs[1] else None
    of_weight = weight.new_zeros(weight.shape, dtype=inputs.dtype) if needs[3] else None
    of_bias = (
        bias.new_zeros(bias.shape, dtype=inputs.dtype) if needs[4] and bias is not None else None
    )
    for part, tile in _tiles(job, inputs, scores, slopes=job.divergence is not None):
        gradient = tile.softmax.mul_(-tile.inverse_z * to_log_prob[part, None])
        if tile.slope is not None:
            gradient.addcmul_(tile.slope, tile.slope_scale * to_divergence[part, None])
        gradient.scatter_add_(-1, labels[part, None], to_log_prob[part, None])
        if of_states is not None:
            of_states[part] = _back_project(gradient, weight)
        if of_weight is not None:
            of_weight.addmm_(gradient.T, states[part].to(inputs.dtype))
        if of_bias is not None:
            of_bias += gradient.sum(0)
    return (
        None if of_states is None else of_states.to(states.dtype),
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


def _project(states: Tensor, head: Head, out: Tensor) -> None:
    """Logits states Wᵀ + b (n, V) in the precision of `out`, whatever that of the head."""
    weight = head.weight
    if states.dtype == weight.dtype == out.dtype:
        torch.mm(states, weight.T, out=out)
    elif states.is_cuda and states.dtype == weight.dtype and out.dtype == torch.float32:
        torch.mm(states, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = states.to(out.dtype)
        for start, stop in _spans(weight.shape[0], _UPCAST_ROWS):
            out[:, start:stop] = wide @ weight[start:stop].to(out.dtype).T
    if head.bias is not None:
        out += head.bias


def _back_project(rows: Tensor, weight: Tensor) -> Tensor:
    """Products rows W (n, H) in the precision of `rows`."""
    if rows.dtype == weight.dtype:
        return rows @ weight
    if rows.is_cuda and rows.dtype == torch.float32:
        return torch.mm(rows.to(weight.dtype), weight, out_dtype=torch.float32)
    product = rows.new_zeros(rows.shape[0], weight.shape[1])
    for start, stop in _spans(weight.shape[0], _UPCAST_ROWS):
        product.addmm_(rows[:, start:stop], weight[start:stop].to(rows.dtype))
    return product


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    return pairwise([*range(0, count, step), count])


def _budget(table: dict[str, int], like: Tensor) -> int:
    return table.get(like.device.type, table["cuda"])


def _no_autocast(like: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(device_type=like.device.type, enabled=False)


def _check(
    states: Tensor,
    labels: Tensor,
    head: Head,
    divergence: StreamedDivergence | None,
    reference_states: Tensor | None,
    reference_head: Head | None,
) -> None:
    if states.ndim != 2 or labels.shape != states.shape[:1]:
        raise ValueError(
            f"states {tuple(states.shape)} and labels {tuple(labels.shape)} must be (N, H) and "
            "(N,): give one label for each hidden state"
        )
    if (divergence is None) != (reference_states is None):
        raise ValueError(
            "a divergence needs reference_states and they need a divergence: pass both or none"
        )
    if reference_states is None and reference_head is not None:
        raise ValueError("reference_head came without reference_states and would be ignored")
    sides = [("policy", states, head)]
    if reference_states is not None:
        sides.append(("reference", reference_states, reference_head or head))
    for name, hidden, layer in sides:
        if hidden.shape != (states.shape[0], layer.weight.shape[1]):
            raise ValueError(
                f"{name} states have shape {tuple(hidden.shape)}, expected "
                f"({states.shape[0]}, {layer.weight.shape[1]}) for its head of shape "
                f"{tuple(layer.weight.shape)}"
            )
        if layer.weight.shape[0] != head.weight.shape[0]:
            raise ValueError(
                f"the reference's head has {layer.weight.shape[0]} tokens and the policy's "
                f"{head.weight.shape[0]}: both must be over one vocabulary"
            )
