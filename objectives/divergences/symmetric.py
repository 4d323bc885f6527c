"""Symmetric f-divergences outside the power family: Jensen–Shannon, Jeffreys, total variation."""

import math

import torch
from torch import Tensor

from objectives.divergences.power import kl_terms
from objectives.numerics import floored_log_probs


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """4 [½ KL(p‖m) + ½ KL(q‖m)], m = (p+q)/2, in [0, 4 log 2], for (N, V), shape (N,)."""
    log_p, log_q = floored_log_probs(log_p), floored_log_probs(log_q)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 2.0 * (kl_terms(log_p, log_m) + kl_terms(log_q, log_m)).sum(-1)


def jeffreys(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ (p - q) log(p/q), f = (u-1) log u over f''(1) = 2, for (N, V), shape (N,)."""
    log_p, log_q = floored_log_probs(log_p), floored_log_probs(log_q)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ |p - q| in [0, 1]; a kink at p = q, so not scaled; (N, V), shape (N,)."""
    log_p, log_q = floored_log_probs(log_p), floored_log_probs(log_q)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
