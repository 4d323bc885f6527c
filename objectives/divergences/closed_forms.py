"""Values and logit gradients of divergences in closed form, on one block of a streamed tile.

p is left unnormalised, P = Z p, and q enters through v = log q - log p, so Σ p e^v = 1. A form
gives D and a slope g with  dD/dlogits = scale (g - P total) / Z,  total = Σ g / Z,  which removes
the part of g along p. All sums are of terms in v, expm1(v), ...: small where the drift is small.

Domain: every |v| <= `Form.reach`, where neither the floor of log-probabilities nor a knee of the
unbounded divergences is met; `objectives.streaming` takes the plain function beyond.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, assert_never

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from core.spec import (
    BhattacharyyaSpec,
    DivergenceSpec,
    FAlpha,
    FDivergenceSpec,
    FForwardKl,
    FJeffreys,
    FNeymanChi2,
    FPearsonChi2,
    FTotalVariation,
    HellingerSpec,
    JensenShannonSpec,
    KlSpec,
    RenyiSpec,
    WassersteinSpec,
)
from objectives.divergences.power import EXPONENT_KNEE
from objectives.divergences.wasserstein import SlicedWasserstein
from objectives.types import Divergence

REACH = 80.0
"""Exponents up to 80 stay in float32's range, with room for a sum over the vocabulary."""


@dataclass(frozen=True)
class Block:
    """Rows of a tile, each (n, V): P = Z p, v = log q - log p, and two to write on.

    `mass` holds Z (q - p); a form may overwrite v, mass and spare, never p. `inverse_z` is (n, 1).
    """

    p: Tensor
    v: Tensor
    mass: Tensor
    spare: Tensor
    inverse_z: Tensor

    def mean(self, terms: Tensor) -> Tensor:
        """Σ terms / Z over the vocabulary, shape (n, 1)."""
        return terms.sum(-1, keepdim=True).mul_(self.inverse_z)


@dataclass(frozen=True)
class Measured:
    """D (n, 1) of a block, and the slope g (n, V) with its total (n, 1) and scale."""

    value: Tensor
    slope: Tensor
    total: Tensor
    scale: Tensor | float


class Form(Protocol):
    """A divergence in closed form."""

    @property
    def reach(self) -> float:
        """Largest |v| at which the form holds."""
        ...

    @property
    def uses_mass(self) -> bool:
        """Whether `Block.mass` has to be there."""
        ...

    def __call__(self, block: Block) -> Measured:
        """Measure a block, overwriting what it may."""
        ...


@dataclass(frozen=True)
class KlForm:
    """D = -Σ p v; dD/dz = -p (v + D)."""

    reach: float = REACH
    uses_mass: bool = False

    def __call__(self, block: Block) -> Measured:
        """G = p v."""
        slope = torch.mul(block.p, block.v, out=block.spare)
        total = block.mean(slope)
        return Measured(-total, slope, total, -1.0)


@dataclass(frozen=True)
class ForwardKlForm:
    """D = Σ q v; dD/dz = p - q."""

    reach: float = REACH
    uses_mass: bool = True

    def __call__(self, block: Block) -> Measured:
        """G = q - p."""
        terms = torch.add(block.p, block.mass, out=block.spare).mul_(block.v)
        return Measured(block.mean(terms), block.mass, block.mean(block.mass), -1.0)


@dataclass(frozen=True)
class PowerForm:
    """The affinity A = Σ p^a q^(1-a) = 1 + s, s = Σ p expm1((1-a) v): one pass for the family.

    alpha (hellinger, chi²): D = s / (a (a-1)), g = p expm1((1-a) v), scale 1 / (a-1).
    renyi (bhattacharyya), `log`: D = log1p(s) / (a (a-1)), the same g, scale 1 / ((a-1) (1+s)).
    """

    order: float
    log: bool
    uses_mass: bool = False

    @property
    def reach(self) -> float:
        """Inside, no exponent (a-1) u reaches the knee; for 0 < a < 1 there is none."""
        if 0.0 < self.order < 1.0:
            return REACH
        return min(REACH, EXPONENT_KNEE / abs(self.order - 1.0))

    def __call__(self, block: Block) -> Measured:
        """G = p expm1((1-a) v)."""
        excess = self.order - 1.0
        factor = self.order * excess
        power = torch.mul(block.v, -excess, out=block.spare)
        slope = power.expm1_().mul_(block.p)
        shift = block.mean(slope)
        if not self.log:
            return Measured(shift / factor, slope, shift, 1.0 / excess)
        affinity = 1.0 + shift
        value = torch.log1p(shift)
        if bool((shift < -0.5).any()):
            # Nearly disjoint: 1 + s has lost the digits of the affinity, its own sum has them.
            slope = torch.mul(block.v, -excess, out=block.spare).exp_().mul_(block.p)
            affinity = shift = block.mean(slope)
            value = torch.log(affinity)
        return Measured(value / factor, slope, shift, 1.0 / (excess * affinity))


@dataclass(frozen=True)
class JensenShannonForm:
    """D = -2 Σ [p L + q (L - v)], L = log((1 + e^v) / 2) = log(m/p); dD/dz = -2 p (L - Σ p L)."""

    reach: float = REACH
    uses_mass: bool = True

    def __call__(self, block: Block) -> Measured:
        """G = p L."""
        ratio = torch.expm1(block.v, out=block.spare)
        log_mean = ratio.mul_(0.5).log1p_()
        of_q = torch.sub(log_mean, block.v, out=block.v).mul_(block.mass.add_(block.p))
        slope = log_mean.mul_(block.p)
        total = block.mean(slope)
        return Measured(-2.0 * (total + block.mean(of_q)), slope, total, -2.0)


@dataclass(frozen=True)
class JeffreysForm:
    """D = ½ Σ (q - p) v; dD/dz = -½ (g - p Σ g), g = p v + q - p."""

    reach: float = REACH
    uses_mass: bool = True

    def __call__(self, block: Block) -> Measured:
        """G = p v + q - p."""
        terms = torch.mul(block.mass, block.v, out=block.spare)
        slope = block.v.mul_(block.p).add_(block.mass)
        return Measured(0.5 * block.mean(terms), slope, block.mean(slope), -0.5)


@dataclass(frozen=True)
class TotalVariationForm:
    """D = ½ Σ |q - p|; dD/dz = -½ (g - p Σ g), g = p sign(v)."""

    reach: float = REACH
    uses_mass: bool = True

    def __call__(self, block: Block) -> Measured:
        """G = p sign(v)."""
        terms = torch.abs(block.mass, out=block.spare)
        slope = block.v.sign_().mul_(block.p)
        return Measured(0.5 * block.mean(terms), slope, block.mean(slope), -0.5)


RUN = 32
"""Numbers in a run of `_accumulate`: few enough for a loop, enough to leave few runs."""


@dataclass(frozen=True)
class SlicedWassersteinForm:
    """D = mean over directions of Σ_j |F_j| gap_j, F the running sum of q - p in sorted order.

    dD/dp_(i) = -T_i + a constant, which the projection off p removes, T_i = Σ_{j>=i} sign(F_j)
    gap_j; g = p T in the order of the vocabulary, and D = Σ (q - p)_(i) T_i, by parts.

    Rows of the block lie side by side, (V, n): sorting copies n neighbours at once and running
    sums add vectors. The token of rank RUN c + k is at place k C + c, C the number of runs:
    `orders` (R, RUN C) are tokens by place, padded where all gaps are 0, `places` (R, V) the way
    back, `gaps` (R, RUN, C, 1) by place.
    """

    orders: Tensor
    places: Tensor
    gaps: Tensor
    reach: float = REACH
    uses_mass: bool = True

    @classmethod
    def of(cls, exact: SlicedWasserstein) -> "SlicedWassersteinForm":
        """The same directions, by place."""
        directions, vocabulary = exact.order.shape
        runs = -(-vocabulary // RUN)
        padding = RUN * runs - vocabulary
        ranks = exact.order.argsort(-1)
        by_rank = (directions, runs, RUN)
        return cls(
            orders=pad(exact.order, (0, padding)).view(by_rank).mT.reshape(directions, -1),
            places=ranks % RUN * runs + ranks // RUN,
            gaps=pad(exact.gaps, (0, padding + 1)).view(by_rank).mT.unsqueeze(-1).contiguous(),
        )

    def __call__(self, block: Block) -> Measured:
        """G = p times the sum of the directions' T."""
        count, vocabulary = self.places.shape
        side_by_side = block.v.view(vocabulary, -1)
        mass = torch.mul(block.mass.T, block.inverse_z.T, out=side_by_side)
        potential = torch.zeros_like(mass)
        for order, place, gaps in zip(self.orders, self.places, self.gaps, strict=True):
            # Bags of one row are that row, fetched ahead, as index_select does not.
            steps = embedding_bag(order[:, None], mass, mode="sum").view(*gaps.shape[:2], -1)
            _accumulate(steps)
            steps.sign_().mul_(gaps.to(steps.dtype))
            _accumulate(steps, backwards=True)
            potential += embedding_bag(place[:, None], steps.flatten(0, 1), mode="sum")
        value = mass.mul_(potential).sum(0)[:, None]
        slope = torch.mul(potential.T, block.p, out=block.spare)
        return Measured(value / count, slope, block.mean(slope), -1.0 / count)


def _accumulate(steps: Tensor, *, backwards: bool = False) -> None:
    """Running sums in place along ranks: (RUN, C, n), where [k, c] is number k of run c.

    Adding run to run is vectorised, and only sums of whole runs are left to `cumsum`, which is not.
    """
    totals = steps.sum(0)
    before = totals.cumsum(0) - totals
    parts = steps.unbind()
    if backwards:
        before, parts = totals.sum(0) - totals - before, parts[::-1]
    parts[0].add_(before)
    for part, following in pairwise(parts):
        following.add_(part)


def closed_form(spec: DivergenceSpec, exact: Divergence) -> Form:
    """The closed form of a spec; `exact` is what `build_divergence` made of the same spec.

    Raises ValueError when a wasserstein spec comes with something else.
    """
    match spec:
        case KlSpec():
            return KlForm()
        case JensenShannonSpec():
            return JensenShannonForm()
        case HellingerSpec():
            return PowerForm(order=0.5, log=False)
        case RenyiSpec():
            return PowerForm(order=spec.order, log=True)
        case BhattacharyyaSpec():
            return PowerForm(order=0.5, log=True)
        case WassersteinSpec():
            if not isinstance(exact, SlicedWasserstein):
                raise ValueError(
                    f"a wasserstein spec came with {exact!r}: pass what build_divergence returned "
                    "for it, which holds the directions"
                )
            return SlicedWassersteinForm.of(exact)
        case FDivergenceSpec():
            return _f_form(spec)
        case _:
            assert_never(spec)


def _f_form(spec: FDivergenceSpec) -> Form:
    match spec.f:
        case FTotalVariation():
            return TotalVariationForm()
        case FPearsonChi2():
            return PowerForm(order=2.0, log=False)
        case FNeymanChi2():
            return PowerForm(order=-1.0, log=False)
        case FForwardKl():
            return ForwardKlForm()
        case FJeffreys():
            return JeffreysForm()
        case FAlpha():
            return PowerForm(order=spec.f.order, log=False)
        case _:
            assert_never(spec.f)
