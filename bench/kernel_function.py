"""A preference function learned from frozen embeddings: kernel ridge on the preference kernel.

f(y+) - f(y-) of a training pair comes from a fit to other prompts only, so that no pair's own label
is in its own number; that of new pairs from a fit to all training pairs.
"""

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.spec import RbfKernelSpec
from objectives import Kernel, PairEmbeddings, build_kernel, fit_geometry
from selection.features import group_index
from selection.metrics.kpa import (
    FOLDS,
    RIDGE,
    grouped_folds,
    held_out_scores,
    normalized,
    preference_gram,
)
from worker.training.evaluate import accuracy, fit_temperature, preference_losses

LEXICAL_WIDTH = 1024
LEXICAL_DIM = 256


@dataclass(frozen=True)
class PreferenceFunction:
    """Scores f(y+) - f(y-): `train` (N,) cross-fitted by prompt, `new` (M,) of pairs not fitted to.

    `temperature` b >= 0 makes b * score the log-odds that the label is right; it is fitted on the
    cross-fitted scores. 0 says that the scores carry nothing.
    """

    train: Tensor
    new: Tensor
    temperature: float

    @property
    def train_log_odds(self) -> Tensor:
        """Log-odds of the training pairs' labels, (N,)."""
        return self.temperature * self.train

    @property
    def new_log_odds(self) -> Tensor:
        """Log-odds of the new pairs' labels, (M,)."""
        return self.temperature * self.new

    def held_out_accuracy(self) -> float:
        """Share of training pairs that fits to other prompts order right."""
        return accuracy(self.train.numpy())

    def held_out_log_loss(self) -> float:
        """Log-loss of the training pairs' log-odds."""
        scores = np.asarray(self.train.numpy(), dtype=np.float64)
        return float(preference_losses(scores, self.temperature).mean())


def learn(
    train: PairEmbeddings, group: Tensor, new: PairEmbeddings, *, seed: int, max_dim: int = 64
) -> PreferenceFunction:
    """Fit on N training pairs (N, H) of prompts `group` (N,), and score M new pairs (M, H).

    The frame and the kernel (rbf at its defaults), folds and ridge are those of KPA.
    Raises ValueError for embeddings that `fit_geometry` refuses.
    """
    geometry = fit_geometry(train, max_dim=max_dim, seed=seed)
    kernel = build_kernel(RbfKernelSpec(), geometry)
    chosen, rejected = geometry.prepare(train.chosen), geometry.prepare(train.rejected)
    folds = min(FOLDS, int(group_index(group).max()) + 1)
    fold = grouped_folds(group, folds=folds, generator=torch.Generator().manual_seed(seed))
    gram = preference_gram(kernel, chosen, rejected)
    scores = held_out_scores(normalized(gram), fold, ridge=RIDGE)
    fresh = scores_of_new(
        kernel, (chosen, rejected), (geometry.prepare(new.chosen), geometry.prepare(new.rejected))
    )
    return PreferenceFunction(train=scores, new=fresh, temperature=fit_temperature(scores.numpy()))


def scores_of_new(
    kernel: Kernel, train: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> Tensor:
    """Kernel ridge towards +1 on prepared chosen and rejected (N, k), for new ones (M, k): (M,).

    With k the preference kernel over its mean diagonal, k(new, train) (k + ridge I)^-1 1.
    """
    gram = preference_gram(kernel, *train)
    k = normalized(gram)
    ridge = RIDGE * torch.eye(k.shape[0], dtype=k.dtype)
    ones = torch.ones(k.shape[0], 1, dtype=k.dtype)
    coefficients = torch.linalg.solve(k + ridge, ones).squeeze(-1)
    if not bool(k.any()):
        return torch.zeros(new[0].shape[0], dtype=k.dtype)
    many = kernel.log_gram(torch.cat(new), torch.cat(train)).exp().double()
    n, m = train[0].shape[0], new[0].shape[0]
    cross = many[:m, :n] - many[:m, n:] - many[m:, :n] + many[m:, n:]
    scores: Tensor = cross / gram.double().diagonal().mean() @ coefficients
    return scores


@dataclass(frozen=True)
class Texts:
    """Prompt, chosen and rejected of pairs."""

    prompt: Sequence[str]
    chosen: Sequence[str]
    rejected: Sequence[str]


def lexical_embeddings(train: Texts, new: Texts) -> tuple[PairEmbeddings, PairEmbeddings]:
    """Words and pairs of words as hashed tf-idf vectors of length 1, (N, W) and (M, W).

    It reads the text and not the model: an encoder without weights. Document frequencies are those
    of the training texts.
    """
    counted = [_counts(part) for part in (train.prompt, train.chosen, train.rejected)]
    seen = torch.cat(counted) > 0
    idf = ((1 + seen.shape[0]) / (1 + seen.sum(0))).log() + 1

    def weighted(counts: Tensor) -> Tensor:
        return torch.nn.functional.normalize(counts.log1p() * idf, dim=-1)

    fresh = [_counts(part) for part in (new.prompt, new.chosen, new.rejected)]
    return PairEmbeddings(*map(weighted, counted)), PairEmbeddings(*map(weighted, fresh))


def _counts(texts: Sequence[str]) -> Tensor:
    """How often each bucket's words and pairs of words occur, (N, W)."""
    counts = torch.zeros(len(texts), LEXICAL_WIDTH)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
        for bucket, number in Counter(_bucket(gram) for gram in grams).items():
            counts[row, bucket] = number
    return counts


def _bucket(gram: str) -> int:
    return zlib.crc32(gram.encode()) % LEXICAL_WIDTH
