"""What is called a difference between trials, and how often that is wrong."""

import itertools
import math

import numpy as np
import pytest

from core.errors import InvalidInput
from selection.ties import LEVEL, SEED_NOISE, Entrant, Gap, SeedNoise, gaps, holm

PROMPTS, PAIRS = 60, 120
GROUP = np.arange(PAIRS) // 2


def made(
    rng: np.random.Generator,
    means: tuple[float, ...],
    *,
    seeds: int = 1,
    seed_sd: float = 0.0,
    shared_sd: float = 0.0,
    own_sd: float = 0.1,
) -> list[Entrant]:
    """Trials of these means: prompts are hard for all, differ for each, and so do seeds."""
    hard = np.repeat(rng.normal(0.0, 0.3, size=PROMPTS), 2) + rng.normal(
        0.0, shared_sd, size=(seeds, 1)
    )
    found = []
    for number, mean in enumerate(means):
        own = np.repeat(rng.normal(0.0, own_sd, size=(seeds, PROMPTS)), 2, axis=1)
        own = own + rng.normal(0.0, seed_sd, size=(seeds, 1))
        found.append(Entrant(number, mean + hard + own))
    return found


def best(entrants: list[Entrant]) -> int:
    return min(entrants, key=lambda e: float(e.losses.mean())).number


NONE = SeedNoise(own=0.0, shared=0.0)


def called(entrants: list[Entrant], noise: SeedNoise = SEED_NOISE) -> list[Gap]:
    """The differences that are called, seen from the best."""
    winner = best(entrants)
    found = gaps(entrants, GROUP, winner=winner, resamples=400, noise=noise)
    return [gap for gap in found if gap.is_beaten]


def test_holm_by_hand() -> None:
    assert holm({0: 0.01, 1: 0.04, 2: 0.03}) == pytest.approx({0: 0.03, 2: 0.06, 1: 0.06})
    assert holm({5: 0.7, 6: 0.6}) == {6: 1.0, 5: 1.0}
    assert holm({}) == {}


def test_two_trials_and_no_seeds_give_the_p_value_of_the_t_test() -> None:
    """d / SE = 2.3 with 59 degrees: 2.5 % (two sides, since either could have been the best)."""
    rng = np.random.default_rng(0)
    difference = rng.normal(size=PROMPTS)
    difference = (difference - difference.mean()) / difference.std(ddof=1)
    wanted = 2.3 / math.sqrt(PROMPTS)
    hard = rng.normal(0.7, 3.0, size=PROMPTS)
    group = np.arange(PROMPTS)
    entrants = [Entrant(3, hard[None]), Entrant(8, (hard + difference + wanted)[None])]
    (gap,) = gaps(entrants, group, winner=3, noise=NONE)
    assert gap.number == 8
    assert gap.behind == pytest.approx(wanted)
    assert gap.p_value == pytest.approx(0.0250, abs=0.005)


def test_pairs_of_a_prompt_count_once() -> None:
    """Every pair four times, under the same prompt, is no news; under new prompts it seems so."""
    rng = np.random.default_rng(1)
    base = rng.normal(size=(2, PROMPTS)) + np.array([[0.0], [0.3]])
    copies = [Entrant(i, np.repeat(row, 4)[None]) for i, row in enumerate(base)]
    group = np.repeat(np.arange(PROMPTS), 4)
    single = [Entrant(i, row[None]) for i, row in enumerate(base)]
    once = gaps(single, np.arange(PROMPTS), winner=0, noise=NONE)
    again = gaps(copies, group, winner=0, noise=NONE)
    apart = gaps(copies, np.arange(group.size), winner=0, noise=NONE)
    assert again[0].p_value == once[0].p_value
    assert apart[0].p_value < 0.5 * once[0].p_value


@pytest.mark.parametrize(
    ("trials", "seeds", "seed_sd", "shared_sd", "noise", "most"),
    [
        (2, 1, 0.0, 0.1, NONE, 28),
        (4, 1, 0.02, 0.1, SEED_NOISE, 20),
        (2, 2, 0.02, 0.1, SEED_NOISE, 20),
        (5, 2, 0.02, 0.0, SEED_NOISE, 20),
        (4, 3, 0.03, 0.1, SEED_NOISE, 20),
    ],
)
def test_equal_trials_are_hardly_ever_told_apart(
    trials: int, seeds: int, seed_sd: float, shared_sd: float, noise: SeedNoise, most: int
) -> None:
    """400 searches in which all finalists are the same: at most 5 % call any difference.

    The first knows all there is to know and is exact: 20, with a standard deviation of 4.4.
    """
    rng = np.random.default_rng(20)
    worlds = (
        made(rng, (0.7,) * trials, seeds=seeds, seed_sd=seed_sd, shared_sd=shared_sd)
        for _ in range(400)
    )
    wrong = sum(bool(called(world, noise)) for world in worlds)
    assert wrong <= most


def test_two_names_of_one_configuration_with_seeds_of_their_own() -> None:
    """Nothing cancels where no seed is shared: the A/A test of the harder kind."""
    rng = np.random.default_rng(21)
    wrong = naive = 0
    for _ in range(300):
        (one,) = made(rng, (0.7,), seeds=2, seed_sd=0.01, shared_sd=0.05, own_sd=0.05)
        names = [Entrant(i, one.losses[i : i + 1], seeds=(i,)) for i in range(2)]
        wrong += bool(called(names))
        naive += bool(called([Entrant(i, name.losses) for i, name in enumerate(names)]))
    assert wrong <= LEVEL * 300
    assert naive > 2 * LEVEL * 300


def test_what_a_seed_does_to_all_hides_nothing() -> None:
    """A seed that costs all 0.3 is no noise between those that share it."""
    rng = np.random.default_rng(22)
    calm = made(rng, (0.6, 0.66), seeds=2, own_sd=0.02)
    apart = [Entrant(e.number, e.losses + np.array([[0.0], [0.3]])) for e in calm]
    for calm_gap, apart_gap in zip(
        gaps(calm, GROUP, winner=0), gaps(apart, GROUP, winner=0), strict=True
    ):
        assert calm_gap.is_beaten
        assert apart_gap.behind == pytest.approx(calm_gap.behind)
        assert apart_gap.p_value == pytest.approx(calm_gap.p_value)


def test_a_second_seed_of_some_is_no_handicap_of_theirs() -> None:
    """The first was also trained with a hard seed, as the second; both lie where their level is."""
    rng = np.random.default_rng(23)
    first, second, third = made(rng, (0.6, 0.62, 0.7), seeds=2, shared_sd=0.2)
    alone = Entrant(third.number, third.losses[:1])
    whole = gaps([first, second, third], GROUP, winner=0)
    some = gaps([first, second, alone], GROUP, winner=0)
    assert some[0].behind == pytest.approx(whole[0].behind)
    assert some[1].behind == pytest.approx(whole[1].behind, abs=0.03)


def test_who_does_not_race_tells_what_seeds_do_and_is_compared_with_nobody() -> None:
    rng = np.random.default_rng(24)
    first, second, third = made(rng, (0.6, 0.7, 0.5), seeds=2, shared_sd=0.2)
    alone = Entrant(second.number, second.losses[:1])
    beside = Entrant(third.number, third.losses, races=False)
    (gap,) = gaps([first, alone, beside], GROUP, winner=0)
    assert gap.number == 1
    assert gap.behind == pytest.approx(0.1, abs=0.06)


def test_without_the_noise_of_seeds_equal_trials_are_told_apart() -> None:
    """What the guess is for: with seeds taken for exact the same runs seem to differ."""
    rng = np.random.default_rng(3)
    worlds = [made(rng, (0.7, 0.7), seed_sd=0.02, own_sd=0.02) for _ in range(200)]
    naive = sum(bool(called(world, NONE)) for world in worlds)
    told = sum(bool(called(world)) for world in worlds)
    assert naive > 0.3 * 200
    assert told <= LEVEL * 200


def test_second_seeds_stand_for_the_guess() -> None:
    """Ten trials that two seeds show to be steady: the guess alone would tell fewer apart."""
    rng = np.random.default_rng(4)
    means = tuple(0.7 + 0.03 * i for i in range(10))
    steady = made(rng, means, seeds=2, seed_sd=0.0005, own_sd=0.02)
    alone = [Entrant(e.number, e.losses[:1]) for e in steady]
    assert len(called(steady)) > len(called(alone))


def test_large_differences_are_called_and_smaller_ones_are_not() -> None:
    rng = np.random.default_rng(5)
    found = called(made(rng, (0.60, 0.605, 0.75, 0.80)))
    assert [gap.number for gap in found] == [2, 3]
    assert all(gap.p_value <= LEVEL for gap in found)


def test_more_finalists_make_it_harder() -> None:
    """The same difference, among more trials: the best of many equals is further ahead."""
    rng = np.random.default_rng(6)
    two = made(rng, (0.6, 0.66), own_sd=0.12)
    many = two + [Entrant(e.number + 2, e.losses) for e in made(rng, (0.67,) * 6, own_sd=0.12)]
    few_p, many_p = (gaps(world, GROUP, winner=0, seed=1)[0].p_value for world in (two, many))
    assert many_p > few_p


def test_too_few_prompts_call_nothing() -> None:
    entrants = [Entrant(i, np.full((1, 18), 0.1 + i)) for i in range(2)]
    group = np.arange(18) // 2
    assert [gap.p_value for gap in gaps(entrants, group, winner=0)] == [1.0]
    assert gaps(entrants, np.arange(18), winner=0)[0].is_beaten


def test_the_order_and_the_prompts_names_do_not_matter() -> None:
    rng = np.random.default_rng(7)
    entrants = made(rng, (0.6, 0.65))
    (gap,) = gaps(entrants, GROUP, winner=0)
    (again,) = gaps(entrants, 1000 - GROUP, winner=0)
    assert again.p_value == pytest.approx(gap.p_value, abs=0.01)
    assert gaps(entrants, GROUP, winner=0) == (gap,)


def test_what_cannot_be_compared_is_refused() -> None:
    good = [Entrant(i, np.full((1, PAIRS), 0.5)) for i in range(2)]
    beside = Entrant(1, good[1].losses, races=False)
    bad: list[tuple[list[Entrant], int, str]] = [
        (good, 7, "the winner is 7"),
        ([good[0], beside], 1, "the winner is 1"),
        ([good[0], good[0]], 0, "different numbers"),
        ([good[0], Entrant(1, np.ones((1, 3)))], 0, r"shape \(1, 3\)"),
        ([good[0], Entrant(1, np.ones(PAIRS))], 0, "seeds, pairs"),
        ([good[0], Entrant(1, np.full((1, PAIRS), np.nan))], 0, "not all finite"),
        ([good[0], Entrant(1, np.ones((2, PAIRS)), seeds=(1, 1))], 0, "one row of each"),
        ([good[0], Entrant(1, np.ones((2, PAIRS)), seeds=(1,))], 0, "one row of each"),
    ]
    for entrants, winner, says in bad:
        with pytest.raises(InvalidInput, match=says):
            gaps(entrants, GROUP, winner=winner)
    with pytest.raises(InvalidInput, match=r"noise of seeds is -1"):
        SeedNoise(own=-1.0, shared=0.0)


def test_p_values_are_those_of_the_definition() -> None:
    """Every resample of three prompts by hand is too few to call; ranks of p follow the gaps."""
    rng = np.random.default_rng(8)
    entrants = made(rng, (0.6, 0.62, 0.64, 0.7))
    found = gaps(entrants, GROUP, winner=best(entrants))
    ordered = sorted(found, key=lambda gap: gap.behind)
    assert all(a.p_value >= b.p_value for a, b in itertools.pairwise(ordered))
