import math

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from core.errors import InvalidInput
from core.run_spec import CandidateSpec
from core.spec import (
    FAlpha,
    FDivergenceSpec,
    KernelTerm,
    LinkTerm,
    MixtureKernelSpec,
    ObjectiveSpec,
    PenaltyTerm,
    RbfKernelSpec,
    RenyiSpec,
    SpectralKernelSpec,
)
from selection.space import DIVERGENCE_TERMS, F_LINK, F_PENALTY, SearchSpace

SPACE = SearchSpace(2e-3)


def values(distribution: optuna.distributions.BaseDistribution) -> st.SearchStrategy:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return st.sampled_from(choices)
        case IntDistribution(low=low, high=high):
            return st.integers(low, high)
        case FloatDistribution(low=low, high=high):
            return st.floats(low, high)
    raise AssertionError(distribution)


PARAMS = st.fixed_dictionaries({k: values(d) for k, d in SPACE.distributions.items()})


@settings(max_examples=300, deadline=None)
@given(PARAMS)
def test_every_point_of_the_space_is_a_candidate_and_comes_back(params):
    candidate = SPACE.candidate_of(params)
    back = SPACE.params_of(candidate)
    assert set(back) == set(SPACE.distributions)
    assert SPACE.candidate_of(back) == candidate
    for name in ("beta", "learning_rate", "kernel", "divergence"):
        assert back[name] == params[name]


@settings(max_examples=50, deadline=None)
@given(PARAMS)
def test_params_of_a_candidate_are_legal_to_enqueue(params):
    """Optuna itself hands them back as they are, without a warning (warnings are errors)."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted = SPACE.params_of(SPACE.candidate_of(params))
    study = optuna.create_study()
    study.enqueue_trial(wanted)
    assert study.ask(SPACE.distributions).params == wanted


def test_every_legal_term_is_in_the_space_once():
    penalties = {term for term in DIVERGENCE_TERMS if term.endswith(":penalty")}
    links = {term for term in DIVERGENCE_TERMS if term.endswith(":link")}
    assert len(penalties) == 7
    # kl as a link is plain DPO, bhattacharyya's link is hellinger's, wasserstein has none
    assert links == {"jensen_shannon:link", "hellinger:link", "renyi:link", "f_divergence:link"}
    assert len(F_PENALTY) == 6
    assert set(F_LINK) == {"forward_kl", "alpha"}


def test_learning_rate_spans_a_factor_of_four_on_either_side():
    rate = SPACE.distributions["learning_rate"]
    assert (rate.low, rate.high, rate.log) == (5e-4, 8e-3, True)
    assert SearchSpace(0.9).distributions["learning_rate"].high == 1.0


def test_no_parameter_is_a_constant_and_strengths_are_searched_over_decades():
    assert not any(distribution.single() for distribution in SPACE.distributions.values())
    for name in ("beta", "gamma", "alpha"):
        found = SPACE.distributions[name]
        assert found.log
        assert math.log10(found.high / found.low) >= 2


def test_unused_parameters_do_not_change_the_candidate():
    base = SPACE.params_of(CandidateSpec(objective=ObjectiveSpec(), learning_rate=2e-3))
    changed = {**base, "gamma": 0.7, "alpha": 9.0, "hmk_rbf": 0.9, "f_link": "alpha"}
    changed |= {"order": 0.2, "renyi_order": 3.0}
    assert SPACE.candidate_of(changed) == SPACE.candidate_of(base)


def objective(**terms) -> CandidateSpec:
    return CandidateSpec(objective=ObjectiveSpec(**terms), learning_rate=2e-3)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (objective(beta=5.0), "beta of the candidate is 5.0; the search space holds 0.01 to 2"),
        (CandidateSpec(objective=ObjectiveSpec(), learning_rate=0.1), "learning_rate"),
        (objective(label_smoothing=0.1), "label smoothing"),
        (
            objective(kernel_term=KernelTerm(kernel=RbfKernelSpec(), mode="separate")),
            "kernel mode",
        ),
        (
            objective(kernel_term=KernelTerm(kernel=SpectralKernelSpec(landmarks=64))),
            "landmarks",
        ),
        (
            objective(kernel_term=KernelTerm(kernel=MixtureKernelSpec(entropy=0.5))),
            "entropy",
        ),
        (objective(kernel_term=KernelTerm(kernel=RbfKernelSpec(), gamma=5.0)), "gamma"),
        (objective(divergence_term=LinkTerm(divergence="kl")), "kl:link"),
        (objective(divergence_term=PenaltyTerm(divergence=RenyiSpec(order=0.5))), "renyi_order"),
        (
            objective(
                divergence_term=PenaltyTerm(divergence=FDivergenceSpec(f=FAlpha(order=0.05)))
            ),
            "order",
        ),
    ],
)
def test_candidates_outside_are_refused_with_what_is_outside(candidate, message):
    with pytest.raises(InvalidInput, match=message):
        SPACE.params_of(candidate)
