"""Normalized alignment gap: how much nearer is the chosen response, on average?"""

from torch import Tensor

from selection.metrics.bootstrap import ratio, weighted_mean
from selection.metrics.distances import KernelDistances


def nag(distances: KernelDistances, weights: Tensor) -> Tensor:
    """NAG = mean delta / (d(x, y+) + d(x, y-)), (B,), in [-1, 1]; 0 where both distances are 0."""
    gap = ratio(distances.delta, distances.chosen + distances.rejected)
    return weighted_mean(weights, gap)
