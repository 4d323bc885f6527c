"""Positive–negative divergence: do pairs differ in this geometry?"""

from torch import Tensor

from selection.metrics.bootstrap import ratio, weighted_mean
from selection.metrics.distances import KernelDistances


def pnd(distances: KernelDistances, weights: Tensor) -> Tensor:
    """PND = mean d(y+, y-) / mean d of random response pairs, (B,); >= 0, 1: like random ones.

    A random pair weighs the product of its two pairs' weights. 0 where no two responses differ.
    """
    both = weights.repeat(1, 2)
    drawn = distances.drawn
    products = both[:, drawn.first] * both[:, drawn.second]
    # A resample can miss every drawn pair when prompts are few; the data's own mean stands in.
    empty = products.sum(-1, keepdim=True) == 0
    products = products + empty.to(products.dtype)
    return ratio(weighted_mean(weights, distances.pair), weighted_mean(products, distances.random))
