"""Kernel distances of pairs and triplets, once for a kernel, shared by PND, PNAV, TAT and NAG."""

from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.types import Kernel
from selection.features import group_index


def kernel_distance(kernel: Kernel, a: Tensor, b: Tensor) -> Tensor:
    """d_K(a, b) = sqrt(K(a,a) + K(b,b) - 2 K(a,b)) for (N, k) and (N, k), shape (N,).

    Rounding can make the square slightly negative: it is clamped at 0.
    """
    square = kernel.log_k(a, a).exp() + kernel.log_k(b, b).exp() - 2.0 * kernel.log_k(a, b).exp()
    return square.clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class RandomPairs:
    """Random pairs of responses to different prompts: rows into [chosen; rejected], (R,) each."""

    first: Tensor
    second: Tensor


def random_pairs(group: Tensor, *, generator: torch.Generator) -> RandomPairs:
    """Draw for each of the 2N responses one of the responses to other prompts, uniformly."""
    owner = group_index(torch.cat([group, group]))
    sizes = torch.bincount(owner)
    by_owner = owner.argsort(stable=True)
    start = (sizes.cumsum(0) - sizes)[owner]
    others = owner.shape[0] - sizes[owner]
    uniform = torch.rand(owner.shape[0], dtype=torch.float64, generator=generator)
    place = (uniform * others).long()
    # Places are counted without the own prompt's block, which is stepped over.
    place = torch.where(place < start, place, place + sizes[owner])
    return RandomPairs(first=torch.arange(owner.shape[0]), second=by_owner[place])


@dataclass(frozen=True)
class KernelDistances:
    """Distances of N pairs in one kernel's geometry.

    `pair` d(y+, y-), `chosen` d(x, y+), `rejected` d(x, y-), all (N,); `random` (R,), between the
    responses of `drawn`.
    """

    pair: Tensor
    chosen: Tensor
    rejected: Tensor
    random: Tensor
    drawn: RandomPairs

    @property
    def delta(self) -> Tensor:
        """d(x, y-) - d(x, y+): positive where the chosen response is nearer to the prompt."""
        return self.rejected - self.chosen


def kernel_distances(
    kernel: Kernel, prompt: Tensor, chosen: Tensor, rejected: Tensor, *, drawn: RandomPairs
) -> KernelDistances:
    """Measure all distances of prepared embeddings (N, k)."""
    responses = torch.cat([chosen, rejected])
    return KernelDistances(
        pair=kernel_distance(kernel, chosen, rejected),
        chosen=kernel_distance(kernel, prompt, chosen),
        rejected=kernel_distance(kernel, prompt, rejected),
        random=kernel_distance(kernel, responses[drawn.first], responses[drawn.second]),
        drawn=drawn,
    )
