"""What is tried first, and who wins."""

import math

import pytest

from core.run_spec import SearchSpec
from core.spec import (
    DivergenceName,
    KernelName,
    ObjectiveSpec,
)
from selection.recommender import recommend
from selection.search import initial_candidates
from selection.space import SearchSpace
from selection.winner import FinishedTrial, select_winner
from tests.unit.selection.samples import profile

FOUND = recommend(profile())


def first(max_trials: int, seed: int = 0):
    spec = SearchSpec(max_trials=max_trials)
    return initial_candidates(FOUND, spec=spec, learning_rate=2e-3, seed=seed)


@pytest.mark.parametrize("max_trials", [2, 3, 5, 12, 60])
def test_plain_dpo_then_the_recommended_pair_within_the_budget(max_trials: int):
    found = first(max_trials)
    assert len(found) <= max_trials
    assert found[0][0] == "baseline"
    assert found[0][1].objective == ObjectiveSpec(beta=0.1)
    assert found[1] == ("recommended", found[1][1])
    assert found[1][1].objective == FOUND.ranking[0].objective


def test_the_default_budget_covers_every_kernel_and_divergence_and_leaves_room():
    found = first(SearchSpec().max_trials)
    objectives = [candidate.objective for _, candidate in found[1:]]
    assert {o.kernel_name for o in objectives} == {*KernelName, "none"}
    assert {o.divergence_name for o in objectives} == set(DivergenceName)
    assert len(found) < SearchSpec().max_trials
    assert len({candidate.model_dump_json() for _, candidate in found}) == len(found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_trials", [9, 30])
def test_coverage_holds_whatever_the_draw(seed: int, max_trials: int):
    objectives = [c.objective for _, c in first(max_trials, seed)]
    assert {o.divergence_name for o in objectives} == set(DivergenceName)
    assert {o.kernel_name for o in objectives} >= set(KernelName)


def test_pairing_is_drawn_from_the_seed_so_that_searches_are_not_confounded():
    draws = [[c.objective.label for _, c in first(12, seed)] for seed in range(6)]
    assert first(12, 3) == first(12, 3)
    assert len({tuple(labels) for labels in draws}) > 1
    assert len({tuple(labels[:2]) for labels in draws}) == 1


def test_all_of_them_lie_in_the_search_space():
    space = SearchSpace(2e-3)
    for _, candidate in first(60):
        assert space.candidate_of(space.params_of(candidate)) == candidate


# -------------------------------------------------------------------- winner


def trial(
    number: int,
    log_loss: float | None,
    *,
    drift: float | None = 0.1,
    feasible: bool = True,
    se: float = 0.0,
) -> FinishedTrial:
    return FinishedTrial(
        number=number,
        label=f"t{number}",
        log_loss=log_loss,
        drift=drift,
        feasible=feasible,
        standard_error=se,
    )


def test_lowest_feasible_log_loss_wins():
    found = select_winner([trial(0, 0.5), trial(1, 0.3, feasible=False), trial(2, 0.4)])
    assert (found.winner, found.tied) == (2, ())
    assert found.reason.startswith("Trial 2 (t2) has the lowest feasible log-loss, 0.4000")


def test_ties_go_to_the_lower_drift_and_it_is_said():
    results = [
        trial(0, 0.405, drift=0.05, se=0.01),
        trial(1, 0.4, drift=0.2),
        trial(2, 0.405, drift=0.001, se=0.004),
    ]
    found = select_winner(results)
    assert (found.winner, found.tied) == (0, (1,))
    assert "2 trials tie: none is above the lowest feasible log-loss, 0.4000 of trial 1" in (
        found.reason
    )
    assert "trial 0 (t0) has the least drift of them, 0.0500" in found.reason


def test_equal_drift_goes_to_the_lower_log_loss_and_then_to_the_earlier_trial():
    assert select_winner([trial(0, 0.401, se=0.1), trial(1, 0.4), trial(2, 0.4)]).winner == 1


def test_unknown_drift_loses_a_tie():
    results = [trial(0, 0.4, drift=None), trial(1, 0.45, drift=9.0, se=0.1)]
    assert select_winner(results).winner == 1


def test_only_unknown_drifts_are_still_decided():
    results = [trial(0, 0.45, drift=None, se=0.1), trial(1, 0.4, drift=None)]
    found = select_winner(results)
    assert found.winner == 1
    assert "unknown" in found.reason


@pytest.mark.parametrize(
    "results",
    [[], [trial(0, None), trial(1, math.nan), trial(2, math.inf), trial(3, 0.2, feasible=False)]],
)
def test_without_a_feasible_measurement_nobody_wins(results: list[FinishedTrial]):
    found = select_winner(results)
    assert found.winner is None
    assert found.reason.startswith(f"None of {len(results)} trials")


def test_the_order_of_results_does_not_matter():
    results = [trial(n, 0.4 + 0.001 * (n % 3), drift=0.1, se=0.005) for n in range(6)]
    assert select_winner(results) == select_winner(results[::-1])
