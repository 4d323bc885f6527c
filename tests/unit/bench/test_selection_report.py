"""The report of `make bench-selection` on made-up tables: what is counted, met and left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.selection_cases import BUDGET, PAIRS, PLAIN, by_lot, pair_name, recommender_version
from bench.selection_read import read
from bench.selection_report import block, confidence, goals, report, statistics
from bench.train_report import Table
from core.spec import KernelName
from selection.prior import NOTHING_KNOWN
from selection.recommender import recommend
from tests.unit.selection.samples import features, profile

Row = dict[str, Any]
PROMPTS = 30
# Kernels and divergences are told apart, so that nothing but equal priors ties.
PROFILE = profile(
    kpa={KernelName.RBF: 0.8, KernelName.SPECTRAL: 0.75, KernelName.MAHALANOBIS: 0.65}, half=0.001
)
SCORES = {
    pair_name(entry.kernel, entry.divergence): entry.score.value
    for entry in recommend(PROFILE, prior=NOTHING_KNOWN).ranking
}
BEST_FIRST = [name for name in SCORES if name in PAIRS]
ENVIRONMENT = {
    "cpu": "a CPU", "threads": 1, "cores": 1, "torch": "2", "transformers": "5", "peft": "0",
    "python": "3",
}  # fmt: skip


def rows_of(data: str, seed: int, loss_of: Callable[[str], float]) -> list[Row]:
    """A whole case in which plain DPO has a log-loss of 0.6."""
    at = {"data": data, "sha256": "0", "seed": seed, "budget": BUDGET}
    about = {
        "metrics": "made up", "train_pairs": 100, "group": list(range(PROMPTS)),
        "profile": PROFILE.model_dump(mode="json"),
    }  # fmt: skip
    noise = np.random.default_rng(seed).normal(scale=0.1, size=PROMPTS)
    noise -= noise.mean()

    def run(name: str, loss: float) -> Row:
        return {
            "kind": "run", **at, "pair": name, "losses": list(loss + noise), "drift": 0.1,
            "ended_by": "budget",
        }  # fmt: skip

    pairs = [run(name, loss_of(name)) for name in PAIRS]
    return [{"kind": "case", **at, **about}, run(PLAIN, 0.6), *pairs]


def table_rows(
    loss_of: Callable[[str], float], *, datasets: str = "abcd", seeds: int = 2
) -> list[Row]:
    rows = [rows_of(data, seed, loss_of) for data in datasets for seed in range(seeds)]
    return [row for part in rows for row in part]


def as_scored(name: str) -> float:
    return 0.5 - 0.01 * SCORES[name]


def against_scores(name: str) -> float:
    return 0.5 + 0.01 * SCORES[name]


def shuffles(number: int, claims: int, *, version: str | None = None) -> Row:
    return {
        "kind": "shuffles", "data": "a", "recommender": version or recommender_version(),
        "shuffles": number, "claims": claims, "predicts": claims,
    }  # fmt: skip


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {goal["name"].split()[0]: goal for goal in goals(read(rows)[0], rows)}


def test_training_that_follows_the_scores_meets_the_goals() -> None:
    rows = [*table_rows(as_scored), shuffles(200, 2)]
    found = by_name(rows)
    assert found["Kendall"]["measured"] == 1.0
    assert found["best"]["measured"] == 1.0
    assert found["false"]["measured"] == 0.01
    assert all(goal["met"] for goal in found.values())
    said = statistics(read(rows)[0])
    assert said["rank of the recommended pair (by chance 14.5)"].value == pytest.approx(1.0, abs=1)
    assert said["regret of the recommended pair"].value == pytest.approx(0.0, abs=1e-9)
    assert said["recommended − random pair"].value < 0.0
    assert said["τ between trained rankings of two seeds"].value == pytest.approx(1.0)


def test_training_against_the_scores_meets_none_and_is_written_as_it_is() -> None:
    # Of two datasets one is left to fit a prior on, which is too few: the metrics rank alone.
    rows = [*table_rows(against_scores, datasets="ab"), shuffles(100, 6)]
    found = by_name(rows)
    assert found["Kendall"]["measured"] == -1.0
    assert (found["best"]["measured"], found["false"]["measured"]) == (0.0, 0.06)
    assert not any(goal["met"] for goal in found.values())
    said = statistics(read(rows)[0])
    assert said["regret of the recommended pair"].value == pytest.approx(
        0.01 * (max(SCORES[n] for n in PAIRS) - min(SCORES[n] for n in PAIRS))
    )
    assert said["regret of plain DPO"].value == pytest.approx(
        0.6 - (0.5 + 0.01 * min(SCORES[n] for n in PAIRS))
    )


@pytest.mark.parametrize(("datasets", "seeds"), [("abc", 2), ("abcd", 1)])
def test_a_goal_is_not_met_on_too_few_cases(datasets: str, seeds: int) -> None:
    rows = table_rows(as_scored, datasets=datasets, seeds=seeds)
    assert by_name(rows)["Kendall"] | {"interval": None} == {
        "name": "Kendall τ of the 28 pairs", "target": ">= 0.3", "measured": 1.0,
        "interval": None, "met": False,
    }  # fmt: skip


def test_a_case_with_a_run_missing_is_named_and_not_counted() -> None:
    rows = table_rows(as_scored, datasets="ab")
    rows.remove(next(r for r in rows if r.get("pair") == BEST_FIRST[0] and r["seed"] == 1))
    found, told = read(rows)
    assert [(each.case.data, each.case.seed) for each in found] == [("a", 0), ("b", 0), ("b", 1)]
    assert told == ["a, seed 1: 1 of 29 runs are missing."]


def test_rows_of_another_budget_are_not_looked_at() -> None:
    rows = [row | {"budget": BUDGET | {"steps": 1}} for row in table_rows(as_scored)]
    assert read(rows) == ([], [])


def test_metrics_of_other_fields_are_missing_metrics() -> None:
    rows = rows_of("a", 0, as_scored)
    rows[0] = rows[0] | {"profile": {"pairs": 3}}
    assert read(rows) == ([], ["a, seed 0: the metrics are missing, or too old to be read."])


def test_metrics_measured_again_stand_above_the_first() -> None:
    rows = rows_of("a", 0, as_scored)
    rows.append(rows[0] | {"train_pairs": 7})
    assert read(rows)[0][0].train_pairs == 7


def test_a_run_that_broke_down_counts_as_nothing_learned() -> None:
    rows = rows_of("a", 0, as_scored)
    worst = next(row for row in rows if row.get("pair") == BEST_FIRST[0])
    worst |= {"losses": None, "ended_by": "nan"}
    del worst["drift"]
    case = read(rows)[0][0].case
    assert case.trained[PAIRS.index(BEST_FIRST[0])] == pytest.approx(np.log(2))
    assert "kl" in block_of(rows)


def test_losses_of_other_pairs_than_the_cases_are_refused() -> None:
    rows = rows_of("a", 0, as_scored)
    rows[3]["losses"] = rows[3]["losses"][1:]
    with pytest.raises(RuntimeError, match="29 losses and the case 30 validation pairs"):
        read(rows)


def test_shuffles_of_an_older_recommender_do_not_count() -> None:
    assert confidence([shuffles(100, 50, version="older")]) == {}
    rows = [shuffles(100, 50, version="older"), shuffles(100, 1)]
    assert confidence(rows)["false confidence on shuffled labels"].value == 0.01


def block_of(rows: list[Row]) -> str:
    table = Table(Path("/nonexistent/table.jsonl"))
    table.rows = [{"environment": ENVIRONMENT}, *rows]
    return block(table)


def test_the_block_says_what_is_old_and_lists_every_case() -> None:
    text = block_of([*table_rows(as_scored), shuffles(100, 0)])
    assert "The metrics of 8 cases were measured by an earlier version of them." in text
    for data in "abcd":
        assert text.count(f"\n| {data} | ") == 2
    assert "| best pair in the recommended top 10 | >= 0.7 | 1.0 [0.676, 1.0] | yes |" in text


def test_an_empty_table_says_so(tmp_path: Path) -> None:
    assert "Nothing is measured yet" in block(Table(tmp_path / "none.jsonl"))


def test_the_last_line_is_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(tmp_path / "table.jsonl")
    for row in [{"environment": ENVIRONMENT}, *table_rows(as_scored), shuffles(100, 0)]:
        table.append(row)
    report(Table(tmp_path / "table.jsonl"), publish=False)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [goal["met"] for goal in last["goals"]] == [True, True, True]
    assert set(last["goals"][0]) == {"name", "target", "measured", "interval", "met"}


def test_labels_by_lot_exchange_half_of_the_pairs_and_keep_them_whole() -> None:
    data = features(400, signal=2.0)
    swapped = by_lot(data, torch.Generator().manual_seed(0))
    moved = (swapped.chosen_embedding != data.chosen_embedding).any(-1)
    assert 0.4 < moved.float().mean() < 0.6
    for chosen, rejected in (
        ("chosen_embedding", "rejected_embedding"),
        ("chosen_log_prob", "rejected_log_prob"),
        ("chosen_tokens", "rejected_tokens"),
    ):
        before = [getattr(data, name) for name in (chosen, rejected)]
        after = [getattr(swapped, name) for name in (chosen, rejected)]
        assert torch.equal(after[0][moved], before[1][moved])
        assert torch.equal(after[1][moved], before[0][moved])
        assert torch.equal(after[0][~moved], before[0][~moved])
    assert torch.equal(swapped.prompt_embedding, data.prompt_embedding)
