"""Link functions g = f′ of f-DPO, in log space and bounded in slope."""

import math

import torch
from torch import Tensor, nn

from objectives.numerics import linear_tail_exp, upcast

LINK_KNEE = 4.0
"""Exponents are exact up to 4; beyond, a link goes on with the slope it has there (e^4 = 55).

exp(-rho) overflows for ordinary long answers, and long before that one pair outweighs a batch.
"""


def identity_link(rho: Tensor) -> Tensor:
    """The identity g = rho, of kl."""
    return upcast(rho)


def jensen_shannon_link(rho: Tensor) -> Tensor:
    """Bounded above: g = log 2 + log sigma(rho)."""
    return math.log(2.0) + nn.functional.logsigmoid(upcast(rho))


def forward_kl_link(rho: Tensor) -> Tensor:
    """Bounded above: g = 1 - e^{-rho}; linear with slope e^4 for rho < -4."""
    return 1.0 - linear_tail_exp(-upcast(rho), knee=LINK_KNEE)


def hellinger_link(rho: Tensor) -> Tensor:
    """Bounded above: g = 1 - e^{-rho/2}; linear with slope e^4 / 2 for rho < -8."""
    return 1.0 - linear_tail_exp(-0.5 * upcast(rho), knee=LINK_KNEE)


def power_link(rho: Tensor, *, order: float) -> Tensor:
    """Of the a-divergence: g = (e^{(a-1) rho} - 1) / (a-1); a > 0, not 1.

    With x = (a-1) rho, linear beyond x = 4. For a > 1 the exponential also dies where the
    likelihood of an answer falls (0 is in the domain of f′, outside f-DPO's theorem), so there
    the slope stays at that of x = -4.
    """
    excess = order - 1.0
    x = excess * upcast(rho)
    if order < 1.0:
        return (linear_tail_exp(x, knee=LINK_KNEE) - 1.0) / excess
    raised = linear_tail_exp(x.clamp_min(-LINK_KNEE), knee=LINK_KNEE)
    fallen = math.exp(-LINK_KNEE) * torch.relu(-LINK_KNEE - x)
    return (raised - fallen - 1.0) / excess
