"""Metrics of the reference's own log-probabilities: what a divergence will have to deal with."""

import math

import torch
from torch import Tensor

from selection.features import ReferenceFeatures
from selection.metrics.bootstrap import ratio, weighted_mean, weighted_quantile, weighted_variance

_GRID = 256
# (Q(.975) - Q(.025)) / (Q(.75) - Q(.25)) of a normal distribution.
_NORMAL_SPREAD = 2.9058467


def normalized_log_probs(features: ReferenceFeatures) -> tuple[Tensor, Tensor]:
    """Return l+ and l-, mean log-prob of a response token, (N,) each."""
    return (
        features.chosen_log_prob / features.chosen_tokens.clamp_min(1.0),
        features.rejected_log_prob / features.rejected_tokens.clamp_min(1.0),
    )


def support_overlap(chosen: Tensor, rejected: Tensor, weights: Tensor) -> Tensor:
    """∫ min(p̂+, p̂-) of Gaussian kernel densities of l+ and l-, (B,), in [0, 1].

    One bandwidth for both and for all resamples: Silverman's 0.9 min(sd, IQR/1.34) n^(-1/5) of
    the mean within-class spread. Identical samples give 1, far apart ones 0.
    """
    x = torch.stack([chosen, rejected]).double()
    n = x.shape[1]
    quartiles = torch.quantile(x, torch.tensor([0.25, 0.75], dtype=x.dtype), dim=-1)
    iqr = (quartiles[1] - quartiles[0]).mean() / 1.34
    sd = x.std(dim=-1).mean()
    spread = float(torch.minimum(iqr, sd) if float(iqr) > 0.0 else sd)
    width = max(0.9 * spread * n ** (-0.2), 1e-6)
    low, high = float(x.min()), float(x.max())
    # Outliers can stretch the grid until it is coarser than the bandwidth: then the grid decides.
    width = max(width, (high - low) / _GRID)
    grid = torch.linspace(low - 4 * width, high + 4 * width, _GRID, dtype=x.dtype)
    step = float(grid[1] - grid[0])
    bumps = torch.exp(-0.5 * ((x.unsqueeze(-1) - grid) / width).square())
    bumps = bumps / (width * math.sqrt(2 * math.pi))
    weights = weights.double() / weights.double().sum(-1, keepdim=True)
    densities = weights @ bumps
    mass = densities.sum(-1) * step
    shared = torch.minimum(densities[0] / mass[0, :, None], densities[1] / mass[1, :, None])
    return (shared.sum(-1) * step).clamp(0.0, 1.0)


def standardized_difference(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Cohen's d, (mean a - mean b) / sqrt((Var a + Var b) / 2), (B,); 0 where nothing varies."""
    pooled = (weighted_variance(weights, a) + weighted_variance(weights, b)) / 2
    return ratio(weighted_mean(weights, a) - weighted_mean(weights, b), pooled.sqrt())


def reference_accuracy(chosen: Tensor, rejected: Tensor, weights: Tensor) -> Tensor:
    """Share of pairs with l+ > l-, ties half, (B,), in [0, 1]."""
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return weighted_mean(weights, right)


def robust_kurtosis(token_log_probs: Tensor, weights: Tensor) -> Tensor:
    """(Q.975 - Q.025) / (Q.75 - Q.25) - 2.91 of token log-probs (M,) under weights (B, M), (B,).

    Crow & Siddiqui's quantile form of excess kurtosis: 0 for a normal, 1.4 for a Laplace
    distribution; 0 where the middle half does not vary.
    """
    q = {
        level: weighted_quantile(weights, token_log_probs.double(), level=level)
        for level in (0.025, 0.25, 0.75, 0.975)
    }
    middle = q[0.75] - q[0.25]
    spread = ratio(q[0.975] - q[0.025], middle)
    return torch.where(middle > 0, spread - _NORMAL_SPREAD, torch.zeros_like(spread))
