"""Helpers that keep logarithms, exponentials and means finite, each with its equation."""

import torch
from torch import Tensor

LOG_FLOOR = -1e4
"""Least log-probability: exp of it is 0 in every float, differences with it are finite."""


def upcast(x: Tensor) -> Tensor:
    """The same x in float32 at least; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def floored_log_probs(log_p: Tensor) -> Tensor:
    """max(log p, -1e4) in float32 at least: log 0 becomes finite, its gradient 0."""
    return upcast(log_p).clamp_min(LOG_FLOOR)


def linear_tail_exp(x: Tensor, *, knee: float) -> Tensor:
    """exp(x) up to the knee, its tangent there beyond: e^knee (1 + x - knee).

    Convex and once continuously differentiable; the derivative is exp(min(x, knee)), so it never
    overflows and never dies for large x.
    """
    # relu and not clamp_min: at the knee itself only the exponential may pass a gradient.
    return torch.exp(x.clamp_max(knee)) * (1.0 + torch.relu(x - knee))


def log_softplus(x: Tensor) -> Tensor:
    """Safe log log(1 + e^x), which for x -> -inf is x - e^x / 2 + O(e^2x), for x -> inf log x."""
    low = x < -15.0
    safe = torch.where(low, torch.zeros_like(x), x)
    inner = torch.logaddexp(safe, torch.zeros_like(safe)).log()
    return torch.where(low, x - 0.5 * torch.exp(x.clamp_max(-15.0)), inner)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i - b_j‖² for (n, k) and (m, k), shape (n, m), without an (n, m, k) intermediate."""
    squares = a.square().sum(-1)[:, None] + b.square().sum(-1)[None, :]
    return (squares - 2.0 * (a @ b.T)).clamp_min(0.0)


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Scores log softmax(logits)[label] for (N, V) and (N,), shape (N,); float32 at least."""
    scores = upcast(logits)
    return scores.gather(-1, labels[:, None]).squeeze(-1) - scores.logsumexp(-1)


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Sums of (N,) values by segment, shape (num_segments,), in float32 at least.

    Raises ValueError when values and index differ in shape.
    """
    if values.shape != index.shape or values.ndim != 1:
        raise ValueError(
            f"values {tuple(values.shape)} and index {tuple(index.shape)} must both be (N,): "
            "give one index per token"
        )
    values = upcast(values)
    return values.new_zeros(num_segments).index_add(0, index, values)


def per_pair_mean(values: Tensor, pair_index: Tensor, num_pairs: int) -> Tensor:
    """Mean of (N,) token values by pair, shape (num_pairs,); a pair without tokens gets 0.

    Raises ValueError when values and pair_index differ in shape.
    """
    totals = segment_sum(values, pair_index, num_pairs)
    # Not bincount, which waits for a GPU to know the size of its result.
    counts = segment_sum(torch.ones_like(totals[:1]).expand(values.shape), pair_index, num_pairs)
    return totals / counts.clamp_min(1.0)
