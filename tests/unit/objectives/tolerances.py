"""How far two computations of one number may lie apart; the only place that says so."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """|x - y| <= atol + rtol * |y|."""

    rtol: float
    atol: float


TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-9, atol=1e-11),
    torch.float32: Tolerance(rtol=1e-5, atol=2e-6),
    torch.bfloat16: Tolerance(rtol=2e-2, atol=2e-2),
}

PSD = 1e-9
"""Least eigenvalue of a positive semidefinite Gram matrix in float64, relative to its largest."""

LIMIT = 5e-3
"""Relative distance to a limit that is approached, not reached (order -> 1, p -> q)."""

SMALL_DRIFT = 1e-3
"""Relative error of a float32 divergence of 1e-5 over a large vocabulary."""

STREAMED_SMALL_DRIFT = 5e-4
"""Relative error of a streamed float32 divergence of 1e-5 and less over 4,000 tokens."""


def close(actual: torch.Tensor, expected: torch.Tensor | float, *, dtype: torch.dtype) -> None:
    """Assert closeness in both value and shape under the table's entry for dtype."""
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.detach().double(),
        torch.as_tensor(expected, dtype=torch.float64).detach(),
        rtol=tolerance.rtol,
        atol=tolerance.atol,
    )
