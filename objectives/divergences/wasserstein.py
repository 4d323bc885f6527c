"""Sliced Wasserstein distance between next-token distributions over output embeddings."""

import torch
from torch import Tensor, nn

from objectives.numerics import floored_log_probs, upcast


class SlicedWasserstein(nn.Module):
    """Mean over R directions of W₁ = ∫ |F_p - F_q| of the tokens' projected output embeddings.

    Rows of the head (V, H) are projected on R unit directions drawn once from `seed`; each
    projection is scaled to unit standard deviation over the vocabulary (a constant one stays).
    In one dimension W₁ = Σ_j |Σ_{i<=j} (p - q)_(i)| (x_(j+1) - x_(j)) over sorted x.
    A kink at p = q, so not scaled to a curvature.
    """

    order: Tensor
    gaps: Tensor

    def __init__(self, head: Tensor, *, directions: int, seed: int) -> None:
        super().__init__()
        if head.ndim != 2 or 0 in head.shape:
            raise ValueError(
                f"head has shape {tuple(head.shape)}, expected the output embedding (V, H)"
            )
        rows = upcast(head.detach())
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(rows.shape[1], directions, generator=generator, dtype=torch.float64)
        units = (drawn / drawn.norm(dim=0)).to(device=rows.device, dtype=rows.dtype)
        positions = (rows - rows.mean(0)) @ units
        spread = positions.std(0, correction=0)
        positions = positions / torch.where(spread > 0, spread, torch.ones_like(spread))
        ordered, order = positions.T.contiguous().sort(-1)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("gaps", ordered.diff(dim=-1), persistent=False)

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Sliced W₁ for (N, V) and (N, V), shape (N,); ValueError when V is not the head's."""
        if log_p.shape[-1] != self.order.shape[-1]:
            raise ValueError(
                f"distributions over {log_p.shape[-1]} tokens do not fit a head of "
                f"{self.order.shape[-1]} rows: pass the head that made the logits"
            )
        mass = floored_log_probs(log_p).exp() - floored_log_probs(log_q).exp()
        total = mass.new_zeros(mass.shape[0])
        for order, gaps in zip(self.order, self.gaps, strict=True):
            excess = mass[:, order].cumsum(-1)[:, :-1]
            total = total + (excess.abs() * gaps.to(mass.dtype)).sum(-1)
        return total / self.order.shape[0]
