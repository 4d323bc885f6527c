"""The prior table that trained pairs give: what carries over is found, the rest is kept out."""

from dataclasses import replace

import numpy as np
import pytest

from bench.selection_prior import LEAST_SD, Evidence, fit_prior, rounded, without
from bench.selection_read import evidence
from bench.selection_report import TABLE
from bench.train_report import Table
from core.spec import BASE_KERNELS, DivergenceName, KernelName
from selection.prior import NOTHING_KNOWN, PRIOR

KERNELS, DIVERGENCES = len(BASE_KERNELS), len(DivergenceName)
EFFECTS = np.linspace(-3.0, 3.0, DIVERGENCES)


def dataset(
    rng: np.random.Generator, *, effects: np.ndarray = EFFECTS, slope: float = 0.0, own: float = 0.1
) -> Evidence:
    tilts = rng.uniform(0.0, 1.0, DIVERGENCES)
    gains = rng.normal(5.0, 3.0) + np.zeros((KERNELS, DIVERGENCES))
    gains += effects + slope * tilts + rng.normal(0.0, own, DIVERGENCES)
    return Evidence(gains=gains, tilts=tilts, signals=rng.normal(0.0, 0.1, KERNELS))


def test_effects_that_all_datasets_share_are_found_with_their_level() -> None:
    rng = np.random.default_rng(0)
    found = fit_prior([dataset(rng) for _ in range(6)])
    assert list(found.divergences.values()) == pytest.approx(list(EFFECTS), abs=0.2)
    assert found.divergence_sd < 0.3
    assert found.level == pytest.approx(5.0, abs=3.0)
    assert found.level_sd > 0.5
    assert found.datasets == 6
    assert found.kernels[KernelName.HMK] == 0.0


def test_effects_of_each_dataset_alone_are_shrunk_and_leave_doubt() -> None:
    rng = np.random.default_rng(1)
    found = fit_prior([dataset(rng, effects=rng.normal(0.0, 2.0, DIVERGENCES)) for _ in range(6)])
    assert max(abs(effect) for effect in found.divergences.values()) < 1.2
    assert found.divergence_sd > 1.2


def test_a_metric_that_predicts_gets_its_weight() -> None:
    rng = np.random.default_rng(2)
    found = fit_prior([dataset(rng, slope=4.0, own=0.02) for _ in range(6)])
    assert found.tilt == pytest.approx(4.0, abs=0.4)
    assert list(found.divergences.values()) == pytest.approx(list(EFFECTS), abs=0.3)


def test_a_metric_that_says_the_contrary_gets_none() -> None:
    rng = np.random.default_rng(3)
    assert fit_prior([dataset(rng, slope=-4.0) for _ in range(6)]).tilt == 0.0


def test_a_metric_that_never_varies_keeps_the_weight_that_is_argued_for() -> None:
    rng = np.random.default_rng(4)
    silent = [replace(dataset(rng), signals=np.zeros(KERNELS)) for _ in range(4)]
    assert fit_prior(silent).signal == NOTHING_KNOWN.signal


def test_noise_moves_an_argued_weight_little() -> None:
    rng = np.random.default_rng(5)
    weights = [fit_prior([dataset(rng, own=2.0) for _ in range(5)]).tilt for _ in range(40)]
    assert np.mean(weights) == pytest.approx(NOTHING_KNOWN.tilt, abs=0.2)


def test_datasets_that_agree_by_chance_do_not_make_an_effect_certain() -> None:
    same = dataset(np.random.default_rng(5), own=0.0)
    assert fit_prior([same, same]).divergence_sd == LEAST_SD


def test_one_dataset_is_no_evidence_about_another() -> None:
    rng = np.random.default_rng(6)
    two = {"a": dataset(rng), "b": dataset(rng)}
    assert without(two, "a") is NOTHING_KNOWN
    three = two | {"c": dataset(rng)}
    assert without(three, "c") == fit_prior([three["a"], three["b"]])


def test_rounding_changes_no_more_than_the_last_digit() -> None:
    table = replace(NOTHING_KNOWN, level=1.234, tilt=0.456)
    assert rounded(table).level == 1.23
    assert rounded(table).tilt == 0.46


def test_the_shipped_table_is_the_one_that_the_kept_runs_give() -> None:
    kept = evidence(Table(TABLE).rows)
    assert rounded(fit_prior(list(kept.values()))) == PRIOR
