import math
from collections import Counter

import pytest
import torch
from scipy import stats
from torch import Tensor

from core.spec import KernelName, KernelSpec, MixtureKernelSpec, RbfKernelSpec
from objectives.build import build_kernel
from objectives.geometry import fit_geometry
from objectives.types import PairEmbeddings
from selection.metrics import bootstrap as bs
from selection.metrics import reference as ref
from selection.metrics.distances import (
    KernelDistances,
    RandomPairs,
    kernel_distance,
    kernel_distances,
    random_pairs,
)
from selection.metrics.kpa import (
    RIDGE,
    accuracy_of,
    definite,
    grouped_folds,
    held_out_scores,
    normalized,
    preference_gram,
)
from selection.metrics.nag import nag
from selection.metrics.pnav import pnav
from selection.metrics.pnd import pnd
from selection.metrics.tat import tat
from selection.profile import (
    KERNELS,
    MEMBERS,
    OTHER_MIXTURES,
    mixed_gram,
    prompt_order,
    sampled_rows,
)
from tests.unit.selection.samples import features

ONES = torch.ones(1, 4)


class LinearKernel:
    """K(a, b) = (a · b), for arithmetic by hand: then d_K is the Euclidean distance."""

    def log_k(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1).log()

    def log_gram(self, a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T).log()


def distances_of(chosen: list[float], rejected: list[float]) -> KernelDistances:
    n = len(chosen)
    return KernelDistances(
        pair=torch.full((n,), 0.5),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        random=torch.full((2 * n,), 2.0),
        drawn=RandomPairs(first=torch.arange(2 * n), second=torch.arange(2 * n).roll(1)),
    )


# ---------------------------------------------------------------- distances


def test_distance_of_the_linear_kernel_is_euclidean():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 2.0]]), torch.tensor([[0.0, 8.0], [1.0, 2.0]])
    torch.testing.assert_close(kernel_distance(LinearKernel(), a, b), torch.tensor([5.0, 0.0]))


def test_distance_is_clamped_where_rounding_makes_its_square_negative():
    class Rounded(LinearKernel):
        def log_k(self, a: Tensor, b: Tensor) -> Tensor:
            same = (a == b).all(-1)
            return torch.where(same, torch.tensor(0.0), torch.tensor(1e-3))

    a = torch.tensor([[1.0]])
    assert kernel_distance(Rounded(), a, a + 1).item() == 0.0


@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.type)
def test_distances_agree_with_the_gram_matrix(spec: KernelSpec):
    data = features(20, seed=3)
    raw = PairEmbeddings(data.prompt_embedding, data.chosen_embedding, data.rejected_embedding)
    geometry = fit_geometry(raw, seed=0)
    kernel = build_kernel(spec, geometry)
    x, c, r = (geometry.prepare(part) for part in (raw.prompt, raw.chosen, raw.rejected))
    drawn = random_pairs(data.group, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = kernel_distances(kernel, x, c, r, drawn=drawn)
        everything = torch.cat([x, c, r])
        gram = kernel.log_gram(everything, everything).exp()
    diagonal = gram.diagonal()
    square = (diagonal[:, None] + diagonal[None, :] - 2 * gram).clamp_min(0)
    n = data.pairs
    rows = torch.arange(n)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found.chosen, square[rows, rows + n].sqrt(), **close)
    torch.testing.assert_close(found.rejected, square[rows, rows + 2 * n].sqrt(), **close)
    torch.testing.assert_close(found.pair, square[rows + n, rows + 2 * n].sqrt(), **close)
    random = square[drawn.first + n, drawn.second + n].sqrt()
    torch.testing.assert_close(found.random, random, **close)


def test_random_pairs_never_join_responses_to_one_prompt():
    group = torch.tensor([7] * 30 + [3, 9, 9])
    drawn = random_pairs(group, generator=torch.Generator().manual_seed(0))
    owner = torch.cat([group, group])
    assert drawn.first.tolist() == list(range(66))
    assert (owner[drawn.first] != owner[drawn.second]).all()


def test_random_partners_are_uniform_over_the_other_prompts():
    group = torch.arange(3).repeat_interleave(2000)
    drawn = random_pairs(group, generator=torch.Generator().manual_seed(0))
    partners = torch.cat([group, group])[drawn.second][drawn.first % 6000 < 2000]
    counts = torch.bincount(partners, minlength=3)
    assert counts[0] == 0
    assert stats.binomtest(int(counts[1]), int(counts.sum()), 0.5).pvalue > 1e-3


# -------------------------------------------------- PND, PNAV, TAT, NAG by hand


def test_pnd_is_the_ratio_of_means():
    assert pnd(distances_of([1] * 4, [1] * 4), ONES).item() == pytest.approx(0.25)


def test_pnav_is_the_variance_of_delta_over_the_squared_mean():
    found = pnav(distances_of([1, 1, 2, 2], [1, 3, 2, 4]), ONES)
    assert found.item() == pytest.approx(1.0 / 2.0**2)  # delta 0 2 0 2, mean distance 2


def test_tat_counts_gaps_above_a_tenth_of_the_median():
    # distances 1 1 1 1 and 1.05 1.2 0.5 2: median 1, threshold 0.1, two gaps pass
    assert tat(distances_of([1, 1, 1, 1], [1.05, 1.2, 0.5, 2.0]), ONES).item() == 0.5


def test_nag_is_the_mean_relative_gap():
    found = nag(distances_of([1, 1, 3, 0], [3, 1, 1, 0]), ONES)
    assert found.item() == pytest.approx((0.5 + 0.0 - 0.5 + 0.0) / 4)


@pytest.mark.parametrize(("chosen", "rejected", "value"), [(0.0, 1.0, 1.0), (1.0, 0.0, -1.0)])
def test_nag_reaches_its_bounds(chosen: float, rejected: float, value: float):
    assert nag(distances_of([chosen] * 4, [rejected] * 4), ONES).item() == value


def test_a_flat_geometry_gives_zeros_and_not_nan():
    flat = distances_of([0.0] * 4, [0.0] * 4)
    zero = torch.zeros(8)
    flat = KernelDistances(zero[:4], flat.chosen, flat.rejected, zero, flat.drawn)
    for metric in (pnd, pnav, tat, nag):
        assert metric(flat, ONES).item() == 0.0


def test_weights_mean_repeated_pairs():
    """A pair of weight 2 counts as if it stood in the data twice."""
    chosen, rejected = [1.0, 2.0, 3.0], [2.0, 2.5, 1.0]
    weighted = distances_of(chosen, rejected)
    repeated = distances_of([1.0, 1.0, *chosen[2:]], [2.0, 2.0, *rejected[2:]])
    weights = torch.tensor([[2.0, 0.0, 1.0]])
    for metric in (pnav, tat, nag):
        assert metric(weighted, weights).item() == pytest.approx(
            metric(repeated, torch.ones(1, 3)).item()
        )


# ---------------------------------------------------------------------- KPA


def prepared(pairs: int, *, signal: float, seed: int = 0):
    data = features(pairs, signal=signal, seed=seed)
    raw = PairEmbeddings(data.prompt_embedding, data.chosen_embedding, data.rejected_embedding)
    geometry = fit_geometry(raw, seed=0)
    kernel = build_kernel(RbfKernelSpec(), geometry)
    return kernel, geometry.prepare(raw.chosen), geometry.prepare(raw.rejected), data.group


def test_preference_kernel_is_antisymmetric_under_a_swap_and_psd():
    kernel, chosen, rejected, _ = prepared(30, signal=0.5)
    k = normalized(preference_gram(kernel, chosen, rejected))
    swapped = normalized(preference_gram(kernel, torch.cat([rejected[:1], chosen[1:]]),
                                         torch.cat([chosen[:1], rejected[1:]])))  # fmt: skip
    torch.testing.assert_close(swapped[0, 1:], -k[0, 1:], rtol=1e-4, atol=1e-6)
    assert k.diagonal().mean().item() == pytest.approx(1.0)
    assert torch.linalg.eigvalsh(k).min() > -1e-5


def test_held_out_scores_equal_a_fit_for_every_fold():
    kernel, chosen, rejected, group = prepared(50, signal=0.7)
    k = normalized(preference_gram(kernel, chosen, rejected))
    fold = grouped_folds(group, folds=5, generator=torch.Generator().manual_seed(1))
    expected = torch.empty_like(k[0])
    for number in range(5):
        train, test = fold != number, fold == number
        inner = k[train][:, train]
        dual = torch.linalg.solve(inner + torch.eye(len(inner)), torch.ones(len(inner)).double())
        expected[test] = k[test][:, train] @ dual
    torch.testing.assert_close(held_out_scores(k, fold, ridge=1.0), expected)


def test_folds_keep_prompts_whole_and_even():
    group = torch.arange(40) // 2
    fold = grouped_folds(group, folds=5, generator=torch.Generator().manual_seed(0))
    assert all(fold[group == prompt].unique().numel() == 1 for prompt in range(20))
    assert torch.bincount(fold).tolist() == [8] * 5


def kpa(gram: torch.Tensor, fold: torch.Tensor) -> float:
    scores = held_out_scores(normalized(gram), fold, ridge=RIDGE)
    return accuracy_of(scores, torch.ones(1, gram.shape[0])).item()


def test_negative_eigenvalues_are_cut_off_where_they_outweigh_the_ridge():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    spectrum = torch.linspace(0.5, 3.0, 40)
    sound = basis * spectrum @ basis.T
    assert definite(sound) is sound
    broken = spectrum.clone()
    broken[:2] = torch.tensor([-2.5, -0.2])
    indefinite = basis * broken @ basis.T
    with pytest.raises(torch.linalg.LinAlgError):
        kpa(indefinite, torch.arange(40) % 5)
    cut = basis * broken.clamp_min(0.0) @ basis.T
    torch.testing.assert_close(definite(indefinite), cut, atol=1e-5, rtol=1e-5)
    assert 0.0 <= kpa(cut, torch.arange(40) % 5) <= 1.0
    assert definite(torch.zeros(4, 4)).tolist() == torch.zeros(4, 4).tolist()


def test_kpa_of_a_clean_direction_is_near_one_and_of_identical_responses_a_half():
    kernel, chosen, rejected, group = prepared(100, signal=12.0)
    fold = grouped_folds(group, folds=5, generator=torch.Generator().manual_seed(0))
    apart, same = (preference_gram(kernel, chosen, other) for other in (rejected, chosen))
    assert kpa(apart, fold) > 0.97
    assert kpa(same, fold) == 0.5


@pytest.mark.parametrize("spec", [KERNELS[-1], *OTHER_MIXTURES], ids=["even", "local", "global"])
def test_the_preference_kernel_of_a_mixture_is_the_mixture_of_its_parts(spec: MixtureKernelSpec):
    data = features(30, seed=1)
    raw = PairEmbeddings(data.prompt_embedding, data.chosen_embedding, data.rejected_embedding)
    geometry = fit_geometry(raw, seed=0)
    chosen, rejected = geometry.prepare(raw.chosen), geometry.prepare(raw.rejected)
    grams = {
        KernelName(part.type): preference_gram(build_kernel(part, geometry), chosen, rejected)
        for part in MEMBERS
    }
    with torch.no_grad():
        whole = preference_gram(build_kernel(spec, geometry), chosen, rejected)
    torch.testing.assert_close(mixed_gram(spec.weights, grams), whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- reference


def test_overlap_of_the_same_and_of_distant_samples():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1, 200)
    assert ref.support_overlap(x, x, weights).item() == pytest.approx(1.0, abs=1e-9)
    assert ref.support_overlap(x, x + 50.0, weights).item() == pytest.approx(0.0, abs=1e-6)


def test_overlap_of_two_normals_agrees_with_its_closed_form():
    """∫ min(N(0,1), N(m,1)) = 2 Phi(-m/2); the density estimate widens both a little."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2000, generator=generator) for _ in range(2))
    found = ref.support_overlap(a, b + 2.0, torch.ones(1, 2000)).item()
    assert found == pytest.approx(2 * stats.norm.cdf(-1.0), abs=0.03)


def test_overlap_of_constant_log_probs():
    same = torch.full((5,), -1.0)
    assert ref.support_overlap(same, same, torch.ones(1, 5)).item() == pytest.approx(1.0)
    assert ref.support_overlap(same, same - 3.0, torch.ones(1, 5)).item() < 1e-6


def test_standardized_difference_is_cohens_d():
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 1.0, 1.0])
    pooled = math.sqrt((a.var(correction=0) + b.var(correction=0)) / 2)
    found = ref.standardized_difference(a, b, ONES).item()
    assert found == pytest.approx((2.5 - 1.0) / pooled)
    assert ref.standardized_difference(torch.ones(4), torch.ones(4), ONES).item() == 0.0


def test_reference_accuracy_counts_ties_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 1.0, 1.0])
    assert ref.reference_accuracy(chosen, rejected, ONES).item() == (1 + 0.5 + 1 + 0) / 4


@pytest.mark.parametrize(
    ("distribution", "tolerance"),
    [(stats.norm(-3, 2), 0.05), (stats.laplace(-2, 1), 0.1), (stats.uniform(-5, 4), 0.05)],
    ids=["normal", "laplace", "uniform"],
)
def test_robust_kurtosis_is_that_of_scipys_quantiles(distribution, tolerance: float):
    grid = (torch.arange(4000) + 0.5) / 4000
    q = distribution.ppf([0.025, 0.25, 0.75, 0.975])
    expected = (q[3] - q[0]) / (q[2] - q[1]) - 2 * 1.959964 / (2 * 0.6744898)
    found = ref.robust_kurtosis(torch.tensor(distribution.ppf(grid.numpy())), torch.ones(1, 4000))
    assert found.item() == pytest.approx(expected, abs=tolerance)


def test_robust_kurtosis_of_constant_tokens_is_zero():
    assert ref.robust_kurtosis(torch.zeros(9), torch.ones(4, 9)).tolist() == [0.0] * 4


def test_interval_of_kurtosis_is_over_prompts_and_not_over_tokens():
    """Tokens of a prompt come along together: with copies of one, the interval stays as wide."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randn(80, generator=generator)

    def width(copies: int) -> float:
        group = torch.arange(80).repeat_interleave(copies)
        weights = bs.group_weights(group, resamples=400, generator=generator)
        found = bs.estimate(ref.robust_kurtosis(once.repeat_interleave(copies), weights))
        return found.high - found.low

    assert width(20) == pytest.approx(width(1), rel=0.25)


# ---------------------------------------------------------------- bootstrap


def test_weights_draw_prompts_and_the_first_row_is_the_data():
    group = torch.tensor([4, 4, 1, 9, 9, 9])
    weights = bs.group_weights(group, resamples=50, generator=torch.Generator().manual_seed(0))
    assert weights.shape == (51, 6)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [3]] == weights[:, 3:]).all()
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3] == 3).all()


def test_interval_of_a_mean_agrees_with_the_cluster_standard_error():
    generator = torch.Generator().manual_seed(0)
    prompt_effect = torch.randn(300, generator=generator)
    x = prompt_effect.repeat_interleave(3)
    weights = bs.group_weights(
        torch.arange(300).repeat_interleave(3), resamples=2000, generator=generator
    )
    found = bs.estimate(bs.weighted_mean(weights, x))
    half = 1.96 * prompt_effect.std().item() / math.sqrt(300)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [0, 3, 1, 0, 1], [5, 0, 0, 0, 0]])
def test_weighted_statistics_equal_those_of_repeated_values(counts: list[int]):
    x = torch.tensor([3.0, -1.0, 4.0, 1.5, 9.0], dtype=torch.float64)
    weights = torch.tensor([counts], dtype=torch.float32)
    repeated = x.repeat_interleave(torch.tensor(counts))
    assert bs.weighted_mean(weights, x).item() == pytest.approx(repeated.mean().item())
    variance = repeated.var(correction=0).item()
    assert bs.weighted_variance(weights, x).item() == pytest.approx(variance, abs=1e-9)
    assert bs.weighted_median(weights, x).item() == repeated.median().item()


def test_estimate_holds_its_value_even_where_resamples_are_biased():
    found = bs.estimate(torch.tensor([1.0, 0.1, 0.2, 0.3]))
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(0.105, abs=1e-3)


# ----------------------------------------------------------------- sampling


def test_sample_takes_whole_prompts_and_everything_that_fits():
    group = [f"prompt {row // 3}" for row in range(60)]
    assert sampled_rows(group, limit=60, seed=0).tolist() == list(range(60))
    rows = sampled_rows(group, limit=20, seed=0).tolist()
    assert len(rows) == 18
    assert set(Counter(group[row] for row in rows).values()) == {3}
    assert rows == sorted(rows)


def test_two_prompts_are_kept_however_large():
    group = ["a"] * 50 + ["b"] * 50
    rows = sampled_rows(group, limit=10, seed=0)
    assert rows.numel() == 100


def test_a_smaller_sample_is_a_part_of_a_larger_one_and_another_seed_draws_another():
    group = [f"prompt {row // 3}" for row in range(300)]
    small, large = (sampled_rows(group, limit=limit, seed=5) for limit in (30, 120))
    assert set(small.tolist()) < set(large.tolist())
    assert sampled_rows(group, limit=30, seed=5).tolist() == small.tolist()
    assert sampled_rows(group, limit=30, seed=6).tolist() != small.tolist()


def test_prompts_keep_their_order_whatever_others_there_are():
    """So a sample can be drawn before it is known which prompts are of use."""
    every = prompt_order([f"prompt {n}" for n in range(40)], seed=3)
    some = [prompt for prompt in every if prompt.endswith(("1", "5", "8"))]
    assert prompt_order(sorted(some), seed=3) == some
    assert prompt_order(every[:5] * 2, seed=3) == every[:5]
    assert prompt_order(every, seed=4) != every
    group = [f"prompt {n // 2}" for n in range(80)]
    first = {f"prompt {n}" for n in range(40)} & set(every[:10])
    assert {group[row] for row in sampled_rows(group, limit=21, seed=3).tolist()} == first
