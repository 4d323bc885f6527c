import dataclasses
import time
from collections.abc import Callable

import pytest
import torch

from core.errors import InvalidInput
from core.profile import DatasetProfile, Estimate
from core.spec import KernelName
from selection.parts import KERNEL_COST
from selection.profile import profile_dataset, sampled_rows
from selection.recommender import recommend
from tests.unit.selection.samples import features, shuffled

# The preference lies along an axis with hardly any variance beside eleven large noisy ones:
# whitening finds it, distances and cosines do not.
QUIET_AXIS = torch.tensor([0.03, *[1.0] * 11])

Utility = Callable[[torch.Tensor], torch.Tensor]


def estimates(profile: DatasetProfile) -> dict[str, Estimate]:
    found = {}
    for number, entry in enumerate((*profile.kernels, *profile.mixtures)):
        found |= {
            f"{number}.{entry.kernel}.{name}": getattr(entry, name)
            for name in ("pnd", "pnav", "tat", "nag", "kpa")
        }
    for name in type(profile.reference).model_fields:
        found[name] = getattr(profile.reference, name)
    return found


@pytest.fixture(scope="module")
def carried_by_mahalanobis() -> DatasetProfile:
    return profile_dataset(features(500, signal=3.5, scales=QUIET_AXIS), seed=0)


def test_the_kernel_whose_geometry_carries_the_preference_is_first(carried_by_mahalanobis):
    kpa = {entry.kernel: entry.kpa for entry in carried_by_mahalanobis.kernels}
    assert kpa["mahalanobis"].low > 0.8
    assert kpa["mahalanobis"].low > max(kpa["rbf"].high, kpa["polynomial"].high)
    found = recommend(carried_by_mahalanobis)
    assert found.kernel == KernelName.MAHALANOBIS
    assert found.kernels_separated
    assert "Kernels differ: mahalanobis" in found.summary
    choice = found.kernel_choice
    assert choice.name == KernelName.MAHALANOBIS
    assert choice.lead.margin.value > KERNEL_COST[KernelName.HMK]
    assert choice.lead.confidence > 0.75


def judged_by(utility: Utility, first: torch.Tensor, second: torch.Tensor) -> DatasetProfile:
    """Profile of pairs of responses of which the one of greater utility is chosen."""
    wins = (utility(first) > utility(second)).unsqueeze(-1)
    pairs, dim = first.shape
    data = dataclasses.replace(
        features(pairs, dim=dim, pairs_per_prompt=1),
        chosen_embedding=torch.where(wins, first, second),
        rejected_embedding=torch.where(wins, second, first),
    )
    return profile_dataset(data, seed=0)


def test_a_preference_for_a_direction_is_carried_by_the_kernel_of_angles():
    """Lengths vary wildly and say nothing; the utility is a product of two cosines."""
    generator = torch.Generator().manual_seed(0)

    def responses() -> torch.Tensor:
        direction = torch.nn.functional.normalize(torch.randn(500, 6, generator=generator), dim=-1)
        return direction * torch.exp(1.5 * torch.randn(500, 1, generator=generator))

    def utility(y: torch.Tensor) -> torch.Tensor:
        direction = torch.nn.functional.normalize(y, dim=-1)
        return direction[:, 0] * direction[:, 1]

    found = recommend(judged_by(utility, responses(), responses()))
    assert found.kernel == KernelName.POLYNOMIAL
    assert found.kernels_separated


def test_a_preference_for_length_is_carried_by_distances_and_not_by_angles():
    """Four loud axes of which the length counts beside 58 quiet ones: whitening drowns it.

    The spectral kernel is made of the rbf one's leading eigenfunctions, so these two tie.
    """
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0] * 4 + [0.03] * 58)
    first, second = (torch.randn(500, 62, generator=generator) * scales for _ in range(2))
    found = judged_by(lambda y: y[:, :4].norm(dim=-1), first, second)
    kpa = {entry.kernel: entry.kpa for entry in found.kernels}
    for near in ("rbf", "spectral"):
        assert kpa[near].low > 0.85
        assert kpa[near].low > max(kpa["polynomial"].high, kpa["mahalanobis"].high) + 0.1
    recommended = recommend(found)
    assert recommended.kernel in (KernelName.RBF, KernelName.SPECTRAL)
    assert not recommended.kernels_separated


def test_mixtures_follow_the_half_that_carries_the_preference(carried_by_mahalanobis):
    """Mahalanobis is a global kernel: the more weight on that half, the more is predicted."""
    even = carried_by_mahalanobis.kernels[-1].kpa.value
    local, distant = carried_by_mahalanobis.mixtures
    assert (local.weights.tau_local, distant.weights.tau_local) == (0.9, 0.1)
    assert local.kpa.value < even < distant.kpa.value


@pytest.fixture(scope="module")
def shuffled_profiles() -> list[DatasetProfile]:
    return [
        profile_dataset(
            shuffled(features(160, signal=3.0, scales=QUIET_AXIS, seed=seed), seed=seed), seed=seed
        )
        for seed in range(20)
    ]


def test_kpa_intervals_of_shuffled_labels_hold_a_half_as_often_as_they_say(shuffled_profiles):
    for index, name in enumerate(KernelName):
        intervals = [profile.kernels[index].kpa for profile in shuffled_profiles]
        held = sum(found.low <= 0.5 <= found.high for found in intervals)
        # Binomial(20, 0.95) is 16 or more in 99.97 % of cases.
        assert held >= 16, name
    values = [entry.kpa.value for profile in shuffled_profiles for entry in profile.kernels]
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.03)


def test_shuffled_labels_carry_no_confidence(shuffled_profiles):
    for profile in shuffled_profiles:
        found = recommend(profile)
        assert not found.separated
        assert not found.kernels_separated
        assert found.confidence < 0.65
        assert not found.kernel_choice.lead.separated
        assert not found.divergence_choice.lead.separated
        assert found.kernel_choice.lead.confidence < 0.65
        assert "do not separate" in found.summary


def test_every_metric_keeps_its_bounds_and_its_interval(carried_by_mahalanobis):
    unit = {"tat", "kpa", "support_overlap", "smoothness", "reference_accuracy"}
    for name, found in estimates(carried_by_mahalanobis).items():
        assert found.low <= found.value <= found.high, name
        metric = name.split(".")[-1]
        if metric in unit:
            assert found.low >= 0.0, name
            assert found.high <= 1.0, name
        if metric in ("pnd", "pnav", "drift_magnitude"):
            assert found.low >= 0.0, name
        if metric == "nag":
            assert -1.0 <= found.low <= found.high <= 1.0
        if metric not in ("kurtosis", "length_bias"):
            assert found.low < found.high, name


def test_profile_is_a_function_of_features_and_seed():
    data = features(80, signal=1.0)
    first = profile_dataset(data, seed=3, bootstrap=50)
    assert profile_dataset(data, seed=3, bootstrap=50) == first
    other = profile_dataset(data, seed=4, bootstrap=50)
    assert other != first
    assert other.reference.reference_accuracy.value == first.reference.reference_accuracy.value


def test_global_random_state_is_neither_read_nor_moved():
    data = features(60)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = profile_dataset(data, seed=0, bootstrap=20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert profile_dataset(data, seed=0, bootstrap=20) == first


def test_swapping_labels_mirrors_signed_metrics():
    data = features(150, signal=2.0)
    mirrored = dataclasses.replace(
        data,
        chosen_embedding=data.rejected_embedding,
        rejected_embedding=data.chosen_embedding,
        chosen_tokens=data.rejected_tokens,
        rejected_tokens=data.chosen_tokens,
        chosen_log_prob=data.rejected_log_prob,
        rejected_log_prob=data.chosen_log_prob,
    )
    one, two = (profile_dataset(d, seed=0, bootstrap=20) for d in (data, mirrored))
    by_name = estimates(two)
    for name, found in estimates(one).items():
        metric = name.split(".")[-1]
        if metric in ("nag", "length_bias"):
            assert by_name[name].value == pytest.approx(-found.value, abs=2e-3), name
        if metric == "reference_accuracy":
            assert by_name[name].value == pytest.approx(1.0 - found.value), name


def test_only_the_sample_is_measured_and_reported():
    data = features(210, pairs_per_prompt=3)
    found = profile_dataset(data, seed=0, bootstrap=5, max_pairs=200)
    assert (found.pairs, found.prompts, found.sampled_pairs) == (210, 70, 198)
    assert (found.sampled_prompts, found.max_pairs, found.resamples) == (66, 200, 5)
    assert found.sampled_tokens == 2000


def test_measuring_a_sample_is_measuring_the_data_that_it_is_drawn_from():
    """A job may run the reference over the sample alone: every number is the same."""
    data = features(210, pairs_per_prompt=3)
    rows = sampled_rows([str(n) for n in data.group.tolist()], limit=100, seed=4)
    whole = profile_dataset(data, seed=4, bootstrap=20, max_pairs=100)
    part = profile_dataset(
        data.take(rows), seed=4, bootstrap=20, max_pairs=100, drawn_from=(210, 70)
    )
    assert part == whole


def test_two_prompts_are_enough():
    found = profile_dataset(features(2, pairs_per_prompt=1), seed=0, bootstrap=20)
    assert found.prompts == 2


def test_six_hundred_pairs_take_less_than_three_seconds_of_a_core():
    data = features(600, dim=64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before = time.process_time()
        profile_dataset(data, seed=0)
        assert time.process_time() - before < 3.0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": torch.zeros(10, dtype=torch.int64)}, "at least 2 prompts"),
        ({"entropy": torch.zeros(9)}, r"entropy has shape \(9,\), expected \(10,\)"),
        ({"chosen_embedding": torch.zeros(10, 3)}, r"expected \(10, 12\)"),
        ({"chosen_log_prob": torch.full((10,), float("nan"))}, "chosen_log_prob holds NaN"),
        ({"token_log_probs": torch.zeros(0)}, "token_log_probs is empty"),
    ],
)
def test_features_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str):
    with pytest.raises(InvalidInput, match=message):
        dataclasses.replace(features(10), **change)
