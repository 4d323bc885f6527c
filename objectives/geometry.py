"""The frozen frame in which kernels see embeddings: centring, PCA, scale, covariance, sample."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from objectives.numerics import upcast
from objectives.types import PairEmbeddings

_RELATIVE_RANK_CUTOFF = 1e-10
_ROUNDING_VARIANCE = 1e-12
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Geometry:
    """Fitted once on the reference's embeddings of the training split, then frozen.

    `mean` (H,), `projection` (H, k) and `scale` () give a = Pᵀ(e - mu)/s with E‖a‖² = 1;
    `median_sq_distance` () is the median ‖a - b‖² over prompt–response pairs;
    `response_precision` (k, k) the inverse Ledoit–Wolf covariance of prepared responses;
    `responses` (m, k) a random sample of prepared responses (landmarks, normalisation).
    """

    mean: Tensor
    projection: Tensor
    scale: Tensor
    median_sq_distance: Tensor
    response_precision: Tensor
    responses: Tensor

    @property
    def width(self) -> int:
        """H, the width of raw embeddings."""
        return self.projection.shape[0]

    @property
    def dim(self) -> int:
        """k, the number of prepared dimensions."""
        return self.projection.shape[1]

    def prepare(self, e: Tensor) -> Tensor:
        """Prepared a = Pᵀ(e - mu)/s for (..., H), shape (..., k); float32 at least."""
        return project(e, mean=self.mean, projection=self.projection, scale=self.scale)

    def to(
        self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None
    ) -> "Geometry":
        """A copy on another device or in another precision."""
        return Geometry(**{n: t.to(device=device, dtype=dtype) for n, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; `from_tensors` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Geometry":
        """Rebuild from `tensors()`; ValueError when names or shapes do not fit together."""
        names = {field.name for field in fields(cls)}
        if set(tensors) != names:
            raise ValueError(
                f"a geometry consists of {sorted(names)}, received {sorted(tensors)}: "
                "fit it again or load the file that was saved from it"
            )
        geometry = cls(**tensors)
        if geometry.projection.ndim != 2 or geometry.responses.ndim != 2:
            raise ValueError("projection and responses of a geometry must be matrices")
        width, dim = geometry.projection.shape
        expected: dict[str, tuple[int, ...]] = {
            "mean": (width,),
            "scale": (),
            "median_sq_distance": (),
            "response_precision": (dim, dim),
            "responses": (geometry.responses.shape[0], dim),
        }
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"{name} of a geometry has shape {tuple(tensors[name].shape)}, expected "
                    f"{shape} beside a projection of shape {(width, dim)}"
                )
        return geometry


def project(e: Tensor, *, mean: Tensor, projection: Tensor, scale: Tensor) -> Tensor:
    """Prepared a = Pᵀ(e - mu)/s for (..., H), shape (..., k), in the precision of P at least.

    Raises ValueError when the last dimension is not H.
    """
    if e.shape[-1] != mean.shape[0]:
        raise ValueError(
            f"embeddings of width {e.shape[-1]} do not fit a geometry of width {mean.shape[0]}: "
            "fit the geometry on embeddings of the same model"
        )
    e = upcast(e)
    dtype = torch.promote_types(e.dtype, mean.dtype)
    centred = e.to(dtype) - mean.to(dtype)
    return centred @ projection.to(dtype) / scale.to(dtype)


def fit_geometry(
    embeddings: PairEmbeddings, *, max_dim: int = 64, max_landmarks: int = 512, seed: int
) -> Geometry:
    """Fit the frame on N pairs of raw embeddings (N, H); deterministic in its arguments.

    mu and P are of prompts and responses together (3N rows). Directions whose spread is rounding
    noise are dropped, so k can be less than `max_dim`; where nothing varies at all, P = 0 and
    every kernel is flat. Raises ValueError for empty, ragged or non-finite embeddings.
    """
    _check(embeddings, max_dim=max_dim, max_landmarks=max_landmarks)
    parts = (embeddings.prompt, embeddings.chosen, embeddings.rejected)
    mean = torch.stack([_sum64(part) for part in parts]).sum(0) / (3 * parts[0].shape[0])
    projection, variances = _principal_directions(parts, mean, max_dim=max_dim)
    spread = variances.sum().sqrt()
    scale = torch.where(spread > 0, spread, torch.ones_like(spread))
    prompt, chosen, rejected = (
        torch.cat([(rows.double() - mean) @ projection / scale for rows in _chunks(part)])
        for part in parts
    )
    distances = torch.cat([chosen - prompt, rejected - prompt]).square().sum(-1)
    responses = torch.cat([chosen, rejected])
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(responses.shape[0], generator=generator)[:max_landmarks]
    return Geometry(
        mean=mean.float(),
        projection=projection.float(),
        scale=scale.float(),
        median_sq_distance=_typical(distances).float(),
        response_precision=_precision(ledoit_wolf(responses)).float(),
        responses=responses[picked.to(responses.device)].float(),
    )


def ledoit_wolf(x: Tensor) -> Tensor:
    """Shrunk covariance (1 - b) S + b m I of rows (n, k), shape (k, k).

    S = XᵀX / n of centred rows, m = tr S / k, b = min(1, b²/d²) with d² = ‖S - mI‖² and
    b² = (1/n²) Σ_i ‖x_i x_iᵀ - S‖² (Ledoit & Wolf 2004, squared Frobenius norms).
    """
    n, dim = x.shape
    x = x - x.mean(0)
    covariance = x.T @ x / n
    level = covariance.diagonal().mean()
    target = level * torch.eye(dim, dtype=x.dtype, device=x.device)
    distance = (covariance - target).square().sum()
    noise = (x.square().sum(-1).square().mean() - covariance.square().sum()).clamp_min(0.0) / n
    shrinkage = torch.where(distance > 0, noise / distance, torch.zeros_like(noise))
    shrinkage = shrinkage.clamp_max(1.0)
    return (1.0 - shrinkage) * covariance + shrinkage * target


def _precision(covariance: Tensor) -> Tensor:
    """Inverse of a covariance, eigenvalues floored at 1e-6 of their mean; k I for rounding."""
    dim = covariance.shape[0]
    level = covariance.diagonal().mean()
    if level <= _ROUNDING_VARIANCE:
        # No spread at all: the unit total variance of prepared embeddings, spread evenly.
        return dim * torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    values, vectors = torch.linalg.eigh(covariance)
    inverse: Tensor = (vectors / values.clamp_min(1e-6 * level)) @ vectors.T
    return inverse


def _principal_directions(
    parts: tuple[Tensor, ...], mean: Tensor, *, max_dim: int
) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (H, k) and eigenvalues (k,) of the pooled covariance, float64.

    Works on the smaller of the covariance (H, H) and the Gram matrix (3N, 3N). Signs are fixed
    by the largest component, so that the result does not depend on the linear-algebra library.
    """
    rows, width = sum(part.shape[0] for part in parts), mean.shape[0]
    if rows <= width:
        centred = torch.cat([part.double() for part in parts]) - mean
        values, vectors = torch.linalg.eigh(centred @ centred.T / rows)
    else:
        covariance = mean.new_zeros(width, width)
        for part in parts:
            for chunk in _chunks(part):
                block = chunk.double() - mean
                covariance += block.T @ block
        values, vectors = torch.linalg.eigh(covariance / rows)
    values, vectors = values.flip(0), vectors.flip(1)
    cutoff = torch.maximum(
        _RELATIVE_RANK_CUTOFF * values[0], _ROUNDING_VARIANCE * mean.square().sum()
    )
    rank = min(max_dim, int((values > cutoff).sum()))
    if rank == 0:
        return mean.new_zeros(width, 1), mean.new_zeros(1)
    values, vectors = values[:rank], vectors[:, :rank]
    if rows <= width:
        vectors, _ = torch.linalg.qr(centred.T @ vectors)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.sign(largest), values


def _typical(distances: Tensor) -> Tensor:
    """Median of squared distances; their mean where the median is 0; 1 where all are 0."""
    for value in (distances.quantile(0.5), distances.mean()):
        if value > 0:
            return value
    return torch.ones_like(distances[0])


def _chunks(part: Tensor) -> tuple[Tensor, ...]:
    return torch.split(part, _CHUNK_ROWS)


def _sum64(part: Tensor) -> Tensor:
    return torch.stack([chunk.double().sum(0) for chunk in _chunks(part)]).sum(0)


def _check(embeddings: PairEmbeddings, *, max_dim: int, max_landmarks: int) -> None:
    shape = embeddings.prompt.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"prompt embeddings have shape {tuple(shape)}, expected (N, H) with at least one pair"
        )
    if max_dim < 1 or max_landmarks < 1:
        raise ValueError(
            f"max_dim {max_dim} and max_landmarks {max_landmarks} must both be at least 1"
        )
    for name in ("prompt", "chosen", "rejected"):
        part: Tensor = getattr(embeddings, name)
        if part.shape != shape:
            raise ValueError(
                f"{name} embeddings have shape {tuple(part.shape)}, expected {tuple(shape)} as "
                "the prompts: give one row per pair"
            )
        if not bool(torch.isfinite(part).all()):
            bad = int((~torch.isfinite(part).all(-1)).sum())
            raise ValueError(
                f"{bad} of {shape[0]} {name} embeddings hold NaN or infinity: run the model in a "
                "wider dtype (bfloat16 or float32)"
            )
