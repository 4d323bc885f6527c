"""Helpers against independent references and at their extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from objectives import per_pair_mean, segment_sum, token_log_probs
from objectives.numerics import (
    floored_log_probs,
    linear_tail_exp,
    log_softplus,
    squared_distances,
    upcast,
)
from tests.unit.objectives.samples import generator, points
from tests.unit.objectives.tolerances import close


@given(st.floats(min_value=-1e4, max_value=1e4))
@settings(deadline=None, max_examples=60)
def test_linear_tail_exp_is_exp_below_and_its_tangent_above(x: float) -> None:
    value = linear_tail_exp(torch.tensor(x, dtype=torch.float64), knee=4.0)
    expected = math.exp(x) if x <= 4.0 else math.exp(4.0) * (x - 3.0)
    close(value, expected, dtype=torch.float64)


@pytest.mark.parametrize("x", [-50.0, 3.9, 4.0, 4.1, 1e4])
def test_linear_tail_exp_has_the_slope_of_exp_up_to_the_knee(x: float) -> None:
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    linear_tail_exp(leaf, knee=4.0).backward()
    close(leaf.grad, math.exp(min(x, 4.0)), dtype=torch.float64)


@given(st.floats(min_value=-700.0, max_value=700.0))
@settings(deadline=None, max_examples=60)
def test_log_softplus_matches_high_precision(x: float) -> None:
    inner = math.log1p(math.exp(x)) if x < 30 else x + math.log1p(math.exp(-x))
    actual = log_softplus(torch.tensor(x, dtype=torch.float64))
    # The asymptote below -15 leaves out O(e^2x), at most 1e-13.
    close(actual, math.log(inner), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [-1e4, -15.0, 0.0, 1e4])
def test_log_softplus_gradient_is_finite_and_positive(x: float, dtype: torch.dtype) -> None:
    leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
    log_softplus(leaf).backward()
    assert 0.0 < float(leaf.grad) <= 1.0


def test_squared_distances_match_scipy() -> None:
    a, b = points(6, 4, 0), points(9, 4, 1)
    expected = torch.from_numpy(cdist(a.numpy(), b.numpy(), "sqeuclidean"))
    close(squared_distances(a, b), expected, dtype=torch.float64)


def test_squared_distances_of_equal_points_are_never_negative() -> None:
    a = 1e3 * points(50, 8, 2).float()
    assert float(squared_distances(a, a).min()) >= 0.0


def test_log_probs_of_impossible_tokens_become_finite() -> None:
    floored = floored_log_probs(torch.tensor([0.0, -math.inf]))
    assert floored.tolist() == [0.0, -1e4]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_upcast_never_lowers(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert upcast(torch.ones(1, dtype=dtype)).dtype == expected


def test_token_log_probs_are_log_softmax_at_the_label() -> None:
    logits = 5.0 * torch.randn(8, 11, generator=generator(0), dtype=torch.float64)
    labels = torch.arange(8)
    expected = torch.distributions.Categorical(logits=logits).log_prob(labels)
    close(token_log_probs(logits, labels), expected, dtype=torch.float64)


def test_token_log_probs_of_bfloat16_logits_are_float32() -> None:
    logits = torch.randn(4, 9, generator=generator(1)).bfloat16()
    labels = torch.tensor([0, 3, 8, 2])
    actual = token_log_probs(logits, labels)
    assert actual.dtype == torch.float32
    close(actual, logits.double().log_softmax(-1)[torch.arange(4), labels], dtype=torch.float32)


def test_per_pair_mean_and_sum_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 5.0])
    index = torch.tensor([0, 0, 0, 2])
    assert per_pair_mean(values, index, 4).tolist() == [3.0, 0.0, 5.0, 0.0]
    assert segment_sum(values, index, 4).tolist() == [9.0, 0.0, 5.0, 0.0]


def test_per_pair_mean_passes_an_equal_gradient_to_every_token() -> None:
    values = torch.ones(4, requires_grad=True)
    per_pair_mean(values, torch.tensor([0, 0, 1, 0]), 2).sum().backward()
    close(values.grad, torch.tensor([1 / 3, 1 / 3, 1.0, 1 / 3]), dtype=torch.float32)


def test_per_pair_mean_refuses_a_ragged_index() -> None:
    with pytest.raises(ValueError, match=r"values \(3,\) and index \(2,\)"):
        per_pair_mean(torch.ones(3), torch.tensor([0, 1]), 2)
