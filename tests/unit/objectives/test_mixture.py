"""HMK: weights on simplices, the mixture by hand, entropy, learning."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.spec import MixtureKernelSpec, MixtureWeights
from objectives import MixtureKernel, build_kernel
from tests.unit.objectives.samples import geometry64, points
from tests.unit.objectives.tolerances import close

GEOMETRY = geometry64(pairs=20)
shares = st.floats(min_value=0.01, max_value=0.99)


def mixture(weights: MixtureWeights, *, learned: bool = True) -> MixtureKernel:
    kernel = build_kernel(MixtureKernelSpec(weights=weights, learned=learned), GEOMETRY)
    assert isinstance(kernel, MixtureKernel)
    return kernel


@given(tau=shares, rbf=shares, spectral=shares)
@settings(deadline=None, max_examples=15)
def test_mixture_is_the_formula(tau: float, rbf: float, spectral: float) -> None:
    spec = MixtureKernelSpec(weights=MixtureWeights(tau_local=tau, rbf=rbf, spectral=spectral))
    kernel = build_kernel(spec, GEOMETRY)
    a, b = points(6, 12, 0), points(6, 12, 1)
    parts = (spec.rbf, spec.polynomial, spec.spectral, spec.mahalanobis)
    k = [build_kernel(part, GEOMETRY).log_k(a, b).exp() for part in parts]
    expected = tau * (rbf * k[0] + (1 - rbf) * k[1]) + (1 - tau) * (
        spectral * k[2] + (1 - spectral) * k[3]
    )
    close(kernel.log_k(a, b).exp(), expected, dtype=torch.float64)


@given(tau=shares, rbf=shares, spectral=shares)
@settings(deadline=None, max_examples=15)
def test_entropy_is_that_of_the_four_effective_weights(
    tau: float, rbf: float, spectral: float
) -> None:
    kernel = mixture(MixtureWeights(tau_local=tau, rbf=rbf, spectral=spectral))
    effective = [tau * rbf, tau * (1 - rbf), (1 - tau) * spectral, (1 - tau) * (1 - spectral)]
    expected = torch.distributions.Categorical(
        probs=torch.tensor(effective, dtype=torch.float64)
    ).entropy()
    close(kernel.entropy(), expected, dtype=torch.float64)
    close(kernel.log_weights().exp().sum(), 1.0, dtype=torch.float64)


def test_weights_are_reported_by_name() -> None:
    weights = mixture(MixtureWeights(tau_local=0.7, rbf=0.2, spectral=0.4)).weights()
    expected = {
        "tau_local": 0.7,
        "tau_global": 0.3,
        "rbf": 0.2,
        "polynomial": 0.8,
        "spectral": 0.4,
        "mahalanobis": 0.6,
    }
    assert {name: float(w) for name, w in weights.items()} == pytest.approx(expected)


def test_even_weights_have_the_greatest_entropy() -> None:
    assert float(mixture(MixtureWeights()).entropy().detach()) == pytest.approx(math.log(4.0))


def test_learned_weights_have_gradients_and_fixed_ones_are_no_parameters() -> None:
    a, b = points(4, 12, 0), points(4, 12, 1)
    learned = mixture(MixtureWeights())
    learned.log_k(a, b).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in learned.parameters())
    fixed = mixture(MixtureWeights(), learned=False)
    assert list(fixed.parameters()) == []
    assert not fixed.log_k(a, b).requires_grad


def test_weights_stay_positive_after_any_step() -> None:
    kernel = mixture(MixtureWeights())
    with torch.no_grad():
        kernel.raw_tau.copy_(torch.tensor([-1e4, 1e4]))
    a, b = points(4, 12, 0), points(4, 12, 1)
    value = kernel.log_k(a, b)
    value.sum().backward()
    assert bool(torch.isfinite(value).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in kernel.parameters())
    assert float(kernel.entropy().detach()) >= 0.0


def test_log_space_survives_underflow_of_every_kernel_value() -> None:
    kernel = mixture(MixtureWeights(tau_local=0.5, rbf=0.99, spectral=0.01)).float()
    far = torch.full((1, 12), 50.0)
    assert bool(torch.isfinite(kernel.log_k(far, -far)).all())
