"""Heavy tails of weight spectra, before and after training (docs/maths.md, "Heavy tails").

Only copies are computed with, layer by layer on the CPU: the policy is never changed.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from core.results import HeavyTails, LayerTail, TailFit
from worker.training.model import Policy

Floats = NDArray[np.float64]

MIN_TAIL = 8
CHANGED_BY = 0.1
USUAL = (2.0, 6.0)
# Beyond this smaller side, one weight takes minutes on two cores.
MAX_SIDE = 4096
# Multiplications of all eigenproblems, about two minutes on two cores; beyond, blocks are drawn.
MAX_WORK = 2e11
# A matrix product does so many multiplications in the time that an eigenproblem does one.
_PRODUCT_SPEED = 8
_ADAPTER = "default"
_BLOCK = re.compile(r"\.(\d+)\.")
# Values that differ by rounding only have no spread to fit a law to.
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class _Layer:
    """A linear weight that is trained: under an adapter, or itself."""

    name: str
    module: nn.Module | LoraLayer

    @property
    def base(self) -> nn.Module:
        module = self.module
        return module.get_base_layer() if isinstance(module, LoraLayer) else module

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of W in y = W x: outputs, inputs."""
        if isinstance(self.module, LoraLayer):  # a base in 4 bits is packed into another shape
            rows, cols = self.module.out_features, self.module.in_features
            assert rows is not None
            assert cols is not None
            return rows, cols
        outputs, inputs = self.weight().shape
        return outputs, inputs

    @property
    def work(self) -> float:
        """How long its eigenproblem takes, in multiplications."""
        side = min(self.shape)
        return side**3 + float(math.prod(self.shape)) * side / _PRODUCT_SPEED

    @property
    def block(self) -> str:
        """Which transformer block it is part of; a layer outside of all is one of its own."""
        found = _BLOCK.search(f".{self.name}.")
        return self.name if found is None else found[1]

    def unusable(self) -> str | None:
        """Why its spectrum is not computed, whatever the budget."""
        weight = self.weight()
        if not weight.is_floating_point():
            return f"its base weight is stored as {weight.dtype}, not as plain numbers"
        side = min(self.shape)
        if side > MAX_SIDE:
            return f"its smaller side is {side}, more than {MAX_SIDE}"
        return None

    def weight(self) -> Tensor:
        """W without an adapter; Conv1D keeps it the other way round."""
        weight = self.base.get_parameter("weight").detach()
        return weight.T if isinstance(self.base, Conv1D) else weight

    def adapted(self) -> Tensor:
        """W, or a copy W + s B A in float64 where there is an adapter."""
        weight, module = self.weight(), self.module
        if not isinstance(module, LoraLayer):
            return weight
        parts = (module.lora_B[_ADAPTER], module.lora_A[_ADAPTER])
        b, a = (part.get_parameter("weight").detach().cpu().double() for part in parts)
        return weight.cpu().double() + module.scaling[_ADAPTER] * (b @ a)


def heavy_tails(policy: Policy, *, progress: Callable[[int, int], None]) -> HeavyTails:
    """Fit the spectra of every linear weight of the trunk that is trained, before and after.

    A weight whose smaller side is above `MAX_SIDE` is passed over. Where the rest costs more than
    `MAX_WORK`, whole blocks are taken evenly over the depth, one at least. What is passed over
    says why.
    """
    layers = _trained(policy)
    skipped = _passed_over(layers)
    measured = [layer for layer in layers if layer.name not in skipped]
    total = 2 * len(measured)
    with policy.as_reference():
        before: dict[str, TailFit | None] = {}
        for layer in measured:
            progress(len(before), total)
            before[layer.name] = fit_tail(spectrum(layer.weight()))
    after: dict[str, TailFit | None] = {}
    for layer in measured:
        progress(len(before) + len(after), total)
        after[layer.name] = fit_tail(spectrum(layer.adapted()))
    progress(total, total)
    return summarize(
        [
            _found(layer, before.get(layer.name), after.get(layer.name), skipped.get(layer.name))
            for layer in layers
        ]
    )


def fit_tail(eigenvalues: Floats) -> TailFit | None:
    """alpha = 1 + n / sum_i ln(x_i / x_min) over the n values x_i >= x_min (maximum likelihood).

    x_min is the value, with at least `MIN_TAIL` values in its tail, for which the Kolmogorov-
    Smirnov distance of the tail from P(x) = 1 - (x / x_min)^(1 - alpha) is smallest: Clauset,
    Shalizi & Newman 2009, equation 3.1 and section 3.3. Values of any order, > 0, shape (N,).
    Of equal distances the longest tail counts. None when no tail has values that differ.
    """
    values = np.sort(eigenvalues)
    logs = np.log(values)
    best: TailFit | None = None
    for start in np.unique(values[: max(0, len(values) - MIN_TAIL + 1)], return_index=True)[1]:
        excess = logs[start:] - logs[start]
        n = len(excess)
        if excess[-1] < _NO_SPREAD:
            break
        slope = n / float(excess.sum())
        law = -np.expm1(-slope * excess)
        steps = np.arange(n + 1) / n
        distance = float(max((law - steps[:-1]).max(), (steps[1:] - law).max()))
        if best is None or distance < best.ks_distance:
            best = TailFit(
                alpha=1 + slope, x_min=float(values[start]), ks_distance=distance, tail_values=n
            )
    return best


def spectrum(weight: Tensor) -> Floats:
    """Eigenvalues of W^T W that are not zero, ascending, (<= min side,).

    They are the squared singular values of W. The product is formed on the smaller side: that is
    several times faster than singular values and exact to the largest one times the machine's
    epsilon, which the tail does not notice. Below that, an eigenvalue counts as zero. Computed in
    float64 on the CPU, from a copy. `weight`: 2-D.
    """
    weight = weight.cpu().double()
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    values = torch.linalg.eigvalsh(wide @ wide.T).numpy()
    zero = values.max(initial=0.0) * max(weight.shape) * np.finfo(np.float64).eps
    kept: Floats = values[values > zero]
    return kept


def summarize(layers: Sequence[LayerTail]) -> HeavyTails:
    """Means, medians and movements of alpha over the layers that were measured."""
    fits = [(x.layer, x.before.alpha, x.after.alpha) for x in layers if x.before and x.after]
    before = np.array([old for _, old, _ in fits])
    after = np.array([new for _, _, new in fits])
    changed = int((np.abs(after - before) > CHANGED_BY).sum())
    low, high = USUAL
    outliers = tuple(
        name for name, old, new in fits if low <= old <= high and not low <= new <= high
    )
    sentence = f"None of {len(layers)} trained layers could be measured."
    if fits:
        sentence = (
            f"Power-law exponent alpha of {len(fits)} of {len(layers)} trained layers: mean "
            f"{before.mean():.3f} before and {after.mean():.3f} after training; it moved by more "
            f"than {CHANGED_BY} in {changed} and left the usual {low:g} to {high:g} in "
            f"{len(outliers)}."
        )
    return HeavyTails(
        layers=tuple(layers),
        measured=len(fits),
        mean_before=float(before.mean()) if fits else None,
        mean_after=float(after.mean()) if fits else None,
        median_before=float(np.median(before)) if fits else None,
        median_after=float(np.median(after)) if fits else None,
        changed=changed,
        changed_by=CHANGED_BY,
        outliers=outliers,
        sentence=sentence,
    )


def _trained(policy: Policy) -> list[_Layer]:
    """Layers under the adapter; without one, the linear layers of the trunk that are trained."""
    modules = list(policy.causal.named_modules())
    adapted = [_Layer(name, module) for name, module in modules if isinstance(module, LoraLayer)]
    return adapted or [
        _Layer(name, module)
        for name, module in modules
        if isinstance(module, nn.Linear | Conv1D)
        and module is not policy.head
        and module.weight.requires_grad
    ]


def _passed_over(layers: Sequence[_Layer]) -> dict[str, str]:
    """Say by name why layers are not measured; the choice depends on shapes alone."""
    reasons = {layer.name: why for layer in layers if (why := layer.unusable()) is not None}
    left = [layer for layer in layers if layer.name not in reasons]
    every = math.ceil(sum(layer.work for layer in left) / MAX_WORK)
    if every > 1:
        blocks = list(dict.fromkeys(layer.block for layer in left))
        drawn = set(blocks[::every])
        why = f"not drawn: to bound the cost, one of every {every} blocks is measured"
        reasons |= {layer.name: why for layer in left if layer.block not in drawn}
    return reasons


def _found(
    layer: _Layer, before: TailFit | None, after: TailFit | None, skipped: str | None
) -> LayerTail:
    rows, cols = layer.shape
    if skipped is None and (before is None or after is None):
        before = after = None
        skipped = f"fewer than {MIN_TAIL} eigenvalues, or all of them equal"
    return LayerTail(
        layer=layer.name, rows=rows, cols=cols, before=before, after=after, skipped=skipped
    )
