"""The statistics and the report of `make bench-kernel-term` on tables whose answers are known."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.kernel_cases import BUDGET, FUNCTIONS, PLAIN, VARIANTS, versions
from bench.kernel_effects import AT_END, BESIDE, TRAINED, Effect, effects
from bench.kernel_report import goals, read, report, said, verdict
from bench.kernel_stats import (
    Case,
    Point,
    against,
    at_drift,
    at_end,
    common_drift,
    fit_strengths,
    over_datasets,
    over_prompts,
    scored,
    scored_together,
)
from bench.train_report import Table
from worker.training.evaluate import fit_temperature

Row = dict[str, Any]
N = 120
ENVIRONMENT = {
    "cpu": "a CPU", "threads": 1, "cores": 1, "torch": "2", "transformers": "5", "peft": "0",
    "python": "3",
}  # fmt: skip


def points(margins: np.ndarray, drifts: tuple[float, ...] = (0.01, 0.04)) -> list[Point]:
    """A run whose margins grow with the square root of drift."""
    return [Point(math.sqrt(d / drifts[-1]), d, math.sqrt(d) * margins) for d in drifts]


def case(runs: dict[str, list[Point]], *, log_odds: np.ndarray, data: str = "a") -> Case:
    return Case(data, 0, np.arange(N) // 2, {"reference": log_odds}, runs)


def noisy(signal: float, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(signal, 1.0, N)


def test_between_points_margins_are_linear_in_the_root_of_drift() -> None:
    run = [Point(0.5, 0.01, np.array([0.1, -0.2])), Point(1.0, 0.04, np.array([0.4, -0.2]))]
    np.testing.assert_allclose(at_drift(run, 0.0225), [0.25, -0.2])
    np.testing.assert_allclose(at_drift(run, 0.0025), [0.05, -0.1])
    np.testing.assert_allclose(at_drift(run, 0.0), [0.0, 0.0])
    for drift in (0.04, 0.05):
        np.testing.assert_allclose(at_drift(run, drift), run[1].margins)


def test_at_equal_drift_the_run_that_went_further_is_scaled_down() -> None:
    near, far = noisy(1.0, seed=0), noisy(1.0, seed=1)
    plain = [Point(0.6, 0.01, 0.1 * near), Point(1.0, 0.04, 0.2 * near)]
    further = [Point(0.6, 0.04, near), Point(1.0, 0.16, far)]
    assert common_drift(plain, further) == common_drift(further, plain) == 0.04
    made = case({PLAIN: plain, "further": further}, log_odds=near)
    np.testing.assert_allclose(against(made, "further", PLAIN).losses, 0.0, atol=1e-9)
    assert against(made, "further", PLAIN).drift == 0.04
    at_its_end = at_end(made, "further", PLAIN)
    assert at_its_end.drift == 0.16
    assert np.abs(at_its_end.losses).mean() > 0.1


def test_scores_do_not_depend_on_the_scale_of_margins() -> None:
    margins = noisy(0.7, seed=0)
    made = case({PLAIN: points(margins)}, log_odds=margins)
    first, second = scored(made, margins), scored(made, 100 * margins)
    np.testing.assert_allclose(first.losses, second.losses, atol=1e-6)
    np.testing.assert_array_equal(first.right, margins > 0)


def test_two_strengths_are_found_and_never_negative() -> None:
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(0.0, 1.5, 4000), rng.normal(0.0, 1.0, 4000)
    label = np.where(rng.random(4000) < 1 / (1 + np.exp(-truth)), 1.0, -1.0)
    first, second = label * (truth + noise), label * (truth - noise)
    b, c = fit_strengths(first, second)
    assert (b, c) == (pytest.approx(0.5, abs=0.06), pytest.approx(0.5, abs=0.06))
    b, c = fit_strengths(first, -first + 0.1 * label * noise)
    assert min(b, c) >= 0.0
    assert fit_strengths(first, np.zeros(4000)) == (fit_temperature(first), 0.0)


def test_beside_a_policy_a_function_counts_for_what_it_adds() -> None:
    margins, log_odds = noisy(0.7, seed=0), noisy(0.7, seed=1)
    made = case({PLAIN: points(margins)}, log_odds=log_odds)
    alone = scored(made, margins).losses.mean()
    assert scored_together(made, margins, log_odds).losses.mean() < alone - 0.05
    same = scored_together(made, margins, margins).losses.mean()
    assert same == pytest.approx(alone, abs=0.005)


def test_one_dataset_says_nothing_about_others_and_prompts_come_along_whole() -> None:
    better, plain = noisy(1.5, seed=0), noisy(0.3, seed=0)
    made = case({PLAIN: points(plain), "v": points(better)}, log_odds=plain)
    found = against(made, "v", PLAIN)
    single = over_datasets([made], [found], lambda d: d.losses)
    assert single.low == single.value == single.high
    one = over_prompts([made], [found], lambda d: d.losses)
    twice = over_prompts([made, made], [found, found], lambda d: d.losses)
    assert one.low < one.value < 0
    assert twice.high - twice.low == pytest.approx(one.high - one.low, rel=0.05)


def rows_of(data: str, seed: int, signal: dict[str, float], *, noise: int) -> list[Row]:
    """A whole case; every variant has the signal 0.5 unless said."""
    at = {"data": data, "sha256": "0", "seed": seed, "budget": BUDGET}
    base = noisy(0.0, seed=noise)
    function = {
        "temperature": 1.0, "held_out_accuracy": 0.6, "held_out_log_loss": 0.65,
        "log_odds": list(base + 0.5),
    }  # fmt: skip
    about = {
        "prompt": list(range(N)), "train_pairs": 100,
        "functions": dict.fromkeys(FUNCTIONS, function),
    }  # fmt: skip

    def run(name: str) -> Row:
        margins = base + signal.get(name, 0.5) + 0.05 * noisy(0.0, seed=noise + 100)
        return {
            "kind": "run", **at, "variant": name, "version": versions()[name],
            "ended_by": "budget", "seconds": 1.0,
            "points": [
                {"scale": p.scale, "drift": p.drift, "margins": list(p.margins)}
                for p in points(margins)
            ],
        }  # fmt: skip

    return [{"kind": "case", **at, **about}, *(run(name) for name in VARIANTS)]


def table_rows(signal: dict[str, float], *, datasets: str = "abcd", seeds: int = 2) -> list[Row]:
    found = [
        rows_of(data, seed, signal, noise=10 * number + seed)
        for number, data in enumerate(datasets)
        for seed in range(seeds)
    ]
    return [row for rows in found for row in rows]


def found_in(signal: dict[str, float], **few: Any) -> tuple[dict[str, Effect], list[Row]]:
    cases, _, told = read(table_rows(signal, **few))
    assert told == []
    trained = effects(cases, TRAINED)
    return trained, goals(trained)


def test_a_variant_that_is_better_everywhere_is_called_so() -> None:
    trained, (counted, best) = found_in({"f as soft label": 0.8, "f as weight": 0.2})
    assert [name for name, of in trained.items() if of.beats] == ["f as soft label"]
    assert trained["f as weight"].datasets.low > 0
    assert (trained["f as soft label"].better, trained["f as soft label"].cases) == (8, 8)
    assert (counted["measured"], counted["met"], best["met"]) == (4, True, True)
    assert best["variant"] == "f as soft label"


def test_where_all_are_alike_nothing_is_called() -> None:
    trained, (_, best) = found_in({})
    assert not any(of.beats or of.datasets.low > 0 for of in trained.values())
    assert not best["met"]


def test_a_control_that_wins_meets_no_goal() -> None:
    trained, (_, best) = found_in({"f by lot as soft label": 0.9})
    assert trained["f by lot as soft label"].beats
    assert not best["met"]


def test_no_goal_is_met_on_too_little() -> None:
    for few in ({"datasets": "abc"}, {"seeds": 1}):
        _, stated = found_in({"f as soft label": 0.8}, **few)
        assert [goal["met"] for goal in stated] == [False, False]
        assert stated[1]["measured"] < 0
    for none in ({}, found_in({"f as soft label": 0.8}, datasets="a")[0]):
        assert [goal["measured"] for goal in goals(none)] == [0, None]


def test_nothing_is_said_of_a_single_dataset() -> None:
    trained, _ = found_in({"f as soft label": 0.8}, datasets="a")
    assert trained["f as soft label"].beats
    said_of_one = verdict("Here", trained)
    assert "better than γ = 0: none" in said_of_one
    assert "not judged: " in said_of_one


def test_a_comparison_is_over_the_cases_that_have_both_of_its_runs() -> None:
    rows = table_rows({}, datasets="ab", seeds=1)
    last = rows.pop()
    broken, near = rows[2], rows[3]
    broken["ended_by"], broken["points"] = "nan", []
    near["points"] = near["points"][1:]
    rows.append(rows[4] | {"version": "older", "points": []})
    rows.append(rows[4] | {"budget": {}, "points": []})
    cases, stored, told = read(rows)
    assert [case.data for case in cases] == [row["data"] for row in stored] == ["a", "b"]
    assert told == [
        f"a, seed 0: {broken['variant']} broke down.",
        f"a, seed 0: of {len(VARIANTS)} variants {len(VARIANTS) - 1} are trained, "
        f"{len(VARIANTS) - 2} of them scored at all scales.",
        f"b, seed 0: of {len(VARIANTS)} variants {len(VARIANTS) - 1} are trained, "
        f"{len(VARIANTS) - 1} of them scored at all scales.",
    ]
    scaled, ended = effects(cases, TRAINED), effects(cases, AT_END)
    assert scaled[last["variant"]].sources == ("a",)
    assert scaled[broken["variant"]].sources == ended[broken["variant"]].sources == ("b",)
    assert (scaled[near["variant"]].cases, ended[near["variant"]].cases) == (1, 2)
    assert scaled[rows[4]["variant"]].cases == 2


def test_a_function_that_a_case_lacks_is_not_beside_its_policy() -> None:
    rows = table_rows({}, datasets="ab", seeds=1)
    del rows[0]["functions"]["sentence"]
    cases, stored, _ = read(rows)
    beside = effects(cases, BESIDE)
    assert beside["γ = 0, and sentence f beside it"].sources == ("b",)
    assert beside["sentence f alone"].sources == ("b",)
    assert beside["γ = 0, and reference f beside it"].sources == ("a", "b")
    assert "sentence" not in stored[0]["functions"]


def test_what_the_functions_say_is_that_of_the_newest_row(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.jsonl")
    rows = table_rows({}, datasets="a", seeds=1)
    older = rows[0] | {"functions": {k: rows[0]["functions"][k] for k in FUNCTIONS[:2]}}
    table.append({"environment": ENVIRONMENT})
    for row in [older, *rows[1:]]:
        table.append(row)
    assert "| 0.600, 0.650 | 0.600, 0.650 | – |" in said(table).text
    table.append(rows[0])
    assert "| 0.600, 0.650 | 0.600, 0.650 | 0.600, 0.650 |" in said(table).text


def test_a_case_without_its_baseline_is_left_out() -> None:
    rows = [row for row in table_rows({}, datasets="a", seeds=1) if row.get("variant") != PLAIN]
    assert read(rows) == ([], [], [f"a, seed 0 is left out: there is no whole run of {PLAIN}."])


def test_the_block_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.jsonl"
    assert "Nothing is measured yet" in said(Table(path)).text
    table = Table(path)
    table.append({"environment": ENVIRONMENT})
    for row in table_rows({"f as soft label": 0.8}):
        table.append(row)
    report(Table(path), publish=False)
    *text, last = capsys.readouterr().out.splitlines()
    assert "better than γ = 0: f as soft label; worse: none" in "\n".join(text)
    assert "a CPU" in "\n".join(text)
    assert json.loads(last)["goals"][1]["met"]
