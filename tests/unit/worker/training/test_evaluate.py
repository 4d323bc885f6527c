import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit
from scipy.stats import t as student

from core.spec import ObjectiveSpec
from tests.unit.worker.training.micro import Bench, Recorder, ignore_progress, stored_states
from worker.training.evaluate import (
    Measured,
    accuracy,
    bootstrap_mean,
    calibration_error,
    clustered_standard_error,
    compare,
    evaluation,
    fit_temperature,
    measure,
    preference_losses,
    t_quantile,
    trial_score,
)


def measured(margins: np.ndarray, *, group: np.ndarray | None = None) -> Measured:
    n = margins.size
    return Measured(
        chosen=margins / 2, rejected=-margins / 2, chosen_tokens=np.full(n, 2.0),
        rejected_tokens=np.full(n, 4.0), kl_sum=np.full(n, 0.6),
        group=np.arange(n) if group is None else group,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_temperature_is_the_minimum(scale: float) -> None:
    margins = np.random.default_rng(0).normal(0.7, 1.0, 60) * scale
    e = 1 / (margins.size + 2)

    def loss(log_b: float) -> float:
        z = np.exp(log_b) * margins
        return float(np.mean((1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)))

    best = minimize_scalar(loss, bounds=(-20, 20), method="bounded", options={"xatol": 1e-10})
    assert fit_temperature(margins) == pytest.approx(math.exp(best.x), rel=1e-4)


def test_temperature_of_margins_that_say_nothing_or_everything() -> None:
    assert fit_temperature(np.zeros(5)) == 0.0
    assert fit_temperature(np.array([-1.0, -2.0, 0.5])) == 0.0
    separable = fit_temperature(np.array([1.0, 2.0, 3.0]))
    assert 0.0 < separable < 10.0
    assert preference_losses(np.array([-5.0, 5.0]), 0.0) == pytest.approx([math.log(2)] * 2)


def test_evaluation_numbers() -> None:
    margins = np.array([2.0, -1.0, 0.0, 4.0])
    found = evaluation(measured(margins, group=np.array([0, 0, 1, 2])), temperature=0.5)
    assert found.log_loss == pytest.approx(np.mean(-np.log(expit(0.5 * margins))))
    assert found.accuracy == pytest.approx(2.5 / 4)
    assert found.drift == pytest.approx(4 * 0.6 / (4 * 6))
    assert found.chosen_displacement == pytest.approx(margins.mean() / 2)
    assert (found.pairs, found.prompts) == (4, 3)
    normalized = margins / 2 / 2 + margins / 2 / 4
    assert found.accuracy_length_normalized == pytest.approx(accuracy(normalized))


def test_calibration_error_equals_a_loop_over_bins() -> None:
    rng = np.random.default_rng(1)
    margins = rng.normal(0.3, 1.5, 400)
    confidence = expit(0.8 * np.abs(margins))
    expected = 0.0
    for k in range(15):
        low, high = 0.5 + k / 30, 0.5 + (k + 1) / 30
        inside = (confidence >= low) & ((confidence < high) | (k == 14))
        if inside.any():
            gap = np.mean(margins[inside] > 0) - np.mean(confidence[inside])
            expected += inside.mean() * abs(gap)
    assert calibration_error(margins, 0.8) == pytest.approx(expected)


def test_trials_are_scored_on_prompts_that_the_temperature_has_not_seen() -> None:
    rng = np.random.default_rng(2)
    margins, group = rng.normal(0.5, 1.0, 40), np.repeat(np.arange(20), 2)
    score = trial_score(measured(margins, group=group))
    even = group % 2 == 0
    losses = np.empty(40)
    losses[even] = preference_losses(margins[even], fit_temperature(margins[~even]))
    losses[~even] = preference_losses(margins[~even], fit_temperature(margins[even]))
    assert score.log_loss == pytest.approx(losses.mean())
    assert score.standard_error == pytest.approx(clustered_standard_error(losses, group))
    lone = trial_score(measured(margins[:2], group=np.zeros(2, dtype=np.int64)))
    assert math.isfinite(lone.log_loss)


def test_clustered_error_is_that_of_independent_prompts() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=50)
    alone = clustered_standard_error(values, np.arange(50))
    assert alone == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    copies = clustered_standard_error(np.repeat(values, 4), np.repeat(np.arange(50), 4))
    assert copies == pytest.approx(alone), "copies of a pair are no new evidence"


@pytest.mark.parametrize("degrees", [1, 2, 5, 8, 9, 12, 30, 400])
def test_t_quantile_is_scipys(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(student.ppf(0.975, degrees), rel=1e-3)


def test_intervals_of_few_prompts_are_wide_enough() -> None:
    rng = np.random.default_rng(8)
    covered = 0
    for trial in range(300):
        values = rng.normal(0.2, 1, 6)
        found = bootstrap_mean(values, np.arange(6), seed=trial, resamples=400)
        covered += found.low <= 0.2 <= found.high
    assert covered / 300 >= 0.92, "plain percentiles cover 0.83 of the time"


@pytest.mark.parametrize("prompts", [1, 9, 10])
def test_a_handful_of_prompts_never_calls_a_difference(prompts: int) -> None:
    group = np.repeat(np.arange(prompts), 2)
    base = measured(np.full(2 * prompts, -1.0), group=group)
    ours = measured(np.full(2 * prompts, 3.0), group=group)
    found = compare(
        ours, base, run_temperature=1.0, baseline_temperature=1.0, label="rbf × kl",
        baseline_label="plain DPO", seed=0,
    )  # fmt: skip
    assert f"on {2 * prompts} test pairs of {prompts} prompts" in found.sentence
    assert "the interval covers test prompts, not seeds" in found.sentence
    if prompts < 10:
        assert found.verdict == "no significant difference"
        assert "Fewer than 10 test prompts" in found.sentence
    else:
        assert found.verdict == "better"


def test_bootstrap_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(40), 3)
    covered = 0
    for trial in range(200):
        values = 0.2 + rng.normal(0, 1, 40)[group] + rng.normal(0, 0.5, 120)
        found = bootstrap_mean(values, group, seed=trial, resamples=400)
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.2 <= found.high
    assert 0.88 <= covered / 200 <= 0.99, "pairs of a prompt are resampled together"


def test_bootstrap_is_seeded() -> None:
    values, group = np.random.default_rng(6).normal(size=30), np.arange(30)
    assert bootstrap_mean(values, group, seed=1) == bootstrap_mean(values, group, seed=1)
    assert bootstrap_mean(values, group, seed=1) != bootstrap_mean(values, group, seed=2)


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(3.0, "better"), (-3.0, "worse"), (0.05, "no significant difference")],
)
def test_the_verdict_is_the_intervals(shift: float, verdict: str) -> None:
    rng = np.random.default_rng(7)
    base = measured(rng.normal(0.2, 1.0, 80))
    ours = measured(base.margins + shift + rng.normal(0, 0.3, 80))
    found = compare(
        ours, base, run_temperature=1.0, baseline_temperature=1.0, label="rbf × kl",
        baseline_label="plain DPO", seed=0,
    )  # fmt: skip
    assert found.verdict == verdict
    assert found.log_loss is not None
    if verdict == "no significant difference":
        assert found.log_loss.low <= 0.0 <= found.log_loss.high
        assert "no significant difference" in found.sentence
    swapped = compare(
        base, ours, run_temperature=1.0, baseline_temperature=1.0, label="dpo",
        baseline_label="plain DPO", seed=0,
    )  # fmt: skip
    assert swapped.log_loss is not None
    assert swapped.log_loss.value == pytest.approx(-found.log_loss.value)
    assert swapped.log_loss.low == pytest.approx(-found.log_loss.high)


@pytest.mark.parametrize("stored", [True, False])
def test_an_untrained_policy_has_margins_of_exactly_zero(
    bench: Bench, stored: bool, tmp_path: Path
) -> None:
    bench.policy.reset_adapter(1)
    states = stored_states(bench.policy, bench.pairs, tmp_path)
    found = measure(
        bench.policy,
        bench.pairs,
        reference=states if stored else None,
        progress=ignore_progress,
    )
    assert np.array_equal(found.margins, np.zeros(12))
    assert found.drift == pytest.approx(0.0, abs=1e-7)
    assert accuracy(found.margins) == 0.5
    score = trial_score(found)
    assert score.log_loss == pytest.approx(math.log(2))


def test_measured_ratios_and_drift_are_those_of_plain_transformers(bench: Bench) -> None:
    bench.train(
        ObjectiveSpec(beta=1.0), hooks=Recorder(), total_steps=20, learning_rate=0.02, batch_size=12
    )
    found = measure(bench.policy, bench.pairs, progress=ignore_progress)
    assert found.is_finite
    assert accuracy(found.margins) == 1.0
    assert not replace(found, kl_sum=found.kl_sum * np.nan).is_finite
    model, pair = bench.policy.model, bench.pairs[5]
    start, kl_sum = len(pair.prompt), 0.0
    for answer, ratio in ((pair.chosen, found.chosen[5]), (pair.rejected, found.rejected[5])):
        tokens = torch.tensor([[*pair.prompt, *answer]])
        with torch.no_grad():
            log_p = model(input_ids=tokens).logits[0, start - 1 : -1].log_softmax(-1)
            with model.disable_adapter():
                log_q = model(input_ids=tokens).logits[0, start - 1 : -1].log_softmax(-1)
        kl_sum += float((log_p.exp() * (log_p - log_q)).sum())
        taken = (log_p - log_q)[torch.arange(len(answer)), torch.tensor(answer)]
        assert ratio == pytest.approx(float(taken.sum()), abs=1e-3)
    assert found.kl_sum[5] == pytest.approx(kl_sum, rel=1e-3)
    assert found.kl_sum[5] > 0.01
