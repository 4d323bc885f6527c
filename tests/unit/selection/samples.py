"""Datasets with known answers, and profiles written by hand."""

import torch

from core.profile import DatasetProfile, Estimate, KernelMetrics, ReferenceMetrics
from core.spec import KernelName
from selection.features import ReferenceFeatures


def features(
    pairs: int = 240,
    *,
    signal: float = 0.0,
    dim: int = 12,
    scales: torch.Tensor | None = None,
    pairs_per_prompt: int = 2,
    seed: int = 0,
) -> ReferenceFeatures:
    """Gaussian embeddings; the chosen one is moved by `signal` sd along the first axis."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.ones(dim) if scales is None else scales
    prompt, chosen, rejected = (
        torch.randn(pairs, dim, generator=generator) * scales for _ in range(3)
    )
    chosen[:, 0] += signal * scales[0]
    counts = torch.randint(5, 60, (2, pairs), generator=generator).float()
    log_probs = -counts * (1.0 + 0.2 * torch.rand(2, pairs, generator=generator))
    return ReferenceFeatures(
        token_group=torch.arange(2000) * pairs // 2000 // pairs_per_prompt,
        prompt_embedding=prompt,
        chosen_embedding=chosen,
        rejected_embedding=rejected,
        chosen_log_prob=log_probs[0],
        rejected_log_prob=log_probs[1],
        chosen_tokens=counts[0],
        rejected_tokens=counts[1],
        token_log_probs=torch.randn(2000, generator=generator) - 3.0,
        entropy=torch.rand(pairs, generator=generator),
        group=torch.arange(pairs) // pairs_per_prompt,
    )


def shuffled(data: ReferenceFeatures, *, seed: int) -> ReferenceFeatures:
    """The same pairs with every label thrown anew by a fair coin."""
    coin = torch.rand(data.pairs, generator=torch.Generator().manual_seed(seed)) < 0.5
    rows = coin.unsqueeze(-1)
    return ReferenceFeatures(
        prompt_embedding=data.prompt_embedding,
        chosen_embedding=torch.where(rows, data.rejected_embedding, data.chosen_embedding),
        rejected_embedding=torch.where(rows, data.chosen_embedding, data.rejected_embedding),
        chosen_log_prob=torch.where(coin, data.rejected_log_prob, data.chosen_log_prob),
        rejected_log_prob=torch.where(coin, data.chosen_log_prob, data.rejected_log_prob),
        chosen_tokens=torch.where(coin, data.rejected_tokens, data.chosen_tokens),
        rejected_tokens=torch.where(coin, data.chosen_tokens, data.rejected_tokens),
        token_log_probs=data.token_log_probs,
        token_group=data.token_group,
        entropy=data.entropy,
        group=data.group,
    )


def around(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def kernel_metrics(
    kernel: KernelName, *, kpa: float = 0.7, tat: float = 0.3, nag: float = 0.05, half: float = 0.02
) -> KernelMetrics:
    return KernelMetrics(
        kernel=kernel.value,
        pnd=around(0.9),
        pnav=around(0.04, 0.002),
        tat=around(tat, half),
        nag=around(nag, 0.01),
        kpa=around(kpa, half),
    )


def profile(
    *,
    kpa: dict[KernelName, float] | None = None,
    tat: dict[KernelName, float] | None = None,
    default_kpa: float = 0.7,
    nag: float = 0.05,
    half: float = 0.02,
    overlap: float = 0.5,
    kurtosis: float = 0.5,
    drift: float = 0.3,
    smoothness: float = 0.3,
) -> DatasetProfile:
    """A profile in which kernels tie and the reference is unremarkable, but for what is given."""
    kpa, tat = kpa or {}, tat or {}
    return DatasetProfile(
        pairs=600,
        prompts=300,
        sampled_pairs=600,
        sampled_prompts=300,
        max_pairs=2000,
        sampled_tokens=4000,
        resamples=200,
        seed=0,
        mixtures=(),
        kernels=tuple(
            kernel_metrics(
                name, kpa=kpa.get(name, default_kpa), tat=tat.get(name, 0.3), nag=nag, half=half
            )
            for name in KernelName
        ),
        reference=ReferenceMetrics(
            support_overlap=around(overlap),
            drift_magnitude=around(drift),
            kurtosis=around(kurtosis),
            smoothness=around(smoothness),
            reference_accuracy=around(0.6),
            length_bias=around(0.1),
        ),
    )
