"""All metrics of one dataset under one reference model."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.profile import DatasetProfile, KernelMetrics, MixtureMetrics, ReferenceMetrics
from core.spec import (
    KernelName,
    KernelSpec,
    MahalanobisKernelSpec,
    MixtureKernelSpec,
    MixtureWeights,
    PolynomialKernelSpec,
    RbfKernelSpec,
    SpectralKernelSpec,
)
from objectives.build import build_kernel
from objectives.geometry import fit_geometry
from objectives.types import Kernel, PairEmbeddings
from selection.features import ReferenceFeatures
from selection.metrics.bootstrap import estimate, group_weights, weighted_mean
from selection.metrics.distances import RandomPairs, kernel_distances, random_pairs
from selection.metrics.kpa import (
    FOLDS,
    RIDGE,
    accuracy_of,
    definite,
    grouped_folds,
    held_out_scores,
    normalized,
    preference_gram,
)
from selection.metrics.nag import nag
from selection.metrics.noise import LabelFacts, label_noise
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

MAX_PAIRS = 1000
RESAMPLES = 200

MEMBERS: tuple[KernelSpec, ...] = (
    RbfKernelSpec(),
    PolynomialKernelSpec(),
    MahalanobisKernelSpec(),
    SpectralKernelSpec(),
)
MIXTURE = MixtureKernelSpec()
# Nine tenths of the weight on the local kernels (rbf, polynomial), and on the global ones.
OTHER_MIXTURES = (
    MixtureKernelSpec(weights=MixtureWeights(tau_local=0.9)),
    MixtureKernelSpec(weights=MixtureWeights(tau_local=0.1)),
)
KERNELS: tuple[KernelSpec, ...] = (*MEMBERS, MIXTURE)


def profile_dataset(
    features: ReferenceFeatures,
    *,
    seed: int,
    bootstrap: int = RESAMPLES,
    max_pairs: int = MAX_PAIRS,
    drawn_from: tuple[int, int] | None = None,
    labels: LabelFacts | None = None,
) -> DatasetProfile:
    """Compute every metric with its interval over `bootstrap` resamples of prompts.

    Above `max_pairs` all metrics are of the pairs at `sampled_rows`, with prompts named by their
    numbers; the kernel preference accuracy is O(pairs^3). `drawn_from` are the pairs and prompts
    of the whole when `features` are already those of a sample. `labels` has an origin for each
    pair of `features`: without it no suspicious pair is named. Deterministic in features and seed.
    """
    prompts_of = [str(number) for number in features.group.tolist()]
    rows = sampled_rows(prompts_of, limit=max_pairs, seed=seed)
    sample = features.take(rows)
    generator = torch.Generator().manual_seed(seed)
    weights = group_weights(sample.group, resamples=bootstrap, generator=generator)
    tokens = group_weights(sample.token_group, resamples=bootstrap, generator=generator)
    with torch.no_grad():
        kernels, mixtures, scores = _kernel_metrics(sample, weights, seed=seed, generator=generator)
        reference = _reference_metrics(sample, weights, tokens)
    pairs, prompts = drawn_from or (features.pairs, features.prompts)
    return DatasetProfile(
        pairs=pairs,
        prompts=prompts,
        sampled_pairs=sample.pairs,
        sampled_prompts=sample.prompts,
        max_pairs=max_pairs,
        sampled_tokens=sample.token_log_probs.numel(),
        resamples=bootstrap,
        seed=seed,
        kernels=kernels,
        mixtures=mixtures,
        reference=reference,
        noise=label_noise(scores, weights, facts=_taken(labels, rows)),
    )


def _taken(labels: LabelFacts | None, rows: Tensor) -> LabelFacts | None:
    if labels is None:
        return None
    return replace(labels, origins=tuple(labels.origins[row] for row in rows.tolist()))


def prompt_order(prompts: Iterable[str], *, seed: int) -> list[str]:
    """Return the different prompts, by the SHA-256 of `seed` and their ids.

    Where a prompt stands among others does not depend on which others there are.
    """
    return sorted(set(prompts), key=lambda p: hashlib.sha256(f"{seed} {p}".encode()).digest())


def sampled_rows(group: Sequence[str], *, limit: int, seed: int) -> Tensor:
    """Return the rows of whole prompts that fit into `limit` pairs, in order, (n,) int64.

    `group` has the prompt of each pair. Prompts are taken in `prompt_order` until the next one
    would pass the limit: a smaller limit draws a part of a larger one's. Two prompts at least are
    kept, whatever their size: less cannot be cross-validated.
    """
    if len(group) <= limit:
        return torch.arange(len(group))
    counts = Counter(group)
    kept: set[str] = set()
    taken = 0
    for prompt in prompt_order(counts, seed=seed):
        taken += counts[prompt]
        if taken > limit and len(kept) >= 2:
            break
        kept.add(prompt)
    return torch.tensor([row for row, prompt in enumerate(group) if prompt in kept])


def _kernel_metrics(
    features: ReferenceFeatures, weights: Tensor, *, seed: int, generator: torch.Generator
) -> tuple[tuple[KernelMetrics, ...], tuple[MixtureMetrics, ...], Tensor]:
    """Measure the kernels, the mixtures, and return the even mixture's held-out scores (N,)."""
    raw = PairEmbeddings(
        features.prompt_embedding, features.chosen_embedding, features.rejected_embedding
    )
    geometry = fit_geometry(raw, seed=seed)
    prepared = PairEmbeddings(
        geometry.prepare(raw.prompt), geometry.prepare(raw.chosen), geometry.prepare(raw.rejected)
    )
    ruler = _Ruler(
        embeddings=prepared,
        weights=weights,
        fold=grouped_folds(features.group, folds=min(FOLDS, features.prompts), generator=generator),
        drawn=random_pairs(features.group, generator=generator),
    )
    grams: dict[KernelName, Tensor] = {}
    kernels = []
    for spec in MEMBERS:
        kernel = build_kernel(spec, geometry)
        gram = definite(preference_gram(kernel, prepared.chosen, prepared.rejected))
        grams[KernelName(spec.type)] = gram
        kernels.append(ruler.measure(spec, kernel, ruler.scores(gram)))
    scored = [
        (spec, ruler.scores(mixed_gram(spec.weights, grams))) for spec in (MIXTURE, *OTHER_MIXTURES)
    ]
    mixtures = [
        (spec, ruler.measure(spec, build_kernel(spec, geometry), scores)) for spec, scores in scored
    ]
    others = tuple(
        MixtureMetrics(**dict(found), weights=spec.weights) for spec, found in mixtures[1:]
    )
    return (*kernels, mixtures[0][1]), others, scored[0][1]


def mixed_gram(weights: MixtureWeights, grams: Mapping[KernelName, Tensor]) -> Tensor:
    """Preference kernel (N, N) of the mixture, from those of its parts: it is linear in K."""
    near, far = weights.tau_local, 1.0 - weights.tau_local
    shares = {
        KernelName.RBF: near * weights.rbf,
        KernelName.POLYNOMIAL: near * (1.0 - weights.rbf),
        KernelName.SPECTRAL: far * weights.spectral,
        KernelName.MAHALANOBIS: far * (1.0 - weights.spectral),
    }
    return torch.stack([share * grams[name] for name, share in shares.items()]).sum(0)


@dataclass(frozen=True)
class _Ruler:
    """What every kernel is measured with: the same pairs, resamples, folds and random pairs."""

    embeddings: PairEmbeddings
    weights: Tensor
    fold: Tensor
    drawn: RandomPairs

    def scores(self, gram: Tensor) -> Tensor:
        """Held-out scores (N,) of a preference kernel (N, N)."""
        return held_out_scores(normalized(gram), self.fold, ridge=RIDGE)

    def measure(self, spec: KernelSpec, kernel: Kernel, scores: Tensor) -> KernelMetrics:
        """Measure one kernel; `scores` are the held-out ones of its preference kernel."""
        e = self.embeddings
        distances = kernel_distances(kernel, e.prompt, e.chosen, e.rejected, drawn=self.drawn)
        return KernelMetrics(
            kernel=spec.type,
            pnd=estimate(pnd(distances, self.weights)),
            pnav=estimate(pnav(distances, self.weights)),
            tat=estimate(tat(distances, self.weights)),
            nag=estimate(nag(distances, self.weights)),
            kpa=estimate(accuracy_of(scores, self.weights)),
        )


def _reference_metrics(
    features: ReferenceFeatures, weights: Tensor, token_weights: Tensor
) -> ReferenceMetrics:
    chosen, rejected = normalized_log_probs(features)
    lengths = standardized_difference(features.chosen_tokens, features.rejected_tokens, weights)
    return ReferenceMetrics(
        support_overlap=estimate(support_overlap(chosen, rejected, weights)),
        drift_magnitude=estimate(standardized_difference(chosen, rejected, weights).abs()),
        kurtosis=estimate(robust_kurtosis(features.token_log_probs, token_weights)),
        smoothness=estimate(weighted_mean(weights, features.entropy)),
        reference_accuracy=estimate(reference_accuracy(chosen, rejected, weights)),
        length_bias=estimate(lengths),
    )
