"""One contract for all kernels, then each against an independent reference."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.spatial.distance import cdist
from torch import Tensor

from core.spec import (
    KernelSpec,
    MahalanobisKernelSpec,
    MixtureKernelSpec,
    MixtureWeights,
    PolynomialKernelSpec,
    RbfKernelSpec,
    SpectralKernelSpec,
)
from objectives import KernelModule, PairEmbeddings, build_kernel, fit_geometry
from objectives.kernels.spectral import FLOOR, SpectralKernel
from tests.unit.objectives.samples import embeddings, geometry64, points, seeds
from tests.unit.objectives.tolerances import PSD, close

DIM = 12
SPECS: dict[str, KernelSpec] = {
    "rbf": RbfKernelSpec(),
    "rbf-wide": RbfKernelSpec(width=4.0),
    "polynomial-2": PolynomialKernelSpec(),
    "polynomial-4": PolynomialKernelSpec(offset=1.01, degree=4),
    "mahalanobis": MahalanobisKernelSpec(),
    "spectral": SpectralKernelSpec(landmarks=32, rank=8),
    "spectral-slow": SpectralKernelSpec(landmarks=64, rank=16, time=4.0),
    "spectral-fast": SpectralKernelSpec(landmarks=64, rank=16, time=0.1),
    "hmk": MixtureKernelSpec(),
    "hmk-fixed": MixtureKernelSpec(
        weights=MixtureWeights(tau_local=0.9, rbf=0.2, spectral=0.7), learned=False
    ),
}
EXACTLY_PSD = [name for name in SPECS if not name.startswith(("spectral", "hmk"))]
GEOMETRY = geometry64()
KERNELS = {name: build_kernel(spec, GEOMETRY) for name, spec in SPECS.items()}


@pytest.fixture(params=list(SPECS))
def kernel(request: pytest.FixtureRequest) -> KernelModule:
    return KERNELS[request.param]


class TestEveryKernel:
    def test_symmetry(self, kernel: KernelModule) -> None:
        a, b = points(9, DIM, 0), points(9, DIM, 1)
        close(kernel.log_k(a, b), kernel.log_k(b, a), dtype=torch.float64)
        gram = kernel.log_gram(a, b)
        close(gram, kernel.log_gram(b, a).T, dtype=torch.float64)

    def test_gram_matrix_is_the_loop_over_pairs(self, kernel: KernelModule) -> None:
        a, b = points(5, DIM, 2), points(4, DIM, 3)
        loop = torch.stack([torch.stack([kernel.log_k(x, y) for y in b]) for x in a])
        close(kernel.log_gram(a, b), loop, dtype=torch.float64)

    def test_leading_dimensions_are_batches(self, kernel: KernelModule) -> None:
        a, b = points(6, DIM, 4), points(6, DIM, 5)
        batched = kernel.log_k(a.reshape(2, 3, DIM), b.reshape(2, 3, DIM))
        close(batched, kernel.log_k(a, b).reshape(2, 3), dtype=torch.float64)

    def test_call_is_log_k(self, kernel: KernelModule) -> None:
        a, b = points(3, DIM, 4), points(3, DIM, 5)
        assert torch.equal(kernel(a, b), kernel.log_k(a, b))

    def test_self_similarity_is_one_on_average_over_the_responses(
        self, kernel: KernelModule
    ) -> None:
        responses = GEOMETRY.responses
        average = kernel.log_k(responses, responses).detach().exp().mean()
        # The cosine's floor of 1e-6 costs the polynomial up to degree / 2 of it.
        assert float(average) == pytest.approx(1.0, abs=5e-5)

    def test_gradients_match_finite_differences(self, kernel: KernelModule) -> None:
        a = points(3, DIM, 6).requires_grad_()
        b = points(3, DIM, 7).requires_grad_()
        assert torch.autograd.gradcheck(kernel.log_k, (a, b))
        assert torch.autograd.gradcheck(kernel.log_gram, (a, b))

    @pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_value_and_gradient_are_finite(
        self, kernel: KernelModule, scale: float, dtype: torch.dtype
    ) -> None:
        module = copy.deepcopy(kernel).to(dtype)
        a = (scale * points(4, DIM, 8)).to(dtype).requires_grad_()
        for b in (a.detach(), (scale * points(4, DIM, 9)).to(dtype)):
            value = module.log_k(a, b).sum() + module.log_gram(a, b).sum()
            (gradient,) = torch.autograd.grad(value, a)
            assert bool(torch.isfinite(value))
            assert bool(torch.isfinite(gradient).all())

    def test_float32_agrees_with_float64(self, kernel: KernelModule) -> None:
        a, b = points(20, DIM, 10), points(20, DIM, 11)
        single = copy.deepcopy(kernel).float().log_k(a.float(), b.float())
        torch.testing.assert_close(single.double(), kernel.log_k(a, b), rtol=1e-3, atol=1e-3)

    def test_similarity_to_oneself_beats_that_to_a_far_point(self, kernel: KernelModule) -> None:
        a = GEOMETRY.responses[:8]
        assert bool((kernel.log_k(a, a) > kernel.log_k(a, -3.0 * a)).all())

    def test_constants_stay_out_of_the_state(self, kernel: KernelModule) -> None:
        names = set(kernel.state_dict())
        learned = {"raw_tau", "raw_local", "raw_global"}
        assert names == ({n for n, _ in kernel.named_parameters()} & learned)


@pytest.mark.parametrize("name", EXACTLY_PSD)
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_gram_matrix_is_positive_semidefinite(name: str, seed: int) -> None:
    a = points(25, DIM, seed)
    values = torch.linalg.eigvalsh(KERNELS[name].log_gram(a, a).exp())
    assert float(values.min()) >= -PSD * float(values.max())


@pytest.mark.parametrize("name", ["spectral", "spectral-slow", "spectral-fast"])
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_spectral_floor_moves_a_positive_semidefinite_matrix_by_its_width_at_most(
    name: str, seed: int
) -> None:
    """S itself is an inner product; K = floor(S) differs only where S is small or negative."""
    kernel = KERNELS[name]
    assert isinstance(kernel, SpectralKernel)
    a = points(25, DIM, seed)
    features = kernel.features(a)
    similarity = features @ features.T
    floored = (kernel.log_gram(a, a) + kernel.log_scale).exp()
    values = torch.linalg.eigvalsh(similarity)
    assert float(values.min()) >= -PSD * float(values.max())
    shift = floored - similarity.clamp_min(0.0)
    assert float(shift.min()) >= -1e-9
    assert float(shift.max()) <= FLOOR * np.log(2.0) + 1e-9
    assert float(floored.min()) > 0.0


def test_rbf_matches_scipy() -> None:
    a, b = points(7, DIM, 0), points(8, DIM, 1)
    sigma2 = 4.0 * float(GEOMETRY.median_sq_distance)
    expected = -cdist(a.numpy(), b.numpy(), "sqeuclidean") / (2.0 * sigma2)
    actual = KERNELS["rbf-wide"].log_gram(a, b)
    close(actual, torch.from_numpy(expected), dtype=torch.float64)


def test_mahalanobis_matches_scipy() -> None:
    a, b = points(7, DIM, 0), points(8, DIM, 1)
    precision = GEOMETRY.response_precision.numpy()
    distances = cdist(a.numpy(), b.numpy(), "mahalanobis", VI=precision)
    expected = torch.from_numpy(-0.5 * distances**2 / DIM)
    close(KERNELS["mahalanobis"].log_gram(a, b), expected, dtype=torch.float64)


def test_polynomial_matches_scipy_cosine() -> None:
    a, b = points(7, DIM, 0), points(8, DIM, 1)
    cosine = 1.0 - cdist(a.numpy(), b.numpy(), "cosine")
    expected = torch.from_numpy(((cosine + 1.01) / 2.01) ** 4)
    actual = KERNELS["polynomial-4"].log_gram(a, b).exp()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rbf", "mahalanobis"])
def test_stationary_kernels_ignore_translation(name: str) -> None:
    a, b, shift = points(6, DIM, 0), points(6, DIM, 1), points(1, DIM, 2)
    kernel = KERNELS[name]
    close(kernel.log_k(a + shift, b + shift), kernel.log_k(a, b), dtype=torch.float64)


def _on_landmarks(*, rank: int, time: float, landmarks: int) -> tuple[Tensor, Tensor]:
    """S on the landmarks and the rbf Gram matrix there, each divided by its mean diagonal."""
    spec = SpectralKernelSpec(landmarks=landmarks, rank=rank, time=time)
    kernel = build_kernel(spec, GEOMETRY)
    assert isinstance(kernel, SpectralKernel)
    z = GEOMETRY.responses[:landmarks]
    features = kernel.features(z)
    similarity = features @ features.T
    gram = KERNELS["rbf"].log_gram(z, z).exp()
    return similarity / similarity.diagonal().mean(), gram


@pytest.mark.parametrize("time", [1.0, 2.0, 3.0])
def test_spectral_kernel_at_full_rank_is_a_power_of_the_gram_matrix(time: float) -> None:
    similarity, gram = _on_landmarks(rank=24, time=time, landmarks=24)
    power = torch.linalg.matrix_power(gram, int(time))
    torch.testing.assert_close(similarity, power / power.diagonal().mean(), rtol=1e-6, atol=1e-6)


def test_spectral_kernel_of_low_rank_is_the_best_approximation() -> None:
    """Eckart–Young: the leading eigenpairs, here from numpy."""
    similarity, gram = _on_landmarks(rank=5, time=1.0, landmarks=40)
    values, vectors = np.linalg.eigh(gram.numpy())
    best = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    expected = torch.from_numpy(best / best.diagonal().mean())
    torch.testing.assert_close(similarity, expected, rtol=1e-6, atol=1e-6)


def test_spectral_kernel_far_from_all_landmarks_is_flat() -> None:
    far = 1e3 * points(2, DIM, 0)
    kernel = KERNELS["spectral"]
    assert isinstance(kernel, SpectralKernel)
    floor_at_zero = np.log(FLOOR * np.log(2.0)) - float(kernel.log_scale)
    close(kernel.log_k(far[0], far[1]), floor_at_zero, dtype=torch.float64)


@pytest.mark.parametrize("name", list(SPECS))
def test_constant_embeddings_give_a_flat_kernel(name: str) -> None:
    flat = torch.full((5, 8), 3.0)
    geometry = fit_geometry(PairEmbeddings(flat, flat, flat), seed=0)
    kernel = build_kernel(SPECS[name], geometry)
    prepared = geometry.prepare(flat).requires_grad_()
    value = kernel.log_k(prepared, geometry.prepare(flat + 1.0))
    (gradient,) = torch.autograd.grad(value.sum(), prepared)
    close(value, value.mean().detach().expand(5), dtype=torch.float32)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(gradient).all())


def test_more_landmarks_than_responses_take_all_of_them() -> None:
    geometry = fit_geometry(embeddings(pairs=6), seed=0)
    kernel = build_kernel(SpectralKernelSpec(landmarks=512, rank=64), geometry)
    assert isinstance(kernel, SpectralKernel)
    assert kernel.landmarks.shape[0] == 12
    assert kernel.loadings.shape[1] <= 12
