"""All metrics of one dataset under one reference model."""

import torch
from torch import Tensor

from core.profile import DatasetProfile, KernelMetrics, ReferenceMetrics
from core.spec import (
    KernelName,
    KernelSpec,
    MahalanobisKernelSpec,
    MixtureKernelSpec,
    PolynomialKernelSpec,
    RbfKernelSpec,
    SpectralKernelSpec,
)
from objectives.build import build_kernel
from objectives.geometry import fit_geometry
from objectives.types import Kernel, PairEmbeddings
from selection.features import ReferenceFeatures, group_index
from selection.metrics.bootstrap import estimate, group_weights, weighted_mean
from selection.metrics.distances import RandomPairs, kernel_distances, random_pairs
from selection.metrics.kpa import FOLDS, grouped_folds, kpa
from selection.metrics.nag import nag
from selection.metrics.pnav import pnav
from selection.metrics.pnd import pnd
from selection.metrics.reference import (
    normalized_log_probs,
    reference_accuracy,
    robust_kurtosis,
    standardized_difference,
    support_overlap,
)
from selection.metrics.tat import tat

MAX_PAIRS = 2000

KERNELS: tuple[KernelSpec, ...] = (
    RbfKernelSpec(),
    PolynomialKernelSpec(),
    MahalanobisKernelSpec(),
    SpectralKernelSpec(),
    MixtureKernelSpec(),
)


def profile_dataset(
    features: ReferenceFeatures,
    *,
    seed: int,
    bootstrap: int = 200,
    max_pairs: int = MAX_PAIRS,
) -> DatasetProfile:
    """Compute every metric with its interval over `bootstrap` resamples of prompts.

    Above `max_pairs` all metrics are of whole prompts drawn at random until the next one would
    pass it; the kernel preference accuracy is O(pairs^3). Deterministic in features and seed.
    """
    generator = torch.Generator().manual_seed(seed)
    sample = features.take(sampled_rows(features.group, limit=max_pairs, generator=generator))
    weights = group_weights(sample.group, resamples=bootstrap, generator=generator)
    with torch.no_grad():
        kernels = _kernel_metrics(sample, weights, seed=seed, generator=generator)
        reference = _reference_metrics(sample, weights, generator=generator)
    return DatasetProfile(
        pairs=features.pairs,
        prompts=features.prompts,
        sampled_pairs=sample.pairs,
        seed=seed,
        kernels=kernels,
        reference=reference,
    )


def sampled_rows(group: Tensor, *, limit: int, generator: torch.Generator) -> Tensor:
    """Return the rows of whole prompts, drawn at random, that fit into `limit` pairs, in order.

    Two prompts at least are kept, whatever their size: less cannot be cross-validated.
    """
    if group.shape[0] <= limit:
        return torch.arange(group.shape[0])
    index = group_index(group)
    counts = torch.bincount(index)
    order = torch.randperm(counts.numel(), generator=generator)
    fits = counts[order].cumsum(0) <= limit
    fits[:2] = True
    kept = torch.zeros(counts.numel(), dtype=torch.bool)
    kept[order[fits]] = True
    return kept[index].nonzero().squeeze(-1)


def _kernel_metrics(
    features: ReferenceFeatures, weights: Tensor, *, seed: int, generator: torch.Generator
) -> tuple[KernelMetrics, ...]:
    raw = PairEmbeddings(
        features.prompt_embedding, features.chosen_embedding, features.rejected_embedding
    )
    geometry = fit_geometry(raw, seed=seed)
    prepared = PairEmbeddings(
        geometry.prepare(raw.prompt), geometry.prepare(raw.chosen), geometry.prepare(raw.rejected)
    )
    fold = grouped_folds(features.group, folds=min(FOLDS, features.prompts), generator=generator)
    drawn = random_pairs(features.group, generator=generator)
    return tuple(
        _measure(
            KernelName(spec.type),
            build_kernel(spec, geometry),
            prepared,
            weights=weights,
            fold=fold,
            drawn=drawn,
        )
        for spec in KERNELS
    )


def _measure(
    name: KernelName,
    kernel: Kernel,
    e: PairEmbeddings,
    *,
    weights: Tensor,
    fold: Tensor,
    drawn: RandomPairs,
) -> KernelMetrics:
    distances = kernel_distances(kernel, e.prompt, e.chosen, e.rejected, drawn=drawn)
    return KernelMetrics(
        kernel=name.value,
        pnd=estimate(pnd(distances, weights)),
        pnav=estimate(pnav(distances, weights)),
        tat=estimate(tat(distances, weights)),
        nag=estimate(nag(distances, weights)),
        kpa=estimate(kpa(kernel, e.chosen, e.rejected, fold=fold, weights=weights)),
    )


def _reference_metrics(
    features: ReferenceFeatures, weights: Tensor, *, generator: torch.Generator
) -> ReferenceMetrics:
    chosen, rejected = normalized_log_probs(features)
    kurtosis = robust_kurtosis(
        features.token_log_probs, resamples=weights.shape[0] - 1, generator=generator
    )
    lengths = standardized_difference(features.chosen_tokens, features.rejected_tokens, weights)
    return ReferenceMetrics(
        support_overlap=estimate(support_overlap(chosen, rejected, weights)),
        drift_magnitude=estimate(standardized_difference(chosen, rejected, weights).abs()),
        kurtosis=estimate(kurtosis),
        smoothness=estimate(weighted_mean(weights, features.entropy)),
        reference_accuracy=estimate(reference_accuracy(chosen, rejected, weights)),
        length_bias=estimate(lengths),
    )
