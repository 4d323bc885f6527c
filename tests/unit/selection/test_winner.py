"""Who wins a search, and what it says of the others."""

import math

import numpy as np
import pytest

from core.errors import InvalidInput
from selection.ties import Floats, SeedNoise
from selection.winner import FinishedTrial, paired_error, select_winner

GROUP = np.arange(80) // 2


def trial(
    number: int,
    losses: Floats | float,
    *,
    drift: float | None = 0.1,
    feasible: bool = True,
    error: float = 0.0,
) -> FinishedTrial:
    """One with losses (seeds, pairs), or with its log-loss alone."""
    several = None if isinstance(losses, float) else losses
    means = [losses] if isinstance(losses, float) else losses.mean(axis=1).tolist()
    found = dict(enumerate(means))
    return FinishedTrial(number, f"arm {number}", found, drift, feasible, error, several)


def around(mean: float, *, seed: int, sd: float = 0.05) -> Floats:
    """Losses of one seed on 40 prompts that differ in how hard they are for everybody."""
    hard = np.repeat(np.random.default_rng(99).normal(0.0, 0.3, size=40), 2)
    own = np.random.default_rng(seed).normal(0.0, sd, size=80)
    return (mean + hard + own - own.mean())[None]


def test_the_lowest_wins_and_what_is_far_off_is_beaten() -> None:
    found = select_winner([trial(0, around(0.6, seed=0)), trial(1, around(0.9, seed=1))], GROUP)
    assert (found.winner, found.tied) == (0, ())
    assert found.reason.startswith("Trial 0 (arm 0) has the lowest feasible log-loss")
    (gap,) = found.gaps
    assert gap.is_beaten
    assert gap.behind == pytest.approx(0.3)


def test_what_is_near_is_a_tie_though_it_does_not_win() -> None:
    found = select_winner(
        [
            trial(0, around(0.60, seed=0, sd=0.01)),
            trial(1, around(0.61, seed=1, sd=0.01), drift=0.01),
            trial(2, around(0.9, seed=2)),
        ],
        GROUP,
    )
    assert (found.winner, found.tied) == (0, (1,))
    assert found.reason.startswith("2 trials tie")


def test_within_one_standard_error_less_drift_wins() -> None:
    losses = [around(0.6, seed=0), around(0.603, seed=1)]
    assert paired_error(losses[1][0] - losses[0][0], GROUP) > 0.003
    found = select_winner([trial(0, losses[0], drift=0.4), trial(1, losses[1], drift=0.1)], GROUP)
    assert (found.winner, found.tied) == (1, (0,))
    assert "least drift, 0.1000, of those within one standard error" in found.reason
    unknown = select_winner(
        [trial(0, losses[0], drift=0.4), trial(1, losses[1], drift=None)], GROUP
    )
    assert unknown.winner == 0


def test_a_second_seed_is_a_row_of_losses() -> None:
    """A seed that costs one of two 0.3 says that 0.15 between them is chance."""
    unsteady = np.concatenate([around(0.45, seed=0), around(0.75, seed=1)])
    steady = np.concatenate([around(0.75, seed=2), around(0.75, seed=3)])
    results = [trial(0, unsteady), trial(1, steady)]
    assert select_winner(results, GROUP).tied == (1,)
    calm = np.concatenate([around(0.6, seed=0), around(0.6, seed=1)])
    assert select_winner([trial(0, calm), results[1]], GROUP).tied == ()


def test_a_hard_second_seed_costs_nobody_the_race() -> None:
    """Two finalists were also trained with a seed that costs all 0.2; the third was not."""
    results = [
        trial(i, np.concatenate([around(mean, seed=i, sd=0.01), around(mean + 0.2, seed=10 + i)]))
        for i, mean in enumerate((0.50, 0.52))
    ]
    results.append(trial(2, around(0.55, seed=2, sd=0.01)))
    found = select_winner(results, GROUP)
    assert found.winner == 0
    own = around(0.50, seed=0, sd=0.01).mean()
    assert found.reason.endswith(f"has the lowest feasible log-loss, {own:.4f}.")
    assert [gap.behind for gap in found.gaps] == pytest.approx([0.02, 0.05], abs=1e-6)


def test_an_infeasible_trial_tells_what_a_seed_does() -> None:
    """Only it shares the second seed with the first, which is hard; it neither wins nor ties."""
    both = np.concatenate([around(0.5, seed=0), around(0.7, seed=1)])
    far = np.concatenate([around(0.3, seed=2), around(0.5, seed=3)])
    found = select_winner(
        [trial(0, both), trial(1, around(0.55, seed=4)), trial(2, far, feasible=False)], GROUP
    )
    assert found.winner == 0
    assert [(gap.number, gap.behind) for gap in found.gaps] == [(1, pytest.approx(0.05))]


def test_infeasible_and_unmeasured_trials_neither_win_nor_tie() -> None:
    results = [
        trial(0, around(0.2, seed=0), feasible=False),
        trial(1, around(0.6, seed=1)),
        FinishedTrial(2, "arm 2", {}, None, True),
        trial(3, math.nan),
    ]
    found = select_winner(results, GROUP)
    assert (found.winner, found.tied, found.gaps) == (1, (), ())
    assert found.reason.endswith("no other trial is measured.")
    none = select_winner([results[0], *results[2:]], GROUP)
    assert (none.winner, none.tied) == (None, ())
    assert none.reason.startswith("None of 3 trials")


def test_where_losses_are_lost_standard_errors_decide() -> None:
    """z = 0.1 / hypot(0.02, sqrt 2 of 3 % of 0.5) = 3.4 is beaten, 0.02 / 0.028 a tie."""
    results = [
        trial(0, 0.5),
        trial(1, 0.52, drift=0.0, error=0.019),
        trial(2, 0.6, error=0.02),
        trial(3, around(0.7, seed=1), error=0.02),
    ]
    for group in (GROUP, None):
        found = select_winner(results, group)
        assert (found.winner, found.tied, found.gaps) == (0, (1,), ())
    noisy = select_winner(results, GROUP, noise=SeedNoise(own=0.5, shared=0.0))
    assert noisy.tied == (1, 2, 3)


def test_equal_log_losses_go_to_the_earlier_trial() -> None:
    found = select_winner([trial(4, 0.5), trial(2, 0.5)])
    assert (found.winner, found.tied) == (2, (4,))


def test_losses_that_are_not_those_of_the_log_loss_are_refused() -> None:
    wrong = FinishedTrial(0, "arm 0", {0: 0.5}, 0.1, True, 0.0, around(0.6, seed=0))
    with pytest.raises(InvalidInput, match="expected the mean over pairs of every seed"):
        select_winner([wrong], GROUP)
    short = FinishedTrial(0, "arm 0", {0: 0.6, 1: 0.6}, 0.1, True, 0.0, around(0.6, seed=0))
    with pytest.raises(InvalidInput, match="expected the mean over pairs of every seed"):
        select_winner([short], GROUP)


def test_error_of_prompts_by_hand() -> None:
    """Sums of prompts around the mean 0.25: 0.25, -0.5, 0.25; sqrt(3/2 * 0.375) / 4."""
    differences = np.array([0.25, 0.5, -0.25, 0.5])
    group = np.array([5, 5, 2, 9])
    assert paired_error(differences, group) == pytest.approx(math.sqrt(1.5 * 0.375) / 4)
    assert paired_error(differences, np.zeros(4, dtype=np.int64)) == 0.0
