"""Trials of different seeds on one level."""

import numpy as np
import pytest

from core.seeds import level_weights, levels


def test_seeds_that_all_share_leave_differences_of_means() -> None:
    found = levels([{0: 0.5, 1: 0.7}, {0: 0.6, 1: 0.9}])
    assert found[1] - found[0] == pytest.approx(0.15)


def test_a_hard_seed_is_no_fault_of_those_that_were_trained_with_it() -> None:
    """The second seed costs 0.2; by plain means the third would win, which is the worst."""
    found = levels([{0: 0.50, 1: 0.70}, {0: 0.52, 1: 0.72}, {0: 0.55}])
    assert found == pytest.approx([0.50, 0.52, 0.55])


def test_what_a_seed_does_to_one_alone_counts_by_half() -> None:
    """The second seed costs 0.1 on average, 0.04 more for the first: its mean is 0.02 higher."""
    found = levels([{0: 0.50, 1: 0.64}, {0: 0.50, 1: 0.56}, {0: 0.51}])
    assert found == pytest.approx([0.52, 0.48, 0.51])


@pytest.mark.parametrize(
    ("log_losses", "expected"),
    [
        ([{0: 0.5}, {0: 0.6}], [0.5, 0.6]),
        ([{0: 0.5}, {1: 0.6}], [0.5, 0.6]),
        ([{0: 0.5, 1: 0.7}, {0: 0.6}], [0.5, 0.6]),
        ([{3: 0.5, 4: 0.7}, {1: 0.6}], [0.5, 0.6]),
    ],
)
def test_seeds_that_no_two_share_change_nothing(
    log_losses: list[dict[int, float]], expected: list[float]
) -> None:
    assert levels(log_losses) == expected


def test_as_least_squares_of_a_library() -> None:
    rng = np.random.default_rng(0)
    seeds = [(0, 1, 2), (0,), (0, 2), (1, 2), (0, 1), (0,)]
    losses = [{seed: float(rng.normal()) for seed in own} for own in seeds]
    design, y = [], []
    for i, own in enumerate(losses):
        for seed, value in own.items():
            row = np.zeros(len(seeds) + 2)
            row[i] = 1.0
            if seed:
                row[len(seeds) + seed - 1] = 1.0
            design.append(row)
            y.append(value)
    wanted = np.linalg.lstsq(np.array(design), np.array(y), rcond=None)[0][: len(seeds)]
    assert levels(losses) == pytest.approx(wanted, abs=1e-12)
    assert np.sum(level_weights(seeds), axis=1) == pytest.approx(1.0)


def test_a_configuration_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="no log-loss"):
        levels([{0: 0.5}, {}])
