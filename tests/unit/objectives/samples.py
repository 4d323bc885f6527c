"""Deterministic embeddings, distributions and Hypothesis strategies for these tests."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from objectives import Geometry, PairEmbeddings, fit_geometry

seeds = st.integers(min_value=0, max_value=2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(
    pairs: int = 40, width: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64
) -> PairEmbeddings:
    """Anisotropic clouds around a far mean, responses near their prompts."""
    rng = generator(seed)
    scales = torch.linspace(2.0, 0.2, width, dtype=torch.float64)
    centre = 10.0 * torch.randn(width, generator=rng, dtype=torch.float64)
    prompt = torch.randn(pairs, width, generator=rng, dtype=torch.float64) * scales + centre
    chosen, rejected = (
        prompt + 0.7 * torch.randn(pairs, width, generator=rng, dtype=torch.float64) * scales
        for _ in range(2)
    )
    return PairEmbeddings(prompt.to(dtype), chosen.to(dtype), rejected.to(dtype))


def geometry64(pairs: int = 40, width: int = 12, seed: int = 0) -> Geometry:
    """A geometry in float64, for gradient checks and exact comparisons."""
    return fit_geometry(embeddings(pairs, width, seed), seed=seed).to(dtype=torch.float64)


def points(count: int, dim: int, seed: int) -> Tensor:
    """Prepared points (count, dim) with E‖a‖² = 1."""
    drawn = torch.randn(count, dim, generator=generator(seed), dtype=torch.float64)
    return drawn / dim**0.5


def distributions(
    seed: int, *, rows: int = 3, vocabulary: int = 7, spread: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Two batches of log-probabilities (rows, vocabulary) in float64."""
    rng = generator(seed)
    logits = spread * torch.randn(2, rows, vocabulary, generator=rng, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1)
    return log_p, log_q


def head_rows(vocabulary: int = 7, width: int = 5, seed: int = 3) -> Tensor:
    """Output-embedding rows (V, H) in float64."""
    return torch.randn(vocabulary, width, generator=generator(seed), dtype=torch.float64)
