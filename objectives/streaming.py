"""Log-probabilities and divergences from hidden states, in tiles of tokens × vocabulary.

For N tokens, width H and V tokens in the vocabulary no more than two tiles of `tile_elements`
numbers exist at once, forward and backward. A tile holds whole rows of logits, so normalisation is
exact. With a frozen head the forward pass leaves d log p / d states and d D / d states (N, H), and
backward only weighs them by token: three products of policy, reference and head, as many as
without tiles. With a trained head backward makes the tiles again, once the weights are known.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from core.spec import DivergenceSpec
from objectives.divergences.closed_forms import closed_form
from objectives.tiles import (
    Head,
    Inputs,
    Job,
    Scores,
    StreamedDivergence,
    Tile,
    back_project,
    tiles,
)
from objectives.types import Divergence

TILE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Numbers in a tile: few passes over the head, and little beside a model's own activations."""

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Numbers that element-wise work goes through at once: what a cache holds, and threads share."""

_Function = TypeVar("_Function", bound=Callable[..., object])


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


def _uncompiled(function: _Function) -> _Function:
    """A compiled model around it stops here: loops over tiles are no part of a graph."""
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


@_uncompiled
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
    job = Job(
        divergence=divergence,
        shared=reference_head is None,
        entropy=entropy,
        gradients=torch.is_grad_enabled(),
        tile=_budget(TILE_ELEMENTS, states) if tile_elements is None else tile_elements,
        block=_budget(BLOCK_ELEMENTS, states),
    )
    if reference_states is None:
        reference_states = states.new_empty(0)
    base = head if reference_head is None else reference_head
    log_prob, measured, entropies = _Stream.apply(  # type: ignore[no-untyped-call]
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


class _Context(FunctionCtx):
    """What forward leaves for backward, beside tensors."""

    job: Job
    trained: bool
    states_dtype: torch.dtype
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        job: Job,
        states: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference_states: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = Inputs(
            states,
            labels,
            Head(weight, bias),
            reference_states,
            Head(reference_weight, reference_bias),
        )
        count = states.shape[0]
        scores = Scores(*(states.new_zeros(count, dtype=inputs.dtype) for _ in range(3)))
        trained = any(ctx.needs_input_grad[3:5])
        slopes = job.gradients and ctx.needs_input_grad[1] and not trained
        of_log_prob = of_divergence = states.new_empty(0)
        if slopes:
            of_log_prob = states.new_empty(states.shape, dtype=inputs.dtype)
            if job.divergence is not None:
                of_divergence = torch.empty_like(of_log_prob)
        with torch.no_grad(), _no_autocast(states):
            for part, tile in tiles(job, inputs, scores, slopes=slopes):
                if slopes:
                    _states_gradients(tile, part, inputs, of_log_prob, of_divergence)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(scores.entropy)
        ctx.job, ctx.trained = job, trained
        if trained:
            optional = (bias, reference_states, reference_weight, reference_bias)
            ctx.save_for_backward(states, labels, weight, *optional)  # type: ignore[arg-type]
        else:
            ctx.save_for_backward(of_log_prob, of_divergence)
            ctx.states_dtype = states.dtype
        return scores.log_prob, scores.divergence, scores.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context,
        to_log_prob: Tensor | None,
        to_divergence: Tensor | None,
        _to_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        job: Job = ctx.job
        if to_log_prob is None and to_divergence is None:
            return (None,) * 8
        with _no_autocast(saved[0]):
            if ctx.trained:
                needs: tuple[bool, ...] = ctx.needs_input_grad
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
            dtype: torch.dtype = ctx.states_dtype
            return (None, gradient.to(dtype), *(None,) * 6)


def _states_gradients(
    tile: Tile, part: slice, inputs: Inputs, of_log_prob: Tensor, of_divergence: Tensor
) -> None:
    """Into rows of (N, H): d log p / d states = W_label - p W, and d D / d states."""
    weight, size = inputs.head.weight, part.stop - part.start
    product = back_project(tile.rows, weight)
    rows = weight.index_select(0, inputs.labels[part]).to(inputs.dtype)
    torch.addcmul(rows, product[:size], -tile.inverse_z, out=of_log_prob[part])
    if tile.slope is not None:
        torch.mul(product[size:], tile.slope_scale, out=of_divergence[part])


def _all_gradients(
    job: Job,
    saved: tuple[Tensor, ...],
    to_log_prob: Tensor | None,
    to_divergence: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of states, weight and bias, from tiles that are made again."""
    states, labels, weight, bias, reference_states, reference_weight, reference_bias = saved
    inputs = Inputs(
        states,
        labels,
        Head(weight, bias),
        reference_states,
        Head(reference_weight, reference_bias),
    )
    scores = Scores(*(states.new_zeros(states.shape[0], dtype=inputs.dtype) for _ in range(3)))
    zeros = states.new_zeros(states.shape[0], dtype=inputs.dtype)
    to_log_prob = zeros if to_log_prob is None else to_log_prob.to(inputs.dtype)
    to_divergence = zeros if to_divergence is None else to_divergence.to(inputs.dtype)
    of_states = states.new_empty(states.shape, dtype=inputs.dtype) if needs[1] else None
    of_weight = weight.new_zeros(weight.shape, dtype=inputs.dtype) if needs[3] else None
    of_bias = (
        bias.new_zeros(bias.shape, dtype=inputs.dtype) if needs[4] and bias is not None else None
    )
    for part, tile in tiles(job, inputs, scores, slopes=job.divergence is not None):
        gradient = tile.softmax.mul_(-tile.inverse_z * to_log_prob[part, None])
        if tile.slope is not None:
            gradient.addcmul_(tile.slope, tile.slope_scale * to_divergence[part, None])
        gradient.scatter_add_(-1, labels[part, None], to_log_prob[part, None])
        if of_states is not None:
            of_states[part] = back_project(gradient, weight)
        if of_weight is not None:
            of_weight.addmm_(gradient.T, states[part].to(inputs.dtype))
        if of_bias is not None:
            of_bias += gradient.sum(0)
    return (
        None if of_states is None else of_states.to(states.dtype),
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


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
