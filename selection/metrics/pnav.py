"""Positive–negative alignment variance: is the signal consistent?"""

import torch
from torch import Tensor

from selection.metrics.bootstrap import ratio, weighted_mean, weighted_variance
from selection.metrics.distances import KernelDistances


def pnav(distances: KernelDistances, weights: Tensor) -> Tensor:
    """PNAV = Var(delta) / (mean of d(x, y+) and d(x, y-))^2, (B,); >= 0, less is better."""
    both = torch.cat([distances.chosen, distances.rejected])
    mean = weighted_mean(weights.repeat(1, 2), both)
    return ratio(weighted_variance(weights, distances.delta), mean.square())
