"""The family of p^a q^(1-a): alpha-divergences, Rényi, Hellinger, Bhattacharyya, KL, chi².

u = log p - log q throughout. Every f-divergence is written Σ q [f(e^u) - f'(1)(e^u - 1)], which
has the same value for normalised p and q, terms that are all >= 0 and therefore no cancellation
near p = q, where training spends its time.
"""

import torch
from torch import Tensor

from objectives.numerics import floored_log_probs, linear_tail_exp

EXPONENT_KNEE = 20.0
"""Terms above e^20 (unbounded divergences only) go on along their tangent in log space."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL: Σ p log(p/q) = Σ [p u - p + q], the reverse KL of RLHF, for (N, V), shape (N,)."""
    return kl_terms(floored_log_probs(log_p), floored_log_probs(log_q)).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ q log(q/p), the f-divergence of f = -log, for (N, V), shape (N,)."""
    return kl(log_q, log_p)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Entries p u - p + q >= 0; as p (u + e^-u - 1) where |u| < 1."""
    u = log_p - log_q
    p = log_p.exp()
    near = u.abs() < 1.0
    inner = torch.where(near, u, torch.zeros_like(u))
    return torch.where(near, p * (inner + torch.expm1(-inner)), p * u - p + log_q.exp())


def alpha(log_p: Tensor, log_q: Tensor, *, order: float) -> Tensor:
    """Σ [p^a q^(1-a) - a p + (a-1) q] / (a (a-1)) for (N, V), shape (N,); a not 0 or 1.

    f''(1) = 1, so it has KL's curvature as it is; a -> 1 is kl, a -> 0 forward_kl, a = 2 half of
    Pearson's chi², a = -1 half of Neyman's, a = 1/2 four times the squared Hellinger distance.
    """
    log_p, log_q = floored_log_probs(log_p), floored_log_probs(log_q)
    excess = order - 1.0
    u = log_p - log_q
    p, q = log_p.exp(), log_q.exp()
    near = u.abs() < 1.0
    inner = torch.where(near, u, torch.zeros_like(u))
    # f / q = [e^u (e^{(a-1)u} - 1)/(a-1) - (e^u - 1)] / a: accurate for a near 1 as well.
    close = q * (torch.exp(inner) * torch.expm1(excess * inner) / excess - torch.expm1(inner))
    power = linear_tail_exp(order * log_p - excess * log_q, knee=EXPONENT_KNEE)
    far = (power - p) / excess - p + q
    return (torch.where(near, close, far) / order).sum(-1)


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """4 (1 - Σ sqrt(pq)) = 2 Σ (sqrt p - sqrt q)² in [0, 4], for (N, V), shape (N,)."""
    log_p, log_q = floored_log_probs(log_p), floored_log_probs(log_q)
    return 2.0 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)


def renyi(log_p: Tensor, log_q: Tensor, *, order: float) -> Tensor:
    """Rényi: log Σ p^a q^(1-a) / (a (a-1)) for (N, V), shape (N,); a > 0, not 1.

    Near p = q through log1p(a (a-1) D_alpha), which does not cancel; elsewhere by logsumexp.
    """
    factor = order * (order - 1.0)
    shift = factor * alpha(log_p, log_q, order=order)
    near = shift.abs() < 0.5
    inner = torch.where(near, shift, torch.zeros_like(shift))
    power = order * floored_log_probs(log_p) + (1.0 - order) * floored_log_probs(log_q)
    return torch.where(near, torch.log1p(inner), power.logsumexp(-1)) / factor


def bhattacharyya(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-4 log Σ sqrt(pq), which is renyi of order 1/2 at equal curvature; (N, V), shape (N,)."""
    return renyi(log_p, log_q, order=0.5)


def pearson_chi2(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ (p - q)² / q, f = (u-1)² over f''(1) = 2, for (N, V), shape (N,)."""
    return alpha(log_p, log_q, order=2.0)


def neyman_chi2(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ (p - q)² / p, f = (u-1)²/u over f''(1) = 2, for (N, V), shape (N,)."""
    return alpha(log_q, log_p, order=2.0)
