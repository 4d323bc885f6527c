"""HMK, the hierarchical mixture of kernels."""

import math

import torch
from torch import Tensor, nn

from core.spec import KernelName, MixtureWeights
from objectives.kernels.base import KernelModule

_LOCAL = (KernelName.RBF, KernelName.POLYNOMIAL)
_GLOBAL = (KernelName.SPECTRAL, KernelName.MAHALANOBIS)


class MixtureKernel(KernelModule):
    """K = tau_l (l1 K_rbf + l2 K_poly) + tau_g (l3 K_spectral + l4 K_mahalanobis).

    Each of the three groups is a softmax of two free logits; they are parameters when `learned`,
    constants otherwise. In log space: logsumexp of log-weights plus log-kernels.
    """

    raw_tau: Tensor
    raw_local: Tensor
    raw_global: Tensor

    def __init__(
        self,
        *,
        rbf: KernelModule,
        polynomial: KernelModule,
        spectral: KernelModule,
        mahalanobis: KernelModule,
        weights: MixtureWeights,
        learned: bool,
        like: Tensor,
    ) -> None:
        super().__init__()
        members = (rbf, polynomial, spectral, mahalanobis)
        self.members = nn.ModuleList(members)
        self._kernels = members
        first_shares = {
            "raw_tau": weights.tau_local,
            "raw_local": weights.rbf,
            "raw_global": weights.spectral,
        }
        for name, share in first_shares.items():
            logits = like.new_tensor([math.log(share), math.log1p(-share)])
            if learned:
                self.register_parameter(name, nn.Parameter(logits))
            else:
                self.constant(name, logits)

    def log_weights(self) -> Tensor:
        """Log of the four effective weights tau * lambda, shape (4,); they sum to 1."""
        tau = self.raw_tau.log_softmax(0)
        return torch.cat(
            [tau[0] + self.raw_local.log_softmax(0), tau[1] + self.raw_global.log_softmax(0)]
        )

    def entropy(self) -> Tensor:
        """H = -Σ w log w of the four effective weights, in [0, log 4], shape ()."""
        log_weights = self.log_weights()
        return -(log_weights.exp() * log_weights).sum()

    def weights(self) -> dict[str, Tensor]:
        """tau_local and tau_global, and each kernel's share of its group; detached, shape ()."""
        groups = (
            (("tau_local", "tau_global"), self.raw_tau),
            (_LOCAL, self.raw_local),
            (_GLOBAL, self.raw_global),
        )
        return {
            str(name): share
            for names, logits in groups
            for name, share in zip(names, logits.detach().softmax(0).unbind(), strict=True)
        }

    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        """Log Σ_i w_i K_i(a, b)."""
        return self._mix([kernel.log_k(a, b) for kernel in self._kernels])

    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        """Log Σ_i w_i K_i(a_i, b_j)."""
        return self._mix([kernel.log_gram(a, b) for kernel in self._kernels])

    def _mix(self, log_kernels: list[Tensor]) -> Tensor:
        return (torch.stack(log_kernels, -1) + self.log_weights()).logsumexp(-1)
