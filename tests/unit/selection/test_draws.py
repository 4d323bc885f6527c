"""Settings: what they do to a candidate, and where the next one is drawn from."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.run_spec import CandidateSpec
from core.spec import DivergenceName, KernelName, MixtureKernelSpec, PenaltyTerm
from selection.draws import (
    _RANGES,
    RECOMMENDED,
    Density,
    Setting,
    active_dimensions,
    candidate_at,
    draw,
    incumbent_share,
    setting_at,
    uniform_share,
)
from selection.space import SearchSpace
from tests.unit.selection.searches import PLAIN, RATE, arm

RBF = arm(KernelName.RBF, DivergenceName.KL).candidate
HMK = arm(KernelName.HMK, DivergenceName.KL).candidate
SPACE = SearchSpace(RATE)


def test_the_recommended_setting_changes_nothing() -> None:
    for candidate in (PLAIN.candidate, RBF, HMK):
        assert candidate_at(candidate, RECOMMENDED) == candidate


def test_factors_multiply_what_is_there() -> None:
    setting = Setting(learning_rate=2.0, beta=0.5, gamma=3.0, alpha=0.25)
    found = candidate_at(RBF, setting)
    assert found.learning_rate == 2 * RATE
    assert found.objective.beta == pytest.approx(0.05)
    term, penalty = found.objective.kernel_term, found.objective.divergence_term
    assert term is not None
    assert term.gamma == pytest.approx(0.3)
    assert isinstance(penalty, PenaltyTerm)
    assert penalty.alpha == pytest.approx(0.15)
    plain = candidate_at(PLAIN.candidate, setting)
    assert plain.objective.is_plain_dpo
    assert plain.objective.beta == pytest.approx(0.05)


def test_a_mixture_gets_its_weights() -> None:
    found = candidate_at(HMK, Setting(mixture=(0.2, 0.3, 0.9)))
    term = found.objective.kernel_term
    assert term is not None
    assert isinstance(term.kernel, MixtureKernelSpec)
    weights = term.kernel.weights
    assert (weights.tau_local, weights.rbf, weights.spectral) == (0.2, 0.3, 0.9)


def test_ranges_are_those_of_the_search_space() -> None:
    for name, (low, high) in _RANGES.items():
        distribution = SPACE.distributions[name]
        assert (distribution.low, distribution.high) == (low, high)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(
    point=st.lists(st.floats(-9.0, 9.0), min_size=7, max_size=7),
    centre=st.sampled_from([PLAIN.candidate, RBF, HMK]),
)
def test_any_setting_of_any_candidate_is_in_the_search_space(
    point: list[float], centre: CandidateSpec
) -> None:
    candidate = candidate_at(centre, setting_at(point, mixture=centre is HMK))
    assert SPACE.candidate_of(SPACE.params_of(candidate)) == candidate


def test_points_and_settings_are_two_names_of_one_thing() -> None:
    setting = Setting(learning_rate=2.0, beta=0.5, gamma=1.5, alpha=0.3, mixture=(0.1, 0.5, 0.8))
    again = setting_at(setting.point, mixture=True)
    assert again.point == pytest.approx(setting.point)
    assert RECOMMENDED.point == (0.0,) * 7


def test_dimensions() -> None:
    assert active_dimensions(PLAIN.candidate) == (0, 1)
    assert active_dimensions(RBF) == (0, 1, 2, 3)
    assert active_dimensions(HMK) == (0, 1, 2, 3, 4, 5, 6)


def test_shares_of_the_mix() -> None:
    assert [uniform_share(rung) for rung in (0, 1, 2)] == [0.5, 0.25, 0.1]
    assert incumbent_share([]) == 0.0
    assert incumbent_share([RECOMMENDED]) == 0.5
    away = Setting(learning_rate=3.0, beta=3.0)
    assert incumbent_share([away, away]) > 0.9
    assert incumbent_share([away, RECOMMENDED]) < incumbent_share([away, away])


def test_draws_follow_the_mix_and_the_seed() -> None:
    best = [Setting(learning_rate=3.0, beta=0.4)]
    found = [
        draw(seed=f"a:{i}", dimensions=(0, 1), rung=1, best=best, tried=[RECOMMENDED])
        for i in range(400)
    ]
    again = draw(seed="a:7", dimensions=(0, 1), rung=1, best=best, tried=[RECOMMENDED])
    assert again == found[7]
    drawn = [entry for entry in found if entry is not None]
    shares = Counter(density for _, density in drawn)
    assert shares[Density.UNIFORM] / 400 == pytest.approx(0.25, abs=0.07)
    expected = 0.75 * incumbent_share(best)
    assert shares[Density.INCUMBENT] / 400 == pytest.approx(expected, abs=0.08)
    near = [s.point[:2] for s, density in drawn if density is Density.INCUMBENT]
    assert np.mean(near, axis=0) == pytest.approx([math.log(3.0), math.log(0.4)], abs=0.3)
    assert all(s.point[2:] == (0.0,) * 5 for s, _ in drawn), "axes that the arm lacks stay at 0"
    assert all(max(map(abs, s.point)) <= math.log(4.0) + 1e-12 for s, _ in drawn)


def test_a_pool_is_drawn_without_repetition_until_it_is_empty() -> None:
    pool = [Setting(beta=b) for b in (1.0, 0.5, 2.0, 3.0)]
    tried = [RECOMMENDED]
    for i in range(3):
        found = draw(seed=f"p:{i}", dimensions=(0, 1), rung=0, best=tried, tried=tried, pool=pool)
        assert found is not None
        assert found[0] in pool
        assert found[0] not in tried
        tried.append(found[0])
    end = draw(seed="p:9", dimensions=(0, 1), rung=0, best=[], tried=tried, pool=pool)
    assert end is None
