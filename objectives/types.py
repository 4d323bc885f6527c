"""What goes into an objective and what comes out of it.

Shapes: B pairs, N tokens, V vocabulary, H width of the model, k prepared dimensions.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class PairEmbeddings:
    """Raw embeddings of pairs, each (B, H): prompt, chosen response, rejected response."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PreferenceBatch:
    """What the objective needs to know about B pairs.

    `log_ratio_*` is rho(y) = log pi_theta(y|x) - log pi_0(y|x), summed over response tokens.
    `embeddings` are required by a kernel term, `token_divergence` (the mean of D over the response
    tokens of both responses) by a penalty term. `weight` multiplies the loss of its pair.
    """

    log_ratio_chosen: Tensor
    log_ratio_rejected: Tensor
    embeddings: PairEmbeddings | None
    token_divergence: Tensor | None
    weight: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveOutput:
    """Unreduced losses (B,), a batch-independent term (), and detached metrics, (B,) or ().

    The total of a batch is mean(loss) + regularizer; the denominator of the mean belongs to
    the trainer, so that gradient accumulation does not change the result.
    """

    loss: Tensor
    regularizer: Tensor
    metrics: dict[str, Tensor]


class Kernel(Protocol):
    """A positive kernel on prepared embeddings, in log space."""

    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        """Log K(a, b) for (..., k) and (..., k), shape (...)."""
        ...

    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        """Log K(a_i, b_j) for (n, k) and (m, k), shape (n, m)."""
        ...


class Divergence(Protocol):
    """A divergence between next-token distributions, with KL's curvature at p = q."""

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D(p‖q) for normalised log-probabilities (N, V) and (N, V), shape (N,)."""
        ...
