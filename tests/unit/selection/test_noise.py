"""What is said of wrong labels, on data whose flip rate is known."""

import pytest
import torch

from core.profile import LabelNoise
from selection.metrics.bootstrap import group_weights
from selection.metrics.kpa import RIDGE, grouped_folds, held_out_scores, normalized
from selection.metrics.noise import LabelFacts, Origin, label_noise
from selection.profile import profile_dataset
from tests.unit.selection.samples import features, shuffled

PAIRS = 1000


def found(
    *, flip: float, steep: float, flipped: list[int] | None = None, seed: int = 0
) -> LabelNoise:
    """Noise of pairs that prefer the first axis with odds `steep` times it, labels then flipped."""
    generator = torch.Generator().manual_seed(seed)
    apart = torch.randn(PAIRS, 8, generator=generator)
    prefers = torch.rand(PAIRS, generator=generator) < torch.sigmoid(steep * apart[:, 0])
    wrong = torch.rand(PAIRS, generator=generator) < flip
    if flipped is not None:
        flipped += wrong.nonzero().squeeze(-1).tolist()
    difference = torch.where((prefers ^ wrong)[:, None], apart, -apart)
    group = torch.arange(PAIRS)
    fold = grouped_folds(group, folds=5, generator=generator)
    scores = held_out_scores(normalized(difference @ difference.T), fold, ridge=RIDGE)
    weights = group_weights(group, resamples=200, generator=generator)
    facts = LabelFacts(tuple(Origin(str(n), n + 1, None) for n in range(PAIRS)), 3, PAIRS)
    return label_noise(scores, weights, facts=facts)


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.2])
def test_the_estimate_tracks_the_flip_rate_where_the_geometry_predicts(flip: float) -> None:
    noise = found(flip=flip, steep=1000.0)
    assert noise.verdict == "estimate"
    assert noise.flip_rate is not None
    assert noise.at_most is not None
    assert noise.flip_rate.value == pytest.approx(flip, abs=0.04)
    assert noise.flip_rate.low - 0.01 <= flip <= noise.at_most
    assert f"3 of {PAIRS} pairs contradict" in noise.sentence


def test_labels_that_features_do_not_explain_cannot_be_told_wrong() -> None:
    noise = found(flip=0.0, steep=0.0, seed=1)
    assert noise.verdict == "cannot_tell"
    assert (noise.at_most, noise.flip_rate, noise.suspicious) == (None, None, ())
    assert "cannot tell" in noise.sentence


def test_a_weak_preference_gives_a_bound_and_no_estimate() -> None:
    noise = found(flip=0.1, steep=0.8)
    assert noise.verdict == "bound"
    assert noise.flip_rate is None
    assert noise.at_most is not None
    assert 0.1 < noise.at_most < 0.5
    assert noise.sentence.startswith("At most")


def test_suspicious_pairs_are_the_flipped_ones() -> None:
    flipped: list[int] = []
    noise = found(flip=0.05, steep=1000.0, flipped=flipped)
    named = [int(pair.id) for pair in noise.suspicious]
    assert len(named) == 20
    assert len(set(named) & set(flipped)) >= 18
    assert [pair.line for pair in noise.suspicious] == [n + 1 for n in named]
    scores = [pair.score for pair in noise.suspicious]
    assert scores == sorted(scores)
    assert scores[-1] < 0.0


def test_the_profile_has_it_with_the_origins_of_the_measured_pairs() -> None:
    data = features(300, signal=4.0, pairs_per_prompt=1)
    facts = LabelFacts(tuple(Origin(f"p{n}", n, None) for n in range(300)), 0, 300)
    noise = profile_dataset(data, seed=0, bootstrap=50, max_pairs=200, labels=facts).noise
    assert noise is not None
    assert noise.verdict == "estimate"
    assert all(pair.id == f"p{pair.line}" for pair in noise.suspicious)
    blind = profile_dataset(shuffled(data, seed=1), seed=0, bootstrap=50).noise
    assert blind is not None
    assert blind.verdict != "estimate"
    assert blind.contradictions_of == 0
