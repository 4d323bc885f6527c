"""Bootstrap over prompts, as weights: a metric is computed for all resamples in one expression."""

import torch
from torch import Tensor

from core.profile import Estimate
from selection.features import group_index


def group_weights(group: Tensor, *, resamples: int, generator: torch.Generator) -> Tensor:
    """Return (resamples + 1, N) float32 weights of pairs; row 0 is the data itself, all ones.

    Every other row draws as many prompts as there are, with replacement; all pairs of a prompt
    come along as often as it was drawn.
    """
    index = group_index(group)
    prompts = int(index.max()) + 1
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
    counts = torch.zeros(resamples, prompts)
    counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
    return torch.cat([torch.ones(1, group.shape[0]), counts[:, index]])


def weighted_mean(weights: Tensor, x: Tensor) -> Tensor:
    """Mean of x (N,) under each row of weights (B, N), float64 (B,)."""
    weights = weights.double()
    return weights @ x.double() / weights.sum(-1)


def weighted_variance(weights: Tensor, x: Tensor) -> Tensor:
    """Variance of x (N,) under each row of weights (B, N), float64 (B,), never negative."""
    shifted = x.double() - x.double().mean()
    mean = weighted_mean(weights, shifted)
    return (weighted_mean(weights, shifted.square()) - mean.square()).clamp_min(0.0)


def weighted_quantile(weights: Tensor, x: Tensor, *, level: float) -> Tensor:
    """Smallest x with at least `level` of the weight at or below it, (B,)."""
    values, order = x.sort()
    total = weights[:, order].double().cumsum(-1)
    position = (total < total[:, -1:] * level).sum(-1)
    return values[position.clamp_max(values.numel() - 1)]


def weighted_median(weights: Tensor, x: Tensor) -> Tensor:
    """Smallest x with at least half of the weight at or below it, (B,)."""
    return weighted_quantile(weights, x, level=0.5)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator, 0 where the denominator is 0 (nothing varies there)."""
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.zeros_like(numerator))


def estimate(values: Tensor) -> Estimate:
    """Return row 0 with the 2.5 % and 97.5 % quantiles of the other rows.

    The interval is widened to hold the value: a statistic that resampling biases (an overlap, an
    absolute difference) can lie outside of its own resamples.
    """
    value = float(values[0])
    if values.numel() == 1:
        return Estimate(value=value, low=value, high=value)
    quantiles = torch.quantile(
        values[1:].double(), torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    low, high = quantiles.tolist()
    return Estimate(value=value, low=min(low, value), high=max(high, value))
