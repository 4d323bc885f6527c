"""What `make bench-selection` still has to measure, and that its runs do not touch each other."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.report import ROOT
from bench.selection import DATASETS, SHUFFLES, TINY, Progress, Source, find, measured, missing
from bench.selection_cases import (
    BUDGET,
    PAIRS,
    PLAIN,
    OpenCase,
    claims,
    metrics_version,
    objectives,
    open_case,
    recommender_version,
)
from bench.train_report import Table
from core.run_spec import LoraSpec
from core.spec import KernelName
from tests.unit.selection.samples import profile
from worker.training.model import load_policy

SOURCE = Source("made-up", Path("made-up.jsonl"), "0")
AT = {"data": "made-up", "sha256": "0", "seed": 0}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "table.jsonl")


def run(pair: str, **changed: Any) -> dict[str, Any]:
    return {"kind": "run", **AT, "budget": BUDGET, "pair": pair, **changed}


def test_an_empty_table_lacks_everything(table: Table) -> None:
    todo = missing(table, SOURCE, seed=0)
    assert todo.runs == (PLAIN, *PAIRS)
    assert len(todo.runs) == 29
    assert (todo.profile, todo.shuffles) == (True, True)
    assert not missing(table, SOURCE, seed=1).shuffles


def test_what_is_kept_is_not_measured_again(tmp_path: Path, table: Table) -> None:
    for pair in (PLAIN, PAIRS[3]):
        table.append(run(pair))
    table.append({"kind": "case", **AT, "budget": BUDGET, "metrics": metrics_version()})
    table.append(
        {"kind": "shuffles", **AT, "recommender": recommender_version(), "shuffles": SHUFFLES}
    )
    todo = missing(Table(tmp_path / "table.jsonl"), SOURCE, seed=0)
    assert todo.runs == tuple(name for name in PAIRS if name != PAIRS[3])
    assert (todo.profile, todo.shuffles) == (False, False)


def test_other_bytes_budgets_and_code_are_measured_anew(table: Table) -> None:
    for pair in (PLAIN, *PAIRS):
        table.append(run(pair))
    assert not missing(table, SOURCE, seed=0).runs
    assert len(missing(table, replace(SOURCE, sha256="1"), seed=0).runs) == 29
    assert len(missing(table, SOURCE, seed=1).runs) == 29
    table.append({"kind": "case", **AT, "budget": BUDGET, "metrics": "older"})
    assert missing(table, SOURCE, seed=0).profile
    table.rows[0]["budget"] = BUDGET | {"steps": 1}
    assert missing(table, SOURCE, seed=0).runs == (PLAIN,)


def test_the_usual_datasets_are_taken_where_they_are(tmp_path: Path) -> None:
    for name in ("other.jsonl", f"{DATASETS[1]}.jsonl.gz", f"{DATASETS[0]}.jsonl"):
        (tmp_path / name).write_bytes(name.encode())
    assert [source.name for source in find(tmp_path, None)] == list(DATASETS[:2])
    assert [source.name for source in find(tmp_path, ["other"])] == ["other"]


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").touch()
    assert [source.name for source in find(tmp_path, None)] == ["other"]
    with pytest.raises(SystemExit, match=r"has \['other'\], asked for \['mine'\]"):
        find(tmp_path, ["mine"])
    with pytest.raises(SystemExit, match=r"has \[\]"):
        find(tmp_path / "nowhere", None)


def test_time_left_is_of_each_datasets_own_runs(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress({"short": 3, "long": 2})
    progress.tell({**run("dpo", seconds=60.0, losses=None), "data": "short"})
    assert progress.minutes_left() == 4.0, "nothing is known of `long` yet"
    progress.tell({**run("dpo", seconds=600.0, losses=[0.5], log_loss=0.5), "data": "long"})
    assert progress.minutes_left() == 2 * 1 + 1 * 10
    assert "run 2/5, 12 min left" in capsys.readouterr().out


def test_all_pairs_have_the_same_strengths() -> None:
    specs = objectives()
    assert specs.pop(PLAIN).is_plain_dpo
    strengths = set()
    for name, spec in specs.items():
        assert spec.kernel_term is not None
        assert spec.divergence_term is not None
        assert name == f"{spec.kernel_name} × {spec.divergence_name}"
        assert spec.divergence_term.mode == "penalty"
        strengths.add((spec.beta, spec.kernel_term.gamma, spec.divergence_term.alpha))
    assert len(strengths) == 1


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> OpenCase:
    """Sixty shipped pairs, two steps a run."""
    folder = tmp_path_factory.mktemp("selection")
    with gzip.open(ROOT / "examples" / "data" / "truthfulqa-600.jsonl.gz") as shipped:
        lines = [next(shipped) for _ in range(60)]
    (folder / "sixty.jsonl").write_bytes(b"".join(lines))
    policy = load_policy(TINY, lora=LoraSpec(), device=torch.device("cpu"))
    opened = open_case(policy, folder / "sixty.jsonl", seed=0, scratch=folder / "case")
    assert opened.plan.total_steps == BUDGET["steps"]
    return replace(opened, plan=replace(opened.plan, total_steps=2))


def test_a_run_does_not_depend_on_those_before_it(case: OpenCase) -> None:
    specs = objectives()
    first = case.run(specs[PLAIN])
    other = case.run(specs["spectral × wasserstein"])
    again = case.run(specs[PLAIN])
    assert first["losses"] == again["losses"]
    assert first["losses"] != other["losses"]
    assert len(first["losses"]) == len(case.about["group"]) == len(case.validation)
    assert first["log_loss"] == pytest.approx(sum(first["losses"]) / len(case.validation), abs=1e-5)


def test_what_is_measured_is_what_was_missing(case: OpenCase, tmp_path: Path, table: Table) -> None:
    todo = replace(missing(table, SOURCE, seed=0), runs=(PLAIN,), shuffles=False)
    for row in measured(case, todo):
        table.append(row)
    left = missing(Table(tmp_path / "table.jsonl"), SOURCE, seed=0)
    assert (left.profile, left.runs) == (False, PAIRS)


def test_labels_by_lot_are_counted(case: OpenCase) -> None:
    found = case.shuffles(3)
    leads = ("separated", "kernel_separated", "divergence_separated", "kernels_separated")
    assert set(found) == {*leads, "claims", "predicts"}
    assert max(found[name] for name in leads) <= found["claims"] <= 3


def test_a_lead_of_any_kind_is_a_claim() -> None:
    kpa = {KernelName.RBF: 0.9}
    assert not any(claims(profile(default_kpa=0.5)).values())
    found = claims(profile(kpa=kpa, default_kpa=0.55, half=0.001))
    assert (found["kernels_separated"], found["claims"], found["predicts"]) == (True, True, True)
