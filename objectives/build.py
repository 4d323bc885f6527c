"""From specs to modules: one exhaustive match for each family."""

from collections.abc import Callable
from functools import partial
from typing import assert_never

from torch import Tensor

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
    KernelSpec,
    KlSpec,
    LinkTerm,
    MahalanobisKernelSpec,
    MixtureKernelSpec,
    ObjectiveSpec,
    PenaltyTerm,
    PolynomialKernelSpec,
    RbfKernelSpec,
    RenyiSpec,
    SpectralKernelSpec,
    WassersteinSpec,
)
from objectives.divergences import links, power, symmetric
from objectives.divergences.wasserstein import SlicedWasserstein
from objectives.geometry import Geometry
from objectives.hybrid import HybridObjective
from objectives.kernels.base import KernelModule
from objectives.kernels.mahalanobis import MahalanobisKernel
from objectives.kernels.polynomial import PolynomialKernel
from objectives.kernels.rbf import RbfKernel
from objectives.kernels.spectral import SpectralKernel
from objectives.mixture import MixtureKernel
from objectives.types import Divergence


def build_kernel(spec: KernelSpec, geometry: Geometry) -> KernelModule:
    """The kernel of a spec on prepared embeddings, in the precision and on the device of the data.

    Landmarks beyond the responses that the geometry holds are not there to be used; the spectral
    kernel then takes all of them.
    """
    match spec:
        case RbfKernelSpec():
            return RbfKernel(median_sq_distance=geometry.median_sq_distance, width=spec.width)
        case PolynomialKernelSpec():
            return PolynomialKernel(offset=spec.offset, degree=spec.degree)
        case MahalanobisKernelSpec():
            return MahalanobisKernel(precision=geometry.response_precision)
        case SpectralKernelSpec():
            return SpectralKernel(
                responses=geometry.responses,
                median_sq_distance=geometry.median_sq_distance,
                landmarks=spec.landmarks,
                rank=spec.rank,
                time=spec.time,
            )
        case MixtureKernelSpec():
            return MixtureKernel(
                rbf=build_kernel(spec.rbf, geometry),
                polynomial=build_kernel(spec.polynomial, geometry),
                spectral=build_kernel(spec.spectral, geometry),
                mahalanobis=build_kernel(spec.mahalanobis, geometry),
                weights=spec.weights,
                learned=spec.learned,
                like=geometry.scale,
            )
        case _:
            assert_never(spec)


def build_divergence(spec: DivergenceSpec, *, head: Tensor | None) -> Divergence:
    """D of a spec at KL's curvature; `head` are output-embedding rows (V, H), for wasserstein.

    Raises ValueError when wasserstein comes without a head.
    """
    match spec:
        case KlSpec():
            return power.kl
        case JensenShannonSpec():
            return symmetric.jensen_shannon
        case HellingerSpec():
            return power.hellinger
        case RenyiSpec():
            return partial(power.renyi, order=spec.order)
        case BhattacharyyaSpec():
            return power.bhattacharyya
        case WassersteinSpec():
            if head is None:
                raise ValueError(
                    "wasserstein measures distances between tokens and received no head: pass the "
                    "model's output embedding (V, H)"
                )
            return SlicedWasserstein(head, directions=spec.directions, seed=spec.seed)
        case FDivergenceSpec():
            return _f_divergence(spec)
        case _:
            assert_never(spec)


def link(spec: DivergenceSpec) -> Callable[[Tensor], Tensor]:
    """The link g of f-DPO, (B,) -> (B,); ValueError for a divergence that has none."""
    match spec:
        case KlSpec():
            return links.identity_link
        case JensenShannonSpec():
            return links.jensen_shannon_link
        case HellingerSpec() | BhattacharyyaSpec():
            return links.hellinger_link
        case RenyiSpec():
            return partial(links.power_link, order=spec.order)
        case FDivergenceSpec(f=FForwardKl()):
            return links.forward_kl_link
        case FDivergenceSpec(f=FAlpha(order=order)):
            return partial(links.power_link, order=order)
        case FDivergenceSpec() | WassersteinSpec():
            name = spec.f.type if isinstance(spec, FDivergenceSpec) else spec.type
            raise ValueError(f"{name} has no link form; use it as a penalty")
        case _:
            assert_never(spec)


def build_objective(
    spec: ObjectiveSpec, *, geometry: Geometry | None, head: Tensor | None
) -> HybridObjective:
    """The objective of a spec; a kernel term needs the geometry, a wasserstein penalty the head.

    Raises ValueError when one of them is needed and missing.
    """
    kernel = None
    if spec.kernel_term is not None:
        if geometry is None:
            raise ValueError(
                f"objective {spec.label} has a kernel term and received no geometry: fit one with "
                "fit_geometry on the training split"
            )
        kernel = build_kernel(spec.kernel_term.kernel, geometry)
    g: Callable[[Tensor], Tensor] = links.identity_link
    divergence: Divergence | None = None
    match spec.divergence_term:
        case None:
            pass
        case PenaltyTerm(divergence=named):
            divergence = build_divergence(named, head=head)
        case LinkTerm(divergence=named):
            g = link(named)
        case _:
            assert_never(spec.divergence_term)
    return HybridObjective(
        spec,
        link=g,
        kernel=kernel,
        geometry=None if kernel is None else geometry,
        divergence=divergence,
    )


def _f_divergence(spec: FDivergenceSpec) -> Divergence:
    match spec.f:
        case FTotalVariation():
            return symmetric.total_variation
        case FPearsonChi2():
            return power.pearson_chi2
        case FNeymanChi2():
            return power.neyman_chi2
        case FForwardKl():
            return power.forward_kl
        case FJeffreys():
            return symmetric.jeffreys
        case FAlpha():
            return partial(power.alpha, order=spec.f.order)
        case _:
            assert_never(spec.f)
