"""Triplet alignment tightness: how many pairs does the geometry order with a margin?"""

import torch
from torch import Tensor

from selection.metrics.bootstrap import weighted_median
from selection.metrics.distances import KernelDistances

MARGIN = 0.1


def tat(distances: KernelDistances, weights: Tensor) -> Tensor:
    """TAT = share of pairs with delta > 0.1 * median of d(x, y±), (B,), in [0, 1]."""
    both = torch.cat([distances.chosen, distances.rejected])
    threshold = MARGIN * weighted_median(weights.repeat(1, 2), both)
    ordered = (distances.delta > threshold.unsqueeze(-1)).double()
    weights = weights.double()
    return (weights * ordered).sum(-1) / weights.sum(-1)
