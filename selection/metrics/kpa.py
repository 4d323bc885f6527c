"""Kernel preference accuracy: does the geometry predict preference, without any training?"""

import torch
from torch import Tensor

from objectives.types import Kernel
from selection.features import group_index
from selection.metrics.bootstrap import weighted_mean

FOLDS = 5
RIDGE = 1.0
# Two held-out scores share the product of their labels, so they are not independent. On shuffled
# labels the spread of KPA over datasets was 1.1 to 1.26 times that of the bootstrap.
WIDENING = 1.25
# Differences of kernel values, computed in float32, say nothing below this.
_ROUNDING = 1e-6
# Negative eigenvalues above this share of the mean diagonal are nothing beside the ridge of 1.
_NEGLIGIBLE = 0.01


def preference_gram(kernel: Kernel, chosen: Tensor, rejected: Tensor) -> Tensor:
    """k((+,-), (+',-')) = K(+,+') - K(+,-') - K(-,+') + K(-,-') for (N, k) each, (N, N).

    The preference kernel of Chu & Ghahramani (2005), in the precision of the embeddings. It is
    linear in K: that of a mixture is the mixture of those of its parts.
    """
    n = chosen.shape[0]
    responses = torch.cat([chosen, rejected])
    gram = kernel.log_gram(responses, responses).exp()
    k = gram[:n, :n] - gram[:n, n:] - gram[n:, :n] + gram[n:, n:]
    return (k + k.T) / 2


def normalized(k: Tensor) -> Tensor:
    """Return k in float64 with a mean diagonal of 1, so that the ridge means the same for all.

    All zeros where no pair differs.
    """
    k = k.double()
    level = k.diagonal().mean()
    return k / level if float(level) > _ROUNDING else torch.zeros_like(k)


def definite(k: Tensor) -> Tensor:
    """Return the nearest positive semidefinite matrix to a preference kernel (N, N).

    Nearest in the Frobenius norm: negative eigenvalues become 0 (Higham 1988, theorem 2.1). `k`
    itself where none lies below a hundredth of the mean diagonal. The floor of the spectral kernel
    makes it indefinite where responses are many and alike; the ridge does not make up for that.
    """
    level = k.diagonal().mean()
    shift = _NEGLIGIBLE * level * torch.eye(k.shape[0], dtype=k.dtype)
    if float(level) <= 0.0 or int(torch.linalg.cholesky_ex(k + shift).info) == 0:
        return k
    values, vectors = torch.linalg.eigh(k)
    kept = values > 0.0
    clipped = (vectors[:, kept] * values[kept]) @ vectors[:, kept].T
    nearest: Tensor = (clipped + clipped.T) / 2
    return nearest


def grouped_folds(group: Tensor, *, folds: int, generator: torch.Generator) -> Tensor:
    """Assign whole prompts to folds at random, as evenly as can be; fold of each pair (N,)."""
    index = group_index(group)
    order = torch.randperm(int(index.max()) + 1, generator=generator)
    return (order % folds)[index]


def held_out_scores(k: Tensor, fold: Tensor, *, ridge: float) -> Tensor:
    """Kernel ridge towards +1 for every pair, each scored by a fit without its fold, (N,).

    With A = (k + ridge I)^-1 and c = A 1 the scores of a fold F, fitted on all others, are
    1 - (A_FF)^-1 c_F: one inverse instead of one fit a fold.
    """
    n = k.shape[0]
    ones = torch.ones(n, dtype=k.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(k + ridge * torch.eye(n, dtype=k.dtype)))
    coefficients = inverse @ ones
    scores = torch.empty(n, dtype=k.dtype)
    for number in range(int(fold.max()) + 1):
        rows = (fold == number).nonzero().squeeze(-1)
        block = inverse[rows][:, rows]
        scores[rows] = 1.0 - torch.linalg.solve(block, coefficients[rows])
    return scores


def accuracy_of(scores: Tensor, weights: Tensor) -> Tensor:
    """KPA: share of pairs (N,) that held-out scores order right, ties half, (B,), in [0, 1].

    One value for each row of weights (B, N), the first of the data themselves. The bootstrap
    resamples held-out pairs and does not refit; its deviations are widened by 1.25 for the
    dependence of the fits. A score below rounding is a tie.
    """
    right = torch.where(scores.abs() <= 1e-9, 0.5, (scores > 0).double())
    shares = weighted_mean(weights, right)
    return (shares[0] + WIDENING * (shares - shares[0])).clamp(0.0, 1.0)
