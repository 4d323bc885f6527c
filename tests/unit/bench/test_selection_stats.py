"""The statistics of `make bench-selection` on tables whose answers are known."""

import itertools

import numpy as np
import pytest
from scipy.stats import kendalltau

from bench.selection_stats import (
    Case,
    best_is_within,
    kendall_tau,
    over_datasets,
    over_prompts,
    rank_of,
    regret,
    share,
)


def case(losses: np.ndarray, *, scores: list[float], data: str = "made-up", seed: int = 0) -> Case:
    pairs = losses.shape[1]
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    return Case(
        data=data,
        seed=seed,
        scores=np.array(scores),
        order=order,
        losses=losses,
        plain=np.full(pairs, 0.7),
        group=np.arange(pairs),
    )


def test_tau_of_equal_and_reversed_orders_is_one_and_minus_one() -> None:
    scores = np.array([0.1, 0.5, 0.7, 2.0])
    assert kendall_tau(scores, scores**3) == 1.0
    assert kendall_tau(scores, -scores) == -1.0


def test_one_swap_of_neighbours_turns_one_of_six_comparisons() -> None:
    assert kendall_tau(np.arange(4.0), np.array([0.0, 2.0, 1.0, 3.0])) == pytest.approx(4 / 6)


def test_a_ranking_that_ties_everything_orders_nothing() -> None:
    assert kendall_tau(np.ones(5), np.arange(5.0)) == 0.0


def test_ties_count_as_scipys_do() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.integers(0, 5, 28).astype(float)
        b = rng.normal(size=28).round(1)
        assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)


def test_scores_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
        kendall_tau(np.ones(3), np.ones(2))


def test_rank_counts_from_the_smallest_loss_and_shares_places() -> None:
    losses = np.array([0.5, 0.4, 0.5, 0.6])
    assert [rank_of(n, losses) for n in range(4)] == [2.5, 1.0, 2.5, 4.0]


def test_rank_of_a_random_pair_is_the_middle() -> None:
    losses = np.random.default_rng(1).normal(size=28)
    assert np.mean([rank_of(n, losses) for n in range(28)]) == 14.5


def test_best_pair_is_looked_for_at_the_head_of_the_order() -> None:
    losses = np.array([0.3, 0.2, 0.1, 0.4])
    assert best_is_within([2, 3, 0, 1], losses, top=1)
    assert best_is_within([3, 2, 0, 1], losses, top=2)
    assert not best_is_within([3, 0, 1, 2], losses, top=3)


def test_any_of_several_best_pairs_will_do() -> None:
    assert best_is_within([0, 1, 2], np.array([0.1, 0.2, 0.1]), top=1)


def test_regret_is_the_distance_to_the_smallest_loss() -> None:
    losses = np.array([0.5, 0.25, 0.75])
    assert [regret(loss, losses) for loss in (0.5, 0.25, 1.0)] == [0.25, 0.0, 0.75]


def test_interval_over_prompts_is_a_point_where_prompts_agree() -> None:
    losses = np.array([[0.1] * 40, [0.2] * 40, [0.3] * 40])
    made = case(losses, scores=[3.0, 2.0, 1.0])
    found = over_prompts(made, lambda trained: kendall_tau(made.scores, -trained))
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_interval_over_prompts_is_that_of_whole_prompts() -> None:
    """Twenty copies of ten prompts say no more than the ten prompts."""
    rng = np.random.default_rng(2)
    ten = rng.normal(size=(1, 10))
    made = case(np.repeat(ten, 20, axis=1), scores=[0.0])
    as_prompts = Case(
        data="made-up", seed=0, scores=made.scores, order=[0], losses=made.losses,
        plain=made.plain, group=np.repeat(np.arange(10), 20),
    )  # fmt: skip
    width = {
        name: (lambda e: e.high - e.low)(over_prompts(each, lambda trained: float(trained[0])))
        for name, each in (("pairs", made), ("prompts", as_prompts))
    }
    expected = 2 * 1.96 * ten.std() / np.sqrt(10)
    assert width["prompts"] == pytest.approx(expected, rel=0.15)
    assert width["prompts"] > 3 * width["pairs"]


def test_interval_of_a_noisy_ranking_holds_chance() -> None:
    rng = np.random.default_rng(3)
    made = case(rng.normal(size=(28, 60)), scores=list(map(float, range(28))))
    found = over_prompts(made, lambda trained: kendall_tau(made.scores, -trained))
    assert found.low < 0.0 < found.high
    assert found.low <= found.value <= found.high


def test_interval_over_datasets_does_not_shrink_with_seeds() -> None:
    """Seeds of one dataset that agree are not further datasets."""
    values = {"a": 0.1, "b": 0.2, "c": 0.5, "d": 0.6}
    losses = np.ones((2, 4))

    def interval(seeds: int) -> tuple[float, float, float]:
        named = itertools.product(values, range(seeds))
        cases = [case(losses, scores=[1.0, 0.0], data=d, seed=s) for d, s in named]
        found = over_datasets(cases, [values[c.data] for c in cases])
        return found.low, found.value, found.high

    assert interval(1) == pytest.approx(interval(5))
    assert interval(1)[1] == pytest.approx(0.35)
    assert interval(1)[0] < 0.1, "four datasets are few: wider than their own range here"


def test_wilson_interval_against_published_values() -> None:
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = share(hits, trials)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
        assert found.value == hits / trials
    assert share(0, 100).low == 0.0
    assert share(100, 100).high == 1.0


@pytest.mark.parametrize(("hits", "trials"), [(1, 0), (3, 2), (-1, 4)])
def test_shares_of_nothing_are_refused(hits: int, trials: int) -> None:
    with pytest.raises(ValueError, match="expected at least one trial"):
        share(hits, trials)
