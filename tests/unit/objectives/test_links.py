"""Links are f′ in log space where exact, and keep a gradient where f′ overflows or dies."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.spec import (
    BhattacharyyaSpec,
    DivergenceSpec,
    FAlpha,
    FDivergenceSpec,
    FForwardKl,
    FJeffreys,
    FNeymanChi2,
    FPearsonChi2,
    FTotalVariation,
    HellingerSpec,
    JensenShannonSpec,
    KlSpec,
    RenyiSpec,
    WassersteinSpec,
    has_link,
)
from objectives import link

# Generators as f-DPO normalises them; Jensen–Shannon and Hellinger are twice D's.
GENERATORS: dict[str, tuple[DivergenceSpec, Callable[[Tensor], Tensor]]] = {
    "kl": (KlSpec(), lambda u: u * u.log()),
    "jensen_shannon": (
        JensenShannonSpec(),
        lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    ),
    "hellinger": (HellingerSpec(), lambda u: (1 - u.sqrt()).square()),
    "bhattacharyya": (BhattacharyyaSpec(), lambda u: (1 - u.sqrt()).square()),
    "forward_kl": (FDivergenceSpec(f=FForwardKl()), lambda u: -u.log()),
    "renyi-0.5": (RenyiSpec(order=0.5), lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * -0.5)),
    "alpha-0.3": (
        FDivergenceSpec(f=FAlpha(order=0.3)),
        lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.3 * -0.7),
    ),
    "alpha-3": (
        FDivergenceSpec(f=FAlpha(order=3.0)),
        lambda u: (u**3 - 3 * u + 2) / 6,
    ),
}
SPECS = {name: spec for name, (spec, _) in GENERATORS.items()}


def derivative(f: Callable[[Tensor], Tensor], u: float) -> float:
    leaf = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(leaf), leaf)
    return float(slope)


@pytest.mark.parametrize("name", list(GENERATORS))
@given(rho=st.floats(min_value=-1.9, max_value=1.9))
@settings(deadline=None, max_examples=15)
def test_link_is_the_derivative_of_the_generator(name: str, rho: float) -> None:
    """g(rho) = f′(e^rho) - f′(1), the generator differentiated by autograd."""
    spec, f = GENERATORS[name]
    actual = float(link(spec)(torch.tensor(rho, dtype=torch.float64)))
    expected = derivative(f, math.exp(rho)) - derivative(f, 1.0)
    assert actual == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("name", list(SPECS))
def test_link_passes_through_zero_and_never_falls(name: str) -> None:
    g = link(SPECS[name])
    assert float(g(torch.tensor(0.0))) == pytest.approx(0.0, abs=1e-7)
    values = g(torch.linspace(-100.0, 100.0, 4001, dtype=torch.float64))
    assert float(values.diff().min()) >= 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rho", [-1e4, -89.0, -4.0, 4.0, 89.0, 1e4])
@pytest.mark.parametrize("name", list(SPECS))
def test_value_is_finite_and_slope_bounded(name: str, rho: float, dtype: torch.dtype) -> None:
    leaf = torch.tensor(rho, dtype=dtype, requires_grad=True)
    value = link(SPECS[name])(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    assert bool(torch.isfinite(value))
    assert 0.0 <= float(slope) <= math.exp(4.0) * 1.01


@pytest.mark.parametrize("rho", [-1e4, -89.0, -20.0])
@pytest.mark.parametrize("name", list(SPECS))
def test_a_falling_likelihood_always_has_a_gradient(name: str, rho: float) -> None:
    leaf = torch.tensor(rho, requires_grad=True)
    (slope,) = torch.autograd.grad(link(SPECS[name])(leaf), leaf)
    assert float(slope) >= 0.99 * math.exp(-4.0)


@pytest.mark.parametrize("order", [0.998, 1.002])
def test_power_link_of_order_one_is_the_identity(order: float) -> None:
    rho = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(link(RenyiSpec(order=order))(rho), rho, rtol=5e-3, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in SPECS if n != "kl"])
def test_slope_is_continuous_at_the_knees(name: str) -> None:
    rho = torch.linspace(-60, 60, 240_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(link(SPECS[name])(rho).sum(), rho)
    assert float(slope.diff().abs().max()) <= 0.06


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (WassersteinSpec(), "wasserstein"),
        (FDivergenceSpec(f=FTotalVariation()), "total_variation"),
        (FDivergenceSpec(f=FPearsonChi2()), "pearson_chi2"),
        (FDivergenceSpec(f=FNeymanChi2()), "neyman_chi2"),
        (FDivergenceSpec(f=FJeffreys()), "jeffreys"),
    ],
)
def test_divergences_without_a_link_say_so(spec: DivergenceSpec, name: str) -> None:
    assert not has_link(spec)
    with pytest.raises(ValueError, match=f"{name} has no link form"):
        link(spec)


def test_every_linkable_spec_has_a_link() -> None:
    assert all(has_link(spec) for spec in SPECS.values())
