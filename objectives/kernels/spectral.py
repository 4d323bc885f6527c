"""The diffusion kernel on Nyström eigenfunctions of the Gaussian kernel."""

import math

import torch
from torch import Tensor

from objectives.kernels.base import KernelModule
from objectives.numerics import log_softplus, squared_distances

FLOOR = 0.05
"""Width of the smooth floor, in units of the mean self-similarity."""

_RELATIVE_EIGENVALUE_CUTOFF = 1e-5


class SpectralKernel(KernelModule):
    """log K = log floor(S(a, b)) - const, S = Σ_i lambda_i^t phi_i(a) phi_i(b).

    (lambda_i, u_i) are the leading eigenpairs of G/m, G the rbf Gram matrix of m landmarks z, and
    phi_i(a) = Σ_j G(a, z_j) u_ji / (lambda_i sqrt m) extends them (Williams & Seeger 2001). S is
    an inner product but can be negative: floor(S) = w log(1 + e^{S/w}), w = 0.05 with mean
    S(a, a) = 1, is S to 1e-9 at S = 1 and w e^{S/w} below 0, so log K falls linearly there and
    keeps its gradient. The constant makes K(a, a) = 1 on average over the sample of responses.
    Far from every landmark all phi_i vanish and K is the constant floor(0).
    """

    landmarks: Tensor
    loadings: Tensor
    bandwidth: Tensor
    log_scale: Tensor

    def __init__(
        self,
        *,
        responses: Tensor,
        median_sq_distance: Tensor,
        landmarks: int,
        rank: int,
        time: float,
    ) -> None:
        super().__init__()
        dtype = responses.dtype
        sample, bandwidth = responses.double(), median_sq_distance.double()
        points = sample[:landmarks]
        loadings = _loadings(_rbf(points, points, bandwidth), rank=rank, time=time)
        self_similarity = (_rbf(sample, points, bandwidth) @ loadings).square().sum(-1)
        loadings = loadings / self_similarity.mean().sqrt()
        floored = _log_floor(self_similarity / self_similarity.mean())
        self.constant("landmarks", points.to(dtype))
        self.constant("loadings", loadings.to(dtype))
        self.constant("bandwidth", bandwidth.to(dtype))
        self.constant("log_scale", floored.exp().mean().log().to(dtype))

    def features(self, a: Tensor) -> Tensor:
        """lambda_i^{t/2} phi_i(a), scaled, for (..., k), shape (..., r): S(a, b) = f(a)·f(b)."""
        flat = a.reshape(-1, a.shape[-1])
        similar = _rbf(flat, self.landmarks, self.bandwidth)
        return (similar @ self.loadings).reshape(*a.shape[:-1], -1)

    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        """Log floor(S(a, b)) - const."""
        return _log_floor((self.features(a) * self.features(b)).sum(-1)) - self.log_scale

    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        """Log floor(S(a_i, b_j)) - const."""
        return _log_floor(self.features(a) @ self.features(b).T) - self.log_scale


def _log_floor(similarity: Tensor) -> Tensor:
    return math.log(FLOOR) + log_softplus(similarity / FLOOR)


def _rbf(a: Tensor, b: Tensor, bandwidth: Tensor) -> Tensor:
    return torch.exp(squared_distances(a, b) / (-2.0 * bandwidth))


def _loadings(gram: Tensor, *, rank: int, time: float) -> Tensor:
    """Columns lambda_i^{t/2 - 1} u_i (m, r) up to one factor: features(a) = G(a, z) loadings.

    Eigenvalues enter relative to the leading one; those below 1e-5 of it are rounding and dropped.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(rank, int((values > _RELATIVE_EIGENVALUE_CUTOFF * values[0]).sum()))
    relative = values[:kept] / values[0]
    loadings: Tensor = vectors[:, :kept] * relative.pow(0.5 * time - 1.0)
    return loadings
