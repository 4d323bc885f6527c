"""Finished searches: they help where they carry over, and move nothing where they do not."""

from statistics import fmean

import numpy as np
import pytest

from bench.history_worlds import MODEL, PAIRS, PRIOR, Past, data, merits, scores, search, service
from core.profile import HistoryUse
from core.spec import DivergenceName, KernelName
from selection.history import Gain, PastSearch, refine
from selection.parts import (
    Refinement,
    Shift,
)
from selection.recommender import recommend
from tests.unit.selection.samples import profile

WORLDS = 20
WORLD = PRIOR
"""Worlds whose merits are drawn as the prior has it, whatever table is shipped."""


def test_searches_that_carry_over_lower_the_regret():
    cold, warm = [], []
    for seed in range(WORLDS):
        made = service(Past.SAME, 10, template=profile(), seed=seed)
        assert made.history.use.searches == 10
        assert made.history.use.weight > 0.0
        cold.append(made.regret(made.cold))
        warm.append(made.regret(made.warm))
    assert fmean(warm) < 0.4 * fmean(cold)


@pytest.mark.parametrize("past", [Past.NOISE, Past.OWN])
def test_searches_that_do_not_carry_over_move_nothing(past: Past):
    """Guard against negative transfer: left out but for rare luck, and then nearly harmless."""
    made = [service(past, 10, template=profile(), seed=seed) for seed in range(WORLDS)]
    used = sum(each.history.use.weight > 0.0 for each in made)
    assert used <= 5  # the share is a tenth: Binomial(20, 0.1) is 5 or less in 98.9 %
    assert fmean(each.regret(each.warm) - each.regret(each.cold) for each in made) < 0.1


@pytest.mark.parametrize(("count", "trials"), [(4, 12), (9, 2)], ids=["few", "short"])
def test_little_history_is_none(count: int, trials: int):
    rng = np.random.default_rng(0)
    has = merits(rng)
    past = [search(rng, has, template=profile(), trials=trials) for _ in range(count)]
    history = refine(data(rng, profile()), model=MODEL, past=past, prior=WORLD)
    assert history.shifts == {}
    assert history.use.weight == 0.0
    assert "fewer than 5" in history.use.sentence


def test_a_level_that_all_pairs_of_a_search_share_says_nothing():
    rng = np.random.default_rng(3)
    has = merits(rng)
    past = [search(rng, has, template=profile()) for _ in range(8)]
    lifted = [
        PastSearch(s.profile, s.model, tuple(Gain(g.kernel, g.divergence, g.percent + 10 * i)
                                             for g in s.gains))
        for i, s in enumerate(past)
    ]  # fmt: skip
    of = data(rng, profile())
    one, other = (refine(of, model=MODEL, past=each, prior=WORLD) for each in (past, lifted))
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
    has = merits(rng)
    of = data(rng, profile())
    history = refine(
        of, model=MODEL, past=[search(rng, has, template=profile()) for _ in range(10)], prior=WORLD
    )
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
