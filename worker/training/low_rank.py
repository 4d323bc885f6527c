"""Linear layers with a low-rank adapter, in as few passes over their outputs as there are products.

peft computes W x + s · B (A x) with a scaled copy and a sum of the whole output, forward and
backward; here both products go into one output. Over a bfloat16 base, whose adapter peft keeps in
float32, products are in bfloat16 and gradients come back in float32. The layers stay peft's: the
adapter can be switched off, reset, merged and saved as before.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

ADAPTER = "default"


class _Context(FunctionCtx):
    """What forward leaves for backward, beside tensors."""

    scale: float
    dtype: torch.dtype
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _LowRank(torch.autograd.Function):
    """Output W x + b + s B (A x) for rows x (n, in), W (out, in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        low, high = a.to(x.dtype), b.to(x.dtype)
        inner = x @ low.T
        output = nn.functional.linear(x, weight, bias).addmm_(inner, high.T, alpha=scale)
        ctx.save_for_backward(x, weight, low, high, inner)
        ctx.dtype = a.dtype
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        x, weight, a, b, inner = saved
        scale: float = ctx.scale
        of_inner = (gradient @ b).mul_(scale)
        of_a = of_inner.T @ x
        of_b = (gradient.T @ inner).mul_(scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_inner, a)
        dtype: torch.dtype = ctx.dtype
        return of_x, None, None, of_a.to(dtype), of_b.to(dtype), None


class _Fused:
    """The forward of one adapted layer; peft's own where this one does not apply."""

    def __init__(self, layer: LoraLinear, base: nn.Linear) -> None:
        self._layer = layer
        self._plain = layer.forward
        self._base = base

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, base = self._layer, self._base
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        applies = (
            not (args or kwargs or layer.disable_adapters or layer.merged)
            and layer.active_adapters == [ADAPTER]
            and x.dtype == base.weight.dtype
            and a.dtype == b.dtype
            and a.dtype in (x.dtype, torch.float32)
            and not base.weight.requires_grad
            and not torch.is_autocast_enabled(x.device.type)
        )
        if not applies:
            output: Tensor = self._plain(x, *args, **kwargs)
            return output
        rows = x.reshape(-1, x.shape[-1])
        fused: Tensor = _LowRank.apply(rows, base.weight, base.bias, a, b, layer.scaling[ADAPTER])
        return fused.view(*x.shape[:-1], -1)


def fuse_adapters(model: PeftModel) -> int:
    """Speed up every plain linear layer with a plain adapter; returns how many there are."""
    count = 0
    for layer in model.modules():
        if not isinstance(layer, LoraLinear):
            continue
        base = layer.get_base_layer()
        is_plain = (
            isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
            and ADAPTER not in layer.lora_variant
        )
        if type(base) is nn.Linear and is_plain:
            layer.forward = _Fused(layer, base)  # type: ignore[method-assign]
            count += 1
    return count
