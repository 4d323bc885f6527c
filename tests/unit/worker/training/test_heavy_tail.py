"""The fit against scipy and known laws, spectra against a merged model, and the bounded cost."""

import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from core.results import LayerTail, TailFit
from core.run_spec import FinalRunSpec, LoraSpec
from tests.unit.worker.training.micro import Bench, Recorder, ignore_progress, micro_policy
from tests.unit.worker.training.test_export import HMK
from worker.training import heavy_tail
from worker.training.heavy_tail import (
    MIN_TAIL,
    Floats,
    fit_tail,
    heavy_tails,
    spectrum,
    summarize,
)
from worker.training.model import Policy, load_policy


def pareto(alpha: float, *, x_min: float, count: int, seed: int) -> Floats:
    """Draw from the density (alpha - 1)/x_min (x/x_min)^-alpha by its inverse."""
    uniform = np.random.default_rng(seed).random(count)
    return x_min * (1 - uniform) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.7, 2.5, 4.0, 8.0])
def test_known_exponent_is_found(alpha: float) -> None:
    found = fit_tail(pareto(alpha, x_min=0.3, count=2000, seed=1))
    assert found is not None
    # The standard error of the estimate is (alpha - 1)/sqrt(n).
    assert found.alpha == pytest.approx(alpha, abs=4 * (alpha - 1) / found.tail_values**0.5)
    assert found.tail_values > 500


def test_the_tail_begins_where_the_law_does() -> None:
    tail = pareto(2.5, x_min=3.0, count=600, seed=2)
    bulk = np.random.default_rng(3).uniform(0.5, 3.0, 900)
    found = fit_tail(np.concatenate([bulk, tail]))
    assert found is not None
    assert found.x_min == pytest.approx(3.0, rel=0.15)
    assert found.alpha == pytest.approx(2.5, abs=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_fit_is_that_of_scipy_at_the_best_of_all_thresholds(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.concatenate([pareto(3.0, x_min=1.0, count=30, seed=seed), random.random(30)])
    fits = []
    for x_min in np.sort(values)[: len(values) - MIN_TAIL + 1]:
        tail = values[values >= x_min]
        shape, _, _ = scipy.stats.pareto.fit(tail, floc=0, fscale=x_min)
        distance = scipy.stats.kstest(tail, "pareto", args=(shape, 0, x_min)).statistic
        fits.append((distance, x_min, shape + 1, len(tail)))
    distance, x_min, alpha, count = min(fits)
    found = fit_tail(random.permutation(values))
    assert found is not None
    assert (found.x_min, found.tail_values) == (x_min, count)
    assert found.alpha == pytest.approx(alpha, rel=1e-9)
    assert found.ks_distance == pytest.approx(distance, rel=1e-9)


def test_exponent_does_not_depend_on_the_scale() -> None:
    values = pareto(3.0, x_min=1.0, count=100, seed=4)
    one, other = fit_tail(values), fit_tail(1e-6 * values)
    assert one is not None
    assert other is not None
    assert other.alpha == pytest.approx(one.alpha, rel=1e-9)
    assert other.x_min == pytest.approx(1e-6 * one.x_min, rel=1e-9)


@pytest.mark.parametrize(
    "values", [np.array([]), np.arange(1.0, MIN_TAIL), np.full(40, 2.0)], ids=["none", "few", "one"]
)
def test_no_law_without_values_that_differ(values: Floats) -> None:
    assert fit_tail(values) is None


def test_spectrum_is_the_squared_singular_values_without_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    weight = left @ right
    expected = np.linalg.svd(weight.numpy(), compute_uv=False)[4::-1] ** 2
    np.testing.assert_allclose(spectrum(weight), expected, rtol=1e-9)
    np.testing.assert_allclose(spectrum(weight.T), expected, rtol=1e-9)
    assert spectrum(torch.zeros(3, 4, dtype=torch.float64)).shape == (0,)


@pytest.mark.parametrize("folder", ["llama_folder", "gpt2_folder"])
def test_every_trained_layer_is_measured_before_and_after(
    folder: str, request: pytest.FixtureRequest
) -> None:
    policy = micro_policy(request.getfixturevalue(folder))
    untrained = heavy_tails(policy, progress=ignore_progress)
    assert untrained.measured == len(untrained.layers) == len(policy.adapter()) // 2
    assert all(layer.before == layer.after for layer in untrained.layers)
    assert (untrained.changed, untrained.mean_after) == (0, untrained.mean_before)

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.adapter().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    kept = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    calls: list[tuple[int, int]] = []
    report = heavy_tails(policy, progress=lambda done, total: calls.append((done, total)))
    total = 2 * len(report.layers)
    assert calls == [(n, total) for n in range(total + 1)]
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, kept[name]), "measuring must not change the policy"
    merged = copy.deepcopy(policy.model).merge_and_unload()
    for layer in report.layers:
        weight = merged.get_submodule(layer.layer).weight.detach()
        if folder == "gpt2_folder":
            weight = weight.T
        assert (layer.rows, layer.cols) == tuple(weight.shape)
        expected = fit_tail(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
        assert expected is not None
        assert layer.after is not None
        assert layer.after.alpha == pytest.approx(expected.alpha, rel=1e-4)
        assert layer.after.tail_values == expected.tail_values
    assert [x.before for x in report.layers] == [x.before for x in untrained.layers]
    assert report.changed > 0
    assert f"than 0.1 in {report.changed} " in report.sentence


@pytest.mark.parametrize("folder", ["llama_folder", "gpt2_folder"])
def test_full_fine_tuning_is_held_against_the_weights_of_its_folder(
    folder: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    full = load_policy(
        path, lora=LoraSpec(), device=torch.device("cpu"), options=FinalRunSpec(adaptation="full")
    )
    with torch.no_grad():
        for parameter in full.adapter().values():
            parameter.mul_(parameter.abs().sqrt())
    kept = {name: p.detach().clone() for name, p in full.model.named_parameters()}
    report = heavy_tails(full, progress=ignore_progress)
    for name, parameter in full.model.named_parameters():
        assert torch.equal(parameter, kept[name]), "measuring must not change the policy"
    adapted = heavy_tails(micro_policy(path), progress=ignore_progress)
    assert [(x.layer, x.rows, x.cols, x.before) for x in report.layers] == [
        (x.layer, x.rows, x.cols, x.before) for x in adapted.layers
    ]
    assert all(layer.before != layer.after for layer in report.layers)


def test_numbers_are_the_same_each_time(bench: Bench) -> None:
    bench.train(HMK, hooks=Recorder(), total_steps=4, learning_rate=0.02)
    first = heavy_tails(bench.policy, progress=ignore_progress)
    assert heavy_tails(bench.policy, progress=ignore_progress) == first
    assert any(layer.before != layer.after for layer in first.layers)


@pytest.fixture
def policy(llama_folder: Path) -> Policy:
    return micro_policy(llama_folder)


def test_huge_and_quantised_weights_are_passed_over_by_name(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heavy_tail, "MAX_SIDE", 16)
    base = policy.model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj.base_layer")
    base.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.uint8), requires_grad=False)
    report = heavy_tails(policy, progress=ignore_progress)
    why = {layer.layer: layer.skipped for layer in report.layers}
    assert why["model.layers.0.mlp.up_proj"] == "its smaller side is 32, more than 16"
    assert why["model.layers.0.self_attn.k_proj"] == (
        "its base weight is stored as torch.uint8, not as plain numbers"
    )
    assert {name for name, reason in why.items() if reason is None} == {
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    }
    assert report.measured == 3


def test_cost_is_bounded_by_drawing_whole_blocks(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = heavy_tails(policy, progress=ignore_progress)
    sides = [min(x.rows, x.cols) for x in whole.layers]
    work = sum(s**3 + x.rows * x.cols * s / 8 for s, x in zip(sides, whole.layers, strict=True))
    monkeypatch.setattr(heavy_tail, "MAX_WORK", 0.6 * work)
    report = heavy_tails(policy, progress=ignore_progress)
    for layer, full in zip(report.layers, whole.layers, strict=True):
        if ".layers.0." in layer.layer:
            assert layer == full
        else:
            assert layer.skipped == (
                "not drawn: to bound the cost, one of every 2 blocks is measured"
            )
    assert report.measured == 7


def fit(alpha: float) -> TailFit:
    return TailFit(alpha=alpha, x_min=1.0, ks_distance=0.1, tail_values=20)


def test_summary_counts_what_moved_and_what_left_the_usual_range() -> None:
    alphas = [(3.0, 3.05), (3.0, 3.5), (2.1, 1.9), (7.0, 7.5), (5.9, 6.4)]
    layers = [
        LayerTail(layer=f"l{n}", rows=9, cols=9, before=fit(old), after=fit(new))
        for n, (old, new) in enumerate(alphas)
    ]
    report = summarize([*layers, LayerTail(layer="big", rows=9, cols=9, skipped="too large")])
    assert (report.measured, report.changed, report.outliers) == (5, 4, ("l2", "l4"))
    assert report.mean_before == pytest.approx(4.2)
    assert report.mean_after == pytest.approx(4.47)
    assert (report.median_before, report.median_after) == (3.0, 3.5)
    assert report.sentence == (
        "Power-law exponent alpha of 5 of 6 trained layers: mean 4.200 before and 4.470 after "
        "training; it moved by more than 0.1 in 4 and left the usual 2 to 6 in 2."
    )


def test_a_model_without_a_measurable_layer_says_so() -> None:
    report = summarize([LayerTail(layer="big", rows=9, cols=9, skipped="too large")])
    assert (report.measured, report.mean_before, report.median_after) == (0, None, None)
    assert report.sentence == "None of 1 trained layers could be measured."
