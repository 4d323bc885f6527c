"""Finished searches: they help where they carry over, and move nothing where they do not."""

from itertools import product
from statistics import fmean

import numpy as np
import pytest

from core.profile import DatasetProfile, HistoryUse
from core.spec import DivergenceName, KernelName
from selection.history import Gain, PastSearch, refine
from selection.parts import (
    NO_HISTORY,
    Refinement,
    Shift,
    by_kernel,
    divergence_parts,
    kernel_parts,
    refined,
)
from selection.prior import NOTHING_KNOWN
from selection.recommender import recommend
from tests.unit.selection.samples import profile

Effects = dict[KernelName | DivergenceName, float]
PAIRS = list(product(KernelName, DivergenceName))
WORLDS = 20
WORLD = NOTHING_KNOWN
"""Worlds whose merits are drawn as the prior has it, whatever table is shipped."""


def effects(rng: np.random.Generator) -> Effects:
    """Merits of kernels and divergences that the prior table does not know."""
    return {
        **{k: rng.normal(0, WORLD.kernel_sd) for k in KernelName},
        **{d: rng.normal(0, WORLD.divergence_sd) for d in DivergenceName},
    }


def data(rng: np.random.Generator) -> DatasetProfile:
    return profile(
        overlap=rng.uniform(0.4, 0.95), smoothness=rng.uniform(0.2, 0.7),
        drift=rng.uniform(0.0, 1.0), kurtosis=rng.uniform(0.0, 3.0),
        default_kpa=rng.uniform(0.5, 0.8),
    )  # fmt: skip


def scores(
    of: DatasetProfile, history: Refinement = NO_HISTORY
) -> dict[tuple[KernelName, DivergenceName], float]:
    kernels = refined(kernel_parts(by_kernel(of), prior=WORLD), history)
    divergences = refined(divergence_parts(of, prior=WORLD), history)
    return {(k, d): kernels[k].mean + divergences[d].mean for k, d in PAIRS}


def truth(of: DatasetProfile, merits: Effects) -> dict[tuple[KernelName, DivergenceName], float]:
    return {(k, d): score + merits[k] + merits[d] for (k, d), score in scores(of).items()}


def search(rng: np.random.Generator, merits: Effects, *, trials: int = 12) -> PastSearch:
    of = data(rng)
    gains = truth(of, merits)
    tried = [PAIRS[i] for i in rng.choice(len(PAIRS), trials, replace=False)]
    return PastSearch(
        of, "m", tuple(Gain(k, d, gains[k, d] + rng.normal(0, 1.0)) for k, d in tried)
    )


def regret(gains: dict[tuple[KernelName, DivergenceName], float], history: Refinement,
           of: DatasetProfile) -> float:  # fmt: skip
    said = scores(of, history)
    return max(gains.values()) - gains[max(PAIRS, key=lambda pair: said[pair])]


def test_searches_that_carry_over_lower_the_regret():
    cold, warm = [], []
    for world in range(WORLDS):
        rng = np.random.default_rng(world)
        merits = effects(rng)
        past = [search(rng, merits) for _ in range(10)]
        of = data(rng)
        history = refine(of, model="m", past=past, prior=WORLD)
        assert history.use.searches == 10
        assert history.use.weight > 0.0
        cold.append(regret(truth(of, merits), NO_HISTORY, of))
        warm.append(regret(truth(of, merits), history, of))
    assert fmean(warm) < 0.4 * fmean(cold)


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["noise only", "each search its own"])
def test_searches_that_do_not_carry_over_move_nothing(spread: float):
    """Guard against negative transfer: left out but for rare luck, and then nearly harmless."""
    used, harm = [], []
    for world in range(WORLDS):
        rng = np.random.default_rng(1000 + world)

        def merits(rng: np.random.Generator = rng) -> Effects:
            return {name: spread * value for name, value in effects(rng).items()}

        past = [search(rng, merits()) for _ in range(10)]
        of = data(rng)
        history = refine(of, model="m", past=past, prior=WORLD)
        gains = truth(of, merits())
        used.append(history.use.weight > 0.0)
        harm.append(regret(gains, history, of) - regret(gains, NO_HISTORY, of))
    assert sum(used) <= 5  # the share is a tenth: Binomial(20, 0.1) is 5 or less in 98.9 %
    assert fmean(harm) < 0.1


@pytest.mark.parametrize(("count", "trials"), [(4, 12), (9, 2)], ids=["few", "short"])
def test_little_history_is_none(count: int, trials: int):
    rng = np.random.default_rng(0)
    merits = effects(rng)
    past = [search(rng, merits, trials=trials) for _ in range(count)]
    history = refine(data(rng), model="m", past=past, prior=WORLD)
    assert history.shifts == {}
    assert history.use.weight == 0.0
    assert "fewer than 5" in history.use.sentence


def test_a_level_that_all_pairs_of_a_search_share_says_nothing():
    rng = np.random.default_rng(3)
    merits = effects(rng)
    past = [search(rng, merits) for _ in range(8)]
    lifted = [
        PastSearch(s.profile, s.model, tuple(Gain(g.kernel, g.divergence, g.percent + 10 * i)
                                             for g in s.gains))
        for i, s in enumerate(past)
    ]  # fmt: skip
    of = data(rng)
    one, other = (refine(of, model="m", past=each, prior=WORLD) for each in (past, lifted))
    assert one.use.weight == pytest.approx(other.use.weight)
    for name, shift in one.shifts.items():
        assert other.shifts[name].mean == pytest.approx(shift.mean)


def test_nearer_datasets_and_the_same_model_count_more():
    """Two camps of searches disagree about renyi; a dataset follows the camp it is like."""

    def camp(overlap: float, model: str, gain: float) -> list[PastSearch]:
        of = profile(overlap=overlap, drift=3 * overlap)
        base = scores(of)
        return [
            PastSearch(of, model, tuple(
                Gain(k, d, base[k, d] + (gain if d is DivergenceName.RENYI else 0.0))
                for k, d in PAIRS
            ))
            for _ in range(6)
        ]  # fmt: skip

    past = [*camp(0.2, "a", 2.0), *camp(0.9, "b", -2.0)]

    def renyi(overlap: float, model: str) -> float:
        of = profile(overlap=overlap, drift=3 * overlap)
        shifts = refine(of, model=model, past=past, prior=WORLD).shifts
        return shifts[DivergenceName.RENYI].mean

    assert renyi(0.2, "a") > 0.0 > renyi(0.9, "b")
    assert renyi(0.2, "a") > renyi(0.2, "b") > renyi(0.9, "b")


def test_a_recommendation_tells_what_history_did():
    rng = np.random.default_rng(1)
    merits = effects(rng)
    of = data(rng)
    history = refine(of, model="m", past=[search(rng, merits) for _ in range(10)], prior=WORLD)
    found, without = recommend(of, history=history, prior=WORLD), recommend(of, prior=WORLD)
    assert found.history == history.use
    assert history.use.sentence in found.summary
    assert "No runs are known" in without.summary
    for pair in found.ranking:
        shift = history.shifts[DivergenceName(pair.divergence)].mean
        assert pair.evidence["divergence_history_shift"] == shift
        assert f"(finished searches: {shift:+.2f})" in pair.reason
        before = next(
            p for p in without.ranking if (p.kernel, p.divergence) == (pair.kernel, pair.divergence)
        )
        both = shift + history.shifts[KernelName(pair.kernel)].mean
        assert pair.score.value == pytest.approx(before.score.value + both)
        assert pair.score.high - pair.score.low < before.score.high - before.score.low


def test_a_lead_that_finished_searches_have_made_is_not_said_to_be_of_the_data_alone():
    kl = DivergenceName.KL
    sure = Refinement(
        shifts={
            **{d: Shift(9.0 if d is kl else 0.0, WORLD.divergence_sd**2) for d in DivergenceName},
            **{k: Shift(0.0, WORLD.kernel_sd**2) for k in KernelName},
        },
        use=HistoryUse(searches=50, weight=1.0, sentence="50 finished searches."),
    )
    of = profile(kpa={KernelName.RBF: 0.99, KernelName.HMK: 0.2}, default_kpa=0.42)
    found = recommend(of, history=sure, prior=WORLD)
    assert found.separated
    assert found.summary.startswith("The data and finished searches put rbf × kl above")
