"""The Gaussian kernel."""

from torch import Tensor

from objectives.kernels.base import KernelModule
from objectives.numerics import squared_distances


class RbfKernel(KernelModule):
    """log K = -‖a - b‖² / 2 sigma², sigma² = width * median squared distance; K(a, a) = 1."""

    bandwidth: Tensor

    def __init__(self, *, median_sq_distance: Tensor, width: float) -> None:
        super().__init__()
        self.constant("bandwidth", width * median_sq_distance)

    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        """-‖a - b‖² / 2 sigma²."""
        return (a - b).square().sum(-1) / (-2.0 * self.bandwidth)

    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        """-‖a_i - b_j‖² / 2 sigma²."""
        return squared_distances(a, b) / (-2.0 * self.bandwidth)
