import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidInput
from core.profile import DatasetProfile, RankedPair, Recommendation
from core.spec import BASE_KERNELS, DivergenceName, KernelName
from selection.parts import DIVERGENCES, KERNEL_COST
from selection.prior import NOTHING_KNOWN, PRIOR
from selection.recommender import recommend
from tests.unit.selection.samples import profile

SHARE = st.floats(0.0, 1.0)


def pair(found: Recommendation, kernel: KernelName, divergence: DivergenceName) -> RankedPair:
    return next(p for p in found.ranking if (p.kernel, p.divergence) == (kernel, divergence))


def divergence_order(found: Recommendation) -> list[str]:
    return list(dict.fromkeys(entry.divergence for entry in found.ranking))


def gap(found: Recommendation, one: DivergenceName, other: DivergenceName) -> float:
    rbf = KernelName.RBF
    return pair(found, rbf, one).score.value - pair(found, rbf, other).score.value


# ----------------------------------------------------------------- the whole


def test_all_pairs_are_ranked_once_by_falling_score():
    found = recommend(profile())
    assert {(p.kernel, p.divergence) for p in found.ranking} == {
        (k, d) for k in KernelName for d in DivergenceName
    }
    assert [p.rank for p in found.ranking] == list(range(1, 36))
    assert all(a.score.value >= b.score.value for a, b in pairwise(found.ranking))
    assert (found.kernel, found.divergence) == (
        found.ranking[0].kernel,
        found.ranking[0].divergence,
    )
    assert found.runner_up == found.ranking[1]
    assert found.margin == pytest.approx(
        found.ranking[0].score.value - found.ranking[1].score.value
    )


def test_every_pair_says_how_far_the_first_is_ahead_of_it():
    found = recommend(profile(kpa={KernelName.MAHALANOBIS: 0.95}, default_kpa=0.55))
    first = found.ranking[0]
    assert first.behind is None
    for entry in found.ranking[1:]:
        lead = entry.behind
        assert lead is not None
        assert lead.margin.value == pytest.approx(first.score.value - entry.score.value)
        assert lead.separated == (lead.margin.low > 0.0)
        assert lead.confidence == pytest.approx(
            NormalDist(lead.margin.value, (lead.margin.high - lead.margin.value) / 1.959964).cdf(
                2 * lead.margin.value
            )
        )
    assert (found.margin, found.confidence) == (
        found.ranking[1].behind.margin.value,  # type: ignore[union-attr]
        found.ranking[1].behind.confidence,  # type: ignore[union-attr]
    )
    assert found.tied_pairs == sum(
        not entry.behind.separated for entry in found.ranking[1:] if entry.behind is not None
    )
    assert f"{found.tied_pairs} of the 34 others tie with it" in found.summary


def test_what_both_pairs_share_is_no_part_of_their_lead():
    """A wide prior of the divergence says nothing of two kernels beside the same divergence."""
    found = recommend(profile(kpa={KernelName.MAHALANOBIS: 0.95}, default_kpa=0.55))
    same = [p for p in found.ranking[1:] if p.divergence == found.divergence]
    assert same[0].behind == found.kernel_choice.lead


def test_kernel_and_divergence_are_each_said_with_runner_up_margin_and_ties():
    found = recommend(profile(kpa={KernelName.MAHALANOBIS: 0.99}, default_kpa=0.42))
    kernels, divergences = found.kernel_choice, found.divergence_choice
    assert (kernels.name, divergences.name) == (found.kernel, found.divergence)
    assert kernels.lead.separated
    assert kernels.tied == ()
    assert kernels.sentence.startswith("mahalanobis is the kernel to take: it leads")
    assert not divergences.lead.separated
    assert set(divergences.tied) == {d.value for d in DivergenceName} - {found.divergence}
    assert f"the data do not separate it from {divergences.runner_up}," in divergences.sentence
    tie = recommend(profile()).kernel_choice
    assert tie.lead.confidence == pytest.approx(0.5)
    assert set(tie.tied) == {k.value for k in KernelName} - {tie.name}


def test_every_pair_carries_an_objective_of_its_names_evidence_and_one_sentence():
    for entry in recommend(profile(), beta=0.3).ranking:
        assert entry.objective.kernel_name == entry.kernel
        assert entry.objective.divergence_name == entry.divergence
        assert entry.objective.divergence_term is not None
        assert entry.objective.divergence_term.mode == entry.mode == "penalty"
        assert entry.objective.beta == 0.3
        assert entry.score.low < entry.score.value < entry.score.high
        assert entry.reason.endswith(".")
        assert ". " not in entry.reason
        assert entry.evidence["kpa"] == 0.7


def test_goes_through_json_unchanged():
    found = recommend(profile())
    assert Recommendation.model_validate_json(found.model_dump_json()) == found


def test_a_profile_without_a_kernel_is_refused():
    whole = profile()
    part = whole.model_copy(update={"kernels": whole.kernels[:-1]})
    with pytest.raises(InvalidInput, match="hmk"):
        recommend(part)


def test_importing_the_recommender_does_not_import_torch():
    code = (
        "import sys, selection.recommender; print(sorted({'torch', 'optuna'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert ran.stdout.strip() == "[]"


def rows_of(text: str, names) -> dict[str, list[str]]:
    """First table row of each name, without the name."""
    found = {}
    for name in names:
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        found[name] = [cell.strip() for cell in row.strip("|").split("|")][1:]
    return found


def test_the_documented_tables_are_the_ones_in_use():
    text = (Path(__file__).parents[3] / "docs" / "selection.md").read_text(encoding="utf-8")
    text = text[text.index("## From metrics to scores") :]
    for name, cells in rows_of(text, [name.value for name in DivergenceName]).items():
        traits = DIVERGENCES[DivergenceName(name)]
        assert cells[0] == f"{PRIOR.divergences[DivergenceName(name)]:+.2f}"
        assert [float(cell) for cell in cells[1:]] == [
            traits.drift_control,
            traits.saturation,
            traits.geometry,
        ]
    for name, cells in rows_of(text, [name.value for name in KernelName]).items():
        assert cells[0] == f"{PRIOR.kernels[KernelName(name)]:+.2f}"
        assert float(cells[1]) == KERNEL_COST[KernelName(name)]
    said = {
        "level": f"{PRIOR.level:.2f} ± {PRIOR.level_sd:.2f}",
        "a dataset's own, divergences": f"{PRIOR.divergence_sd:.2f}",
        "a dataset's own, kernels": f"{PRIOR.kernel_sd:.2f}",
        "weight of the tilts": f"{PRIOR.tilt:.2f}",
        "weight of the signals": f"{PRIOR.signal:.2f}",
        "datasets": str(PRIOR.datasets),
    }
    for name, cells in rows_of(text, said).items():
        assert cells[0] == said[name], name


# ------------------------------------------------------------------- honesty


def test_a_tie_among_kernels_is_called_one():
    found = recommend(profile())
    assert not found.separated
    assert not found.kernels_separated
    assert found.confidence == pytest.approx(0.5)
    assert "do not separate" in found.summary
    assert "Kernels are a tie" in found.summary
    assert all("the kernels tie" in entry.reason for entry in found.ranking)


def gamma(found: Recommendation) -> float:
    term = found.ranking[0].objective.kernel_term
    assert term is not None
    return term.gamma


def test_kernels_at_chance_are_said_to_carry_nothing_and_get_a_small_gamma():
    nothing = recommend(profile(default_kpa=0.5))
    assert "No kernel predicts preference better than chance" in nothing.summary
    assert gamma(nothing) < gamma(recommend(profile(nag=0.0)))


def test_gamma_is_largest_where_the_similarity_itself_orders_pairs():
    assert gamma(recommend(profile(nag=0.0))) < gamma(recommend(profile(nag=0.05)))


def test_a_kernel_far_ahead_is_first_and_separated_from_the_others():
    found = recommend(profile(kpa={KernelName.MAHALANOBIS: 0.95}, default_kpa=0.55))
    assert found.kernel == KernelName.MAHALANOBIS
    assert found.kernels_separated
    assert "Kernels differ: mahalanobis" in found.summary


def test_the_mixture_does_not_keep_its_own_member_from_being_separated():
    best = {KernelName.RBF: 0.9, KernelName.HMK: 0.9}
    assert recommend(profile(kpa=best, default_kpa=0.6)).kernels_separated


def test_the_mixture_loses_a_tie_for_its_price():
    found = recommend(profile())
    kernels = list(
        dict.fromkeys(p.kernel for p in found.ranking if p.divergence == found.divergence)
    )
    assert kernels[0] == KernelName.RBF
    assert kernels[-1] == KernelName.HMK


def test_the_difference_of_two_divergences_is_never_called_separated_by_the_prior_alone():
    found = recommend(profile(kpa={KernelName.RBF: 0.95}, default_kpa=0.5))
    first, second = found.ranking[:2]
    assert first.kernel == second.kernel == KernelName.RBF
    assert not found.separated
    assert 0.5 < found.confidence < 0.9


def test_separation_is_said_once_earlier_runs_settle_the_divergences():
    """With a sure prior rank 2 is another kernel with the same divergence, which cancels."""
    effects = {name: 9.0 if name is DivergenceName.KL else 0.0 for name in DivergenceName}
    sure = replace(NOTHING_KNOWN, divergences=effects, divergence_sd=0.1, tilt=0.0)
    far_ahead = profile(kpa={KernelName.RBF: 0.99, KernelName.HMK: 0.2}, default_kpa=0.42)
    found = recommend(far_ahead, prior=sure)
    assert found.separated
    assert found.confidence > 0.975
    assert found.summary.startswith("The data put rbf × kl above")
    assert not recommend(profile(), prior=sure).separated


@settings(max_examples=60, deadline=None)
@given(
    kpa=st.dictionaries(st.sampled_from(list(KernelName)), SHARE),
    tat=st.dictionaries(st.sampled_from(list(KernelName)), SHARE),
    half=st.floats(0.001, 0.2),
    overlap=SHARE,
    smoothness=SHARE,
    kurtosis=st.floats(-3.0, 1e6),
    drift=st.floats(0.0, 50.0),
    beta=st.floats(0.001, 10.0),
)
def test_what_is_said_follows_from_the_numbers(
    kpa, tat, half, overlap, smoothness, kurtosis, drift, beta
):
    found = recommend(
        profile(
            kpa=kpa,
            tat=tat,
            half=half,
            overlap=overlap,
            smoothness=smoothness,
            kurtosis=kurtosis,
            drift=drift,
        ),
        beta=beta,
    )
    assert 0.5 <= found.confidence <= 1.0
    assert found.separated == (found.confidence > NormalDist().cdf(1.959963984540054))
    assert found.separated != ("do not separate" in found.summary)
    if found.kernels_separated:
        best = {entry.kernel: entry.kpa for entry in found.profile.kernels}
        rivals = [name for name in BASE_KERNELS if name != found.kernel]
        assert best[found.kernel].low > max(0.5, *(best[name].high for name in rivals))


# -------------------------------------------------------------- monotonicity


@pytest.mark.parametrize("kernel", list(KernelName))
@pytest.mark.parametrize("metric", ["kpa", "tat"])
def test_more_signal_never_lowers_a_kernel_among_the_others(kernel: KernelName, metric: str):
    def lead(value: float) -> float:
        found = recommend(profile(**{metric: {kernel: value}}), prior=NOTHING_KNOWN)  # type: ignore[arg-type]
        kl = DivergenceName.KL
        others = [pair(found, name, kl).score.value for name in KernelName if name is not kernel]
        return pair(found, kernel, kl).score.value - max(others)

    leads = [lead(value) for value in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99)]
    assert all(a <= b + 1e-12 for a, b in pairwise(leads))
    assert leads[0] < leads[-1]


@pytest.mark.parametrize(
    ("metric", "gains", "loses"),
    [
        ("smoothness", DivergenceName.WASSERSTEIN, DivergenceName.KL),
        ("overlap", DivergenceName.KL, DivergenceName.BHATTACHARYYA),
        ("kurtosis", DivergenceName.KL, DivergenceName.BHATTACHARYYA),
        ("drift", DivergenceName.JENSEN_SHANNON, DivergenceName.KL),
    ],
)
def test_each_reference_metric_moves_divergences_as_documented(
    metric: str, gains: DivergenceName, loses: DivergenceName
):
    gaps = [
        gap(recommend(profile(**{metric: v}), prior=NOTHING_KNOWN), gains, loses)  # type: ignore[arg-type]
        for v in (0.05, 0.4, 0.9)
    ]
    assert gaps[0] < gaps[1] < gaps[2]


def test_effects_of_earlier_runs_order_what_the_metrics_leave_equal():
    effects = {name: float(n) for n, name in enumerate(DivergenceName)}
    known = replace(NOTHING_KNOWN, divergences=effects, tilt=0.0)
    order = divergence_order(recommend(profile(), prior=known))
    assert order == [name.value for name in reversed(DivergenceName)]


def test_weights_of_zero_silence_the_metrics():
    deaf = replace(NOTHING_KNOWN, tilt=0.0, signal=0.0)
    quiet = recommend(profile(default_kpa=0.5), prior=deaf)
    loud = profile(kpa={KernelName.SPECTRAL: 0.99}, default_kpa=0.5, smoothness=0.9, drift=9.0)
    for mine, theirs in zip(quiet.ranking, recommend(loud, prior=deaf).ranking, strict=True):
        assert (mine.kernel, mine.divergence) == (theirs.kernel, theirs.divergence)
        assert mine.score == theirs.score


def test_wider_metric_intervals_never_narrow_a_score():
    def width(whole: DatasetProfile) -> float:
        score = recommend(whole).ranking[0].score
        return score.high - score.low

    best = {KernelName.RBF: 0.95}
    assert width(profile(kpa=best, half=0.06)) > width(profile(kpa=best, half=0.01))


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_penalty_keeps_its_measured_balance_with_beta(beta: float):
    term = recommend(profile(), beta=beta).ranking[0].objective.divergence_term
    assert term is not None
    assert term.mode == "penalty"
    assert term.alpha == pytest.approx(6.0 * beta)
