"""One contract for all divergences, then each against independent references and theorems."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance
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
)
from objectives import Divergence, build_divergence
from objectives.divergences.wasserstein import SlicedWasserstein
from tests.unit.objectives.samples import distributions, generator, head_rows, seeds
from tests.unit.objectives.tolerances import LIMIT, SMALL_DRIFT, close

HEAD = head_rows()


def _sum(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, q: f(p, q).sum(-1)


def _sliced_by_scipy(p: Tensor, q: Tensor) -> Tensor:
    """W₁ of scipy on the same directions, drawn and scaled independently of the module."""
    drawn = torch.randn(HEAD.shape[1], 8, generator=generator(0), dtype=torch.float64).numpy()
    positions = HEAD.numpy() @ (drawn / np.linalg.norm(drawn, axis=0))
    positions = positions / positions.std(0)
    rows = [
        np.mean([wasserstein_distance(x, x, a, b) for x in positions.T])
        for a, b in zip(p.numpy(), q.numpy(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A spec, its textbook definition on probabilities (scaled), and its claims."""

    spec: DivergenceSpec
    definition: Callable[[Tensor, Tensor], Tensor]
    symmetric: bool = False
    bound: float = math.inf
    curved: bool = True
    contracts: bool = True


def _renyi(order: float) -> Case:
    return Case(
        RenyiSpec(order=order),
        lambda p, q: (p**order * q ** (1 - order)).sum(-1).log() / (order - 1) / order,
    )


def _alpha(order: float) -> Case:
    return Case(
        FDivergenceSpec(f=FAlpha(order=order)),
        _sum(lambda p, q: q * ((p / q) ** order - order * p / q + order - 1) / order / (order - 1)),
    )


CASES = {
    "kl": Case(KlSpec(), _sum(lambda p, q: torch.from_numpy(rel_entr(p.numpy(), q.numpy())))),
    "jensen_shannon": Case(
        JensenShannonSpec(),
        lambda p, q: 4 * torch.from_numpy(jensenshannon(p.numpy(), q.numpy(), axis=-1) ** 2),
        symmetric=True,
        bound=4 * math.log(2.0),
    ),
    "hellinger": Case(
        HellingerSpec(),
        lambda p, q: 4 * (1 - (p * q).sqrt().sum(-1)),
        symmetric=True,
        bound=4.0,
    ),
    "bhattacharyya": Case(
        BhattacharyyaSpec(), lambda p, q: -4 * (p * q).sqrt().sum(-1).log(), symmetric=True
    ),
    "renyi-0.5": _renyi(0.5),
    "renyi-1.002": _renyi(1.002),
    "renyi-3": _renyi(3.0),
    "wasserstein": Case(
        WassersteinSpec(), _sliced_by_scipy, symmetric=True, curved=False, contracts=False
    ),
    "total_variation": Case(
        FDivergenceSpec(f=FTotalVariation()),
        _sum(lambda p, q: 0.5 * (p - q).abs()),
        symmetric=True,
        bound=1.0,
        curved=False,
    ),
    "pearson_chi2": Case(
        FDivergenceSpec(f=FPearsonChi2()), _sum(lambda p, q: 0.5 * q * (p / q - 1) ** 2)
    ),
    "neyman_chi2": Case(
        FDivergenceSpec(f=FNeymanChi2()), _sum(lambda p, q: 0.5 * q * (p / q - 1) ** 2 / (p / q))
    ),
    "forward_kl": Case(
        FDivergenceSpec(f=FForwardKl()),
        _sum(lambda p, q: torch.from_numpy(rel_entr(q.numpy(), p.numpy()))),
    ),
    "jeffreys": Case(
        FDivergenceSpec(f=FJeffreys()),
        _sum(lambda p, q: 0.5 * q * (p / q - 1) * (p / q).log()),
        symmetric=True,
    ),
    "alpha-0.3": _alpha(0.3),
    "alpha-2.5": _alpha(2.5),
}


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
contracting = {name: case for name, case in CASES.items() if case.contracts}


def build(case: Case) -> Divergence:
    return build_divergence(case.spec, head=HEAD)


@every_case
class TestEveryDivergence:
    @given(seed=seeds, spread=st.floats(min_value=0.01, max_value=6.0))
    @settings(deadline=None, max_examples=12)
    def test_value_is_the_definition(self, case: Case, seed: int, spread: float) -> None:
        # Below log q = -11 the unbounded ones reach their knee, which is tested by itself.
        log_p, log_q = (
            log.clamp_min(-11.0).log_softmax(-1) for log in distributions(seed, spread=spread)
        )
        expected = case.definition(log_p.exp(), log_q.exp())
        actual = build(case)(log_p, log_q)
        # The definitions cancel near p = q: their own rounding sets the absolute tolerance.
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)

    @given(seed=seeds, spread=st.floats(min_value=0.0, max_value=20.0))
    @settings(deadline=None, max_examples=12)
    def test_nonnegative_bounded_and_symmetric(self, case: Case, seed: int, spread: float) -> None:
        log_p, log_q = distributions(seed, spread=spread)
        value = build(case)(log_p, log_q)
        assert value.shape == (3,)
        assert float(value.min()) >= -1e-14
        assert float(value.max()) <= case.bound + 1e-12
        if case.symmetric:
            close(build(case)(log_q, log_p), value, dtype=torch.float64)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_zero_with_zero_gradient_at_equality(self, case: Case, dtype: torch.dtype) -> None:
        logits = distributions(1)[0].to(dtype).requires_grad_()
        log_p = logits.log_softmax(-1)
        value = build(case)(log_p, log_p.detach())
        value.sum().backward()
        assert float(value.detach().abs().max()) <= torch.finfo(dtype).eps ** 2
        assert float(logits.grad.abs().max()) <= torch.finfo(dtype).eps

    def test_positive_away_from_equality(self, case: Case) -> None:
        log_p, log_q = distributions(2, spread=0.05)
        assert float(build(case)(log_p, log_q).min()) > 1e-7

    def test_curvature_at_equality_is_that_of_kl(self, case: Case) -> None:
        """D(p‖q) -> ½ Σ (p - q)²/q for p -> q; the kinked ones vanish linearly instead."""
        _, log_q = distributions(3)
        direction = torch.randn(3, 7, generator=generator(4), dtype=torch.float64)
        log_p = (log_q + 1e-3 * direction).log_softmax(-1)
        half_chi2 = 0.5 * ((log_p.exp() - log_q.exp()).square() / log_q.exp()).sum(-1)
        ratio = build(case)(log_p, log_q) / half_chi2
        if case.curved:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=LIMIT, atol=0)
        else:
            assert float(ratio.min()) > 100.0

    def test_gradient_matches_finite_differences(self, case: Case) -> None:
        divergence = build(case)
        _, log_q = distributions(5)
        logits = distributions(6)[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda x: divergence(x.log_softmax(-1), log_q), (logits,))

    def test_gradient_matches_finite_differences_far_apart(self, case: Case) -> None:
        divergence = build(case)
        _, log_q = distributions(5, spread=6.0)
        logits = distributions(6, spread=6.0)[0].requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: divergence(x.log_softmax(-1), log_q), (logits,), rtol=1e-3, atol=1e-4
        )

    def test_descent_moves_the_policy_towards_the_reference(self, case: Case) -> None:
        """Two tokens, p above q on the first: the first logit must fall."""
        divergence = build_divergence(case.spec, head=HEAD[:2])
        log_q = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
        for first in (0.31, 0.9, 1.0 - 1e-6):
            p = torch.tensor([[first, 1.0 - first]], dtype=torch.float64)
            logits = p.log().requires_grad_()
            (gradient,) = torch.autograd.grad(
                divergence(logits.log_softmax(-1), log_q).sum(), logits
            )
            assert float(gradient[0, 0]) > 0.0 > float(gradient[0, 1])

    def test_permuting_the_vocabulary_changes_nothing(self, case: Case) -> None:
        log_p, log_q = distributions(7)
        order = torch.randperm(7, generator=generator(0))
        permuted = build_divergence(case.spec, head=HEAD[order])
        close(
            permuted(log_p[:, order], log_q[:, order]),
            build(case)(log_p, log_q),
            dtype=torch.float64,
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("policy", "reference"),
        [
            ([0.0, 0.0, -math.inf, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, -math.inf, 0.0, 0.0, 0.0, 0.0]),
            ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, 0.0, 0.0, 0.0, 0.0, 0.0]),
            ([-math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
            ([1e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [-1e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
            ([-1e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ],
        ids=["both-impossible", "reference-impossible", "policy-impossible", "up", "down"],
    )
    def test_extreme_logits_have_finite_value_and_gradient(
        self, case: Case, dtype: torch.dtype, policy: list[float], reference: list[float]
    ) -> None:
        logits = torch.tensor([policy], dtype=dtype, requires_grad=True)
        log_q = torch.tensor([reference], dtype=dtype).log_softmax(-1)
        value = build(case)(logits.log_softmax(-1), log_q)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert bool(torch.isfinite(value).all())
        assert float(value.detach()) > 0.0
        assert bool(torch.isfinite(gradient).all())

    def test_small_drift_keeps_its_digits_in_float32(self, case: Case) -> None:
        """The regime of a LoRA run: D of 1e-5 over a large vocabulary."""
        rng = generator(0)
        logits = 3.0 * torch.randn(2, 20_000, generator=rng, dtype=torch.float64)
        moved = logits + 5e-3 * torch.randn(2, 20_000, generator=rng, dtype=torch.float64)
        head = torch.randn(20_000, 4, generator=rng)
        log_p, log_q = moved.log_softmax(-1).float(), logits.log_softmax(-1).float()
        divergence = build_divergence(case.spec, head=head)
        single, double = divergence(log_p, log_q), divergence(log_p.double(), log_q.double())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=SMALL_DRIFT, atol=0)

    def test_low_precision_input_is_computed_in_float32(self, case: Case) -> None:
        log_p, log_q = (log.bfloat16() for log in distributions(8))
        value = build(case)(log_p, log_q)
        assert value.dtype == torch.float32
        close(value, build(case)(log_p.float(), log_q.float()), dtype=torch.float32)


@pytest.mark.parametrize("case", contracting.values(), ids=contracting.keys())
@given(seed=seeds)
@settings(deadline=None, max_examples=8)
def test_merging_tokens_never_increases_it(case: Case, seed: int) -> None:
    """The data-processing inequality, which transport distances do not obey."""
    log_p, log_q = distributions(seed)
    merged = [
        torch.cat([log[:, :2].logsumexp(-1, keepdim=True), log[:, 2:]], -1)
        for log in (log_p, log_q)
    ]
    assert bool((build(case)(*merged) <= build(case)(log_p, log_q) + 1e-12).all())


@given(p=st.floats(min_value=1e-4, max_value=1 - 1e-4), q=st.floats(1e-4, 1 - 1e-4))
@settings(deadline=None, max_examples=30)
def test_two_token_closed_forms(p: float, q: float) -> None:
    log_p, log_q = (torch.tensor([[x, 1.0 - x]], dtype=torch.float64).log() for x in (p, q))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(torch.tensor(p, dtype=torch.float64)),
        torch.distributions.Bernoulli(torch.tensor(q, dtype=torch.float64)),
    )
    affinity = math.sqrt(p * q) + math.sqrt((1 - p) * (1 - q))
    expected = {
        "kl": float(kl),
        "total_variation": abs(p - q),
        "pearson_chi2": 0.5 * (p - q) ** 2 / (q * (1 - q)),
        "neyman_chi2": 0.5 * (p - q) ** 2 / (p * (1 - p)),
        "hellinger": 4 * (1 - affinity),
        "bhattacharyya": -4 * math.log(affinity),
    }
    for name, value in expected.items():
        actual = float(build_divergence(CASES[name].spec, head=None)(log_p, log_q))
        assert actual == pytest.approx(value, rel=1e-8, abs=1e-12), name


def test_kl_matches_torch_distributions() -> None:
    log_p, log_q = distributions(9)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=log_p),
        torch.distributions.Categorical(logits=log_q),
    )
    close(build(CASES["kl"])(log_p, log_q), expected, dtype=torch.float64)


@pytest.mark.parametrize("name", ["renyi", "alpha"])
@pytest.mark.parametrize("order", [0.998, 1.002])
def test_order_one_is_kl(name: str, order: float) -> None:
    log_p, log_q = distributions(10)
    spec = RenyiSpec(order=order) if name == "renyi" else FDivergenceSpec(f=FAlpha(order=order))
    torch.testing.assert_close(
        build_divergence(spec, head=None)(log_p, log_q),
        build(CASES["kl"])(log_p, log_q),
        rtol=LIMIT,
        atol=0,
    )


@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_renyi_grows_with_its_order(seed: int) -> None:
    """van Erven & Harremoës 2014, theorem 3, for the unscaled divergence."""
    log_p, log_q = distributions(seed)
    orders = [0.1, 0.5, 0.9, 1.1, 2.0, 4.0]
    values = [
        order * build_divergence(RenyiSpec(order=order), head=None)(log_p, log_q)
        for order in orders
    ]
    for lower, higher in pairwise(values):
        assert bool((lower <= higher + 1e-12).all())


@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_pinsker(seed: int) -> None:
    log_p, log_q = distributions(seed)
    variation = build(CASES["total_variation"])(log_p, log_q)
    assert bool((2 * variation**2 <= build(CASES["kl"])(log_p, log_q) + 1e-12).all())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (RenyiSpec(order=0.5), BhattacharyyaSpec()),
        (FDivergenceSpec(f=FAlpha(order=0.5)), HellingerSpec()),
        (FDivergenceSpec(f=FAlpha(order=2.0)), FDivergenceSpec(f=FPearsonChi2())),
    ],
)
def test_members_of_the_power_family_coincide(one: DivergenceSpec, other: DivergenceSpec) -> None:
    log_p, log_q = distributions(11, spread=3.0)
    first, second = (build_divergence(spec, head=None)(log_p, log_q) for spec in (one, other))
    close(first, second, dtype=torch.float64)


def test_bhattacharyya_is_a_function_of_hellinger() -> None:
    log_p, log_q = distributions(12, spread=3.0)
    hellinger = build(CASES["hellinger"])(log_p, log_q)
    expected = -4 * torch.log1p(-hellinger / 4)
    close(build(CASES["bhattacharyya"])(log_p, log_q), expected, dtype=torch.float64)


def test_unbounded_terms_go_on_linearly_in_log_space() -> None:
    """Pearson's chi² of p = 1 on a token with log q = -100 is not e^100 / 2."""
    log_p = torch.tensor([[0.0, -100.0]], dtype=torch.float64)
    value = build(CASES["pearson_chi2"])(log_p, log_p.flip(-1))
    close(value, [0.5 * math.exp(20.0) * (1 + 100 - 20)], dtype=torch.float32)


class TestSlicedWasserstein:
    @given(seed=seeds, spread=st.floats(min_value=0.1, max_value=6.0))
    @settings(deadline=None, max_examples=10)
    def test_is_optimal_transport_on_each_direction(self, seed: int, spread: float) -> None:
        """POT's exact solver in one dimension, every direction, its own cost matrix."""
        log_p, log_q = distributions(seed, spread=spread)
        drawn = torch.randn(HEAD.shape[1], 8, generator=generator(0), dtype=torch.float64)
        positions = HEAD @ (drawn / drawn.norm(dim=0))
        positions = (positions / positions.std(0, correction=0)).numpy()
        expected = [
            np.mean([ot.emd2(p, q, np.abs(np.subtract.outer(x, x))) for x in positions.T])
            for p, q in zip(log_p.exp().numpy(), log_q.exp().numpy(), strict=True)
        ]
        close(
            build(CASES["wasserstein"])(log_p, log_q), torch.tensor(expected), dtype=torch.float64
        )

    def test_point_masses_are_their_mean_projected_distance(self) -> None:
        positions = torch.arange(5, dtype=torch.float64)[:, None]
        distance = SlicedWasserstein(positions, directions=3, seed=0)
        log = torch.full((1, 5), -math.inf, dtype=torch.float64)
        log_p, log_q = log.clone(), log.clone()
        log_p[0, 1], log_q[0, 4] = 0.0, 0.0
        spread = float(positions.std(correction=0))
        close(distance(log_p, log_q), [3.0 / spread], dtype=torch.float64)

    def test_seed_fixes_the_directions(self) -> None:
        log_p, log_q = distributions(13)
        first, again, other = (
            SlicedWasserstein(HEAD, directions=2, seed=seed)(log_p, log_q) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_units_and_origin_of_the_head_do_not_matter(self) -> None:
        log_p, log_q = distributions(14)
        moved = SlicedWasserstein(100.0 * HEAD + 7.0, directions=4, seed=0)
        close(
            moved(log_p, log_q),
            SlicedWasserstein(HEAD, directions=4, seed=0)(log_p, log_q),
            dtype=torch.float64,
        )

    def test_equal_rows_are_no_distance_apart(self) -> None:
        log_p, log_q = distributions(15)
        distance = SlicedWasserstein(torch.ones(7, 4), directions=4, seed=0)
        assert distance(log_p, log_q).tolist() == [0.0, 0.0, 0.0]

    def test_nothing_enters_the_state(self) -> None:
        assert SlicedWasserstein(HEAD, directions=4, seed=0).state_dict() == {}

    def test_another_vocabulary_is_refused(self) -> None:
        distance = SlicedWasserstein(HEAD, directions=4, seed=0)
        with pytest.raises(ValueError, match="over 3 tokens do not fit a head of 7 rows"):
            distance(torch.zeros(1, 3), torch.zeros(1, 3))

    def test_a_head_that_is_no_matrix_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"head has shape \(7,\)"):
            SlicedWasserstein(torch.zeros(7), directions=1, seed=0)
