"""The preference function of `make bench-kernel-term`: what it may know, and what it finds."""

import torch

from bench.kernel_function import Texts, learn, lexical_embeddings, scores_of_new
from core.spec import RbfKernelSpec
from objectives import PairEmbeddings, build_kernel, fit_geometry
from selection.metrics.kpa import held_out_scores, normalized, preference_gram
from tests.unit.selection.samples import features

GROUP = torch.arange(120) // 2


def made_up(pairs: int, *, signal: float, seed: int) -> PairEmbeddings:
    made = features(pairs, signal=signal, seed=seed)
    return PairEmbeddings(made.prompt_embedding, made.chosen_embedding, made.rejected_embedding)


def exchanged(embeddings: PairEmbeddings, row: int) -> PairEmbeddings:
    chosen, rejected = embeddings.chosen.clone(), embeddings.rejected.clone()
    chosen[row], rejected[row] = embeddings.rejected[row], embeddings.chosen[row]
    return PairEmbeddings(embeddings.prompt, chosen, rejected)


def test_no_pairs_own_label_is_in_its_number() -> None:
    train, new = made_up(120, signal=1.0, seed=0), made_up(30, signal=1.0, seed=1)
    before = learn(train, GROUP, new, seed=0).train
    after = learn(exchanged(train, 7), GROUP, new, seed=0).train
    # Pair 6 has the same prompt: nothing of it changes, and pair 7 only turns its sign.
    torch.testing.assert_close(after[7], -before[7], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after[6], before[6], rtol=1e-3, atol=1e-5)
    assert int((~torch.isclose(after, before, rtol=1e-3, atol=1e-5)).sum()) > 60


def test_new_pairs_are_scored_as_a_fold_that_was_left_out() -> None:
    train = made_up(120, signal=1.0, seed=0)
    geometry = fit_geometry(train, seed=0)
    kernel = build_kernel(RbfKernelSpec(), geometry)
    chosen, rejected = geometry.prepare(train.chosen), geometry.prepare(train.rejected)
    fold = (GROUP % 3 == 0).long()
    gram = preference_gram(kernel, chosen, rejected)
    left_out = held_out_scores(normalized(gram), fold, ridge=1.0)[fold == 1]
    rest = (chosen[fold == 0], rejected[fold == 0])
    found = scores_of_new(kernel, rest, (chosen[fold == 1], rejected[fold == 1]))
    # The same up to the level that k is divided by: that of the pairs fitted to.
    assert float(torch.corrcoef(torch.stack([found, left_out]))[0, 1]) > 0.9999
    torch.testing.assert_close(found, left_out, rtol=0.1, atol=0.01)


def test_what_carries_the_preference_is_found_and_noise_is_not() -> None:
    for signal, low, high in ((2.0, 0.8, 1.0), (0.0, 0.3, 0.65)):
        train, new = made_up(120, signal=signal, seed=0), made_up(200, signal=signal, seed=1)
        found = learn(train, GROUP, new, seed=0)
        assert low < found.held_out_accuracy() <= high
        assert low < float((found.new > 0).double().mean()) <= high
    assert learn(made_up(120, signal=2.0, seed=0), GROUP, new, seed=0).temperature > 1.0


def test_log_odds_are_calibrated_on_pairs_that_were_not_fitted_to() -> None:
    train, new = made_up(400, signal=1.0, seed=0), made_up(2000, signal=1.0, seed=1)
    found = learn(train, torch.arange(400) // 2, new, seed=0)
    said = torch.sigmoid(found.new_log_odds.abs()).mean()
    right = (found.new > 0).double().mean()
    assert abs(float(said - right)) < 0.05


def test_embeddings_in_which_nothing_differs_say_nothing() -> None:
    same = torch.ones(20, 4)
    found = learn(
        PairEmbeddings(same, same, same), torch.arange(20), PairEmbeddings(same, same, same), seed=0
    )
    assert found.temperature == 0.0
    assert not bool(found.new_log_odds.any() | found.train_log_odds.any())


def test_words_are_told_apart_and_new_texts_use_the_training_frequencies() -> None:
    train = Texts(["why"] * 3, ["a red cat", "a red dog", "a red cow"], ["a blue cat"] * 3)
    found, new = lexical_embeddings(train, Texts(["why"], ["A RED cat!"], ["zebra"]))
    torch.testing.assert_close(new.chosen[0], found.chosen[0])
    assert float(new.rejected[0] @ found.chosen[0]) == 0.0
    torch.testing.assert_close(found.chosen.norm(dim=-1), torch.ones(3))
    assert float(found.chosen[0] @ found.chosen[1]) > float(found.chosen[0] @ found.rejected[0])
