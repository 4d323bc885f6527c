"""The Gaussian kernel in the metric of the responses' covariance."""

import torch
from torch import Tensor

from objectives.kernels.base import KernelModule
from objectives.numerics import squared_distances


class MahalanobisKernel(KernelModule):
    """log K = -(a - b)ᵀ Sigma⁻¹ (a - b) / 2k, Sigma the Ledoit–Wolf covariance; K(a, a) = 1.

    Sigma⁻¹ = C Cᵀ, so the form is ‖(a - b) C‖². Division by k keeps the exponent of order 1 in
    any dimension.
    """

    whitening: Tensor

    def __init__(self, *, precision: Tensor) -> None:
        super().__init__()
        factor = torch.linalg.cholesky(precision.double() / (2.0 * precision.shape[0]))
        self.constant("whitening", factor.to(precision.dtype))

    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        """-(a - b)ᵀ Sigma⁻¹ (a - b) / 2k."""
        return -((a - b) @ self.whitening).square().sum(-1)

    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        """-(a_i - b_j)ᵀ Sigma⁻¹ (a_i - b_j) / 2k."""
        return -squared_distances(a @ self.whitening, b @ self.whitening)
