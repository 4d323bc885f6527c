"""The polynomial kernel of the cosine."""

import math

from torch import Tensor

from objectives.kernels.base import KernelModule

COSINE_FLOOR = 1e-6
"""Added to squared norms, which are 1 on average: a zero vector gets a finite gradient."""


class PolynomialKernel(KernelModule):
    """log K = d log(cos(a, b) + c) - d log(1 + c), with c > 1 so that K > 0.

    cos = a·b / sqrt((‖a‖² + 1e-6)(‖b‖² + 1e-6)), an inner product of shortened unit vectors, so K
    stays positive semidefinite; K(a, a) = 1 up to the 1e-6, and (c / (1 + c))^d at a = 0.
    """

    def __init__(self, *, offset: float, degree: int) -> None:
        super().__init__()
        self.offset = offset
        self.degree = degree

    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        """The closed form d log((cos(a, b) + c) / (1 + c))."""
        return self._log((_direction(a) * _direction(b)).sum(-1))

    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        """The closed form d log((cos(a_i, b_j) + c) / (1 + c))."""
        return self._log(_direction(a) @ _direction(b).T)

    def _log(self, cosine: Tensor) -> Tensor:
        return self.degree * ((cosine + self.offset).log() - math.log1p(self.offset))


def _direction(a: Tensor) -> Tensor:
    return a * (a.square().sum(-1, keepdim=True) + COSINE_FLOOR).rsqrt()
