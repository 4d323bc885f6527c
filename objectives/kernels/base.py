"""What every kernel is: a module that knows log K, one pair at a time or as a Gram matrix."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class KernelModule(nn.Module, ABC):
    """A positive kernel on prepared embeddings, scaled so that K(a, a) is 1 on average.

    Constants fitted on data are buffers outside the state dict: they are saved with the geometry.
    """

    @abstractmethod
    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        """Log K(a, b) for (..., k) and (..., k), shape (...)."""

    @abstractmethod
    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        """Log K(a_i, b_j) for (n, k) and (m, k), shape (n, m)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The same as log_k."""
        return self.log_k(a, b)

    def constant(self, name: str, value: Tensor) -> None:
        """Keep a fitted constant: it moves with the module and is not part of its state."""
        self.register_buffer(name, value, persistent=False)
