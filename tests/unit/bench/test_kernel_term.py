"""What `make bench-kernel-term` still has to measure, and what its variants make of f."""

import gzip
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.kernel_cases import (
    BUDGET,
    PLAIN,
    VARIANTS,
    FunctionObjective,
    SoftLabelObjective,
    about,
    functions,
    label_posterior,
    prepared,
    run,
    scaled,
    versions,
)
from bench.kernel_function import PreferenceFunction
from bench.kernel_term import measured, missing, todos
from bench.report import ROOT
from bench.selection import TINY, Source
from bench.selection_cases import OpenCase, open_case
from bench.train_report import Table
from core.run_spec import LoraSpec
from core.spec import ObjectiveSpec
from objectives import PairEmbeddings, PreferenceBatch, build_objective
from worker.training.model import load_policy

SOURCE = Source("made-up", Path("made-up.jsonl"), "0")
AT = {"data": "made-up", "sha256": "0", "seed": 0, "budget": BUDGET}
CHOSEN, REJECTED = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-0.5, 1.0, 1.0])


def batch(values: list[float]) -> PreferenceBatch:
    constant = torch.tensor(values).unsqueeze(-1)
    zeros = torch.zeros_like(constant)
    return PreferenceBatch(
        log_ratio_chosen=CHOSEN,
        log_ratio_rejected=REJECTED,
        embeddings=PairEmbeddings(zeros, constant, zeros),
        token_divergence=None,
    )


def test_constants_enter_the_margin() -> None:
    values = [1.0, -2.0, 0.0]
    found = FunctionObjective(beta=0.1, gamma=0.5)(batch(values)).loss
    margins = [0.1 * 1.0 + 0.5, 0.1 * -2.0 - 1.0, 0.1 * 1.0]
    assert found.tolist() == pytest.approx([math.log1p(math.exp(-z)) for z in margins])


def test_soft_labels_are_the_cross_entropy() -> None:
    labels = [1.0, 0.3, 0.5]
    found = SoftLabelObjective(beta=0.1)(batch(labels)).loss
    margins = [0.1 * 1.0, 0.1 * -2.0, 0.1 * 1.0]
    by_hand = [
        q * math.log1p(math.exp(-z)) + (1 - q) * math.log1p(math.exp(z))
        for q, z in zip(labels, margins, strict=True)
    ]
    assert found.tolist() == pytest.approx(by_hand)


def test_certain_labels_and_constants_of_zero_are_plain_dpo() -> None:
    plain = build_objective(ObjectiveSpec(beta=0.1), geometry=None, head=None)(batch([0.0] * 3))
    soft = SoftLabelObjective(beta=0.1)(batch([1.0] * 3))
    none = FunctionObjective(beta=0.1, gamma=1.0)(batch([0.0] * 3))
    torch.testing.assert_close(soft.loss, plain.loss)
    torch.testing.assert_close(none.loss, plain.loss)


def test_soft_labels_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="the batch has none"):
        SoftLabelObjective(beta=0.1)(replace(batch([0.0] * 3), embeddings=None))


def test_the_posterior_is_bayes_rule() -> None:
    prior = torch.tensor([0.5, 0.9, 0.2])
    found = label_posterior(torch.logit(prior), noise=0.2)
    torch.testing.assert_close(found, 0.8 * prior / (0.8 * prior + 0.2 * (1 - prior)))


def kept(variant: str, *, points: int = 2, **changed: Any) -> dict[str, Any]:
    row = {"kind": "run", **AT, "variant": variant, "version": versions()[variant]}
    return {**row, "ended_by": "budget", "points": [{}] * points, **changed}


def test_an_empty_table_lacks_everything_and_what_is_kept_is_not_measured(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.jsonl")
    assert missing(table, SOURCE, seed=0) == tuple(VARIANTS)
    table.append({"environment": {}})
    table.append(kept(PLAIN))
    table.append(kept("f as weight", version="older"))
    table.append(kept("f as offset", points=1))
    table.append(kept("f as target margin", points=0, ended_by="nan"))
    found = ("f as target margin", PLAIN)
    assert missing(table, SOURCE, seed=0) == tuple(v for v in VARIANTS if v not in found)
    assert len(missing(table, SOURCE, seed=1)) == len(VARIANTS)
    assert len(missing(table, replace(SOURCE, sha256="1"), seed=0)) == len(VARIANTS)


def test_every_dataset_of_a_seed_comes_before_the_next_seed(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.jsonl")
    table.append(kept(PLAIN))
    other = Source("other", Path("other.jsonl"), "1")
    names = (PLAIN, "f as weight")
    found = todos(table, [SOURCE, other], seeds=(0, 1), variants=names)
    assert [(each.source.name, each.seed) for each in found] == [
        ("made-up", 0), ("other", 0), ("made-up", 1), ("other", 1),
    ]  # fmt: skip
    assert [each.variants for each in found] == [names[1:], names, names, names]
    assert todos(table, [SOURCE], seeds=(0,), variants=(PLAIN,)) == []


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> OpenCase:
    """Forty-eight training pairs of the shipped ones, two steps a run."""
    folder = tmp_path_factory.mktemp("kernel")
    with gzip.open(ROOT / "examples" / "data" / "truthfulqa-600.jsonl.gz") as shipped:
        lines = [next(shipped) for _ in range(80)]
    (folder / "eighty.jsonl").write_bytes(b"".join(lines))
    policy = load_policy(TINY, lora=LoraSpec(), device=torch.device("cpu"))
    opened = open_case(
        policy, folder / "eighty.jsonl", seed=0, scratch=folder / "case", steps=2,
        train_pairs=48, validation_pairs=12,
    )  # fmt: skip
    assert (len(opened.data.pairs), len(opened.validation)) == (48, 12)
    return opened


@pytest.fixture(scope="module")
def found(case: OpenCase) -> dict[str, PreferenceFunction]:
    return functions(case)


def test_a_run_is_the_products_and_does_not_depend_on_those_before_it(
    case: OpenCase, found: dict[str, PreferenceFunction]
) -> None:
    first = run(case, VARIANTS[PLAIN], found)
    other = run(case, VARIANTS["f as soft label"], found)
    again = run(case, VARIANTS[PLAIN], found)
    assert first["points"] == again["points"]
    assert first["points"] != other["points"]
    assert [point["scale"] for point in first["points"]] == [0.6, 1.0]
    score = case.run(ObjectiveSpec(beta=BUDGET["beta"]))
    assert first["points"][-1]["drift"] == pytest.approx(score["drift"], rel=1e-6)


def test_a_scaled_adapter_goes_straight_back_to_the_reference(
    case: OpenCase, found: dict[str, PreferenceFunction]
) -> None:
    near, end = run(case, VARIANTS[PLAIN], found)["points"]
    assert near["drift"] == pytest.approx(0.36 * end["drift"], rel=0.05)
    np.testing.assert_allclose(near["margins"], 0.6 * np.array(end["margins"]), atol=0.02)
    trained = {name: p.detach().clone() for name, p in case.policy.adapter().items()}
    with scaled(case.policy, 0.0):
        score = case.score()
        assert score is not None
        assert score.drift == pytest.approx(0.0, abs=1e-9)
    for name, parameter in case.policy.adapter().items():
        assert torch.equal(parameter, trained[name])


def test_what_each_variant_is_given(case: OpenCase, found: dict[str, PreferenceFunction]) -> None:
    log_odds = found["reference"].train_log_odds.float()
    assert found["reference"].temperature > 0
    given: dict[str, Any] = {name: prepared(case, v, found)[1] for name, v in VARIANTS.items()}

    def constant(name: str) -> torch.Tensor:
        embeddings = given[name].frozen_embeddings
        return (embeddings.chosen - embeddings.rejected).squeeze(-1)

    torch.testing.assert_close(constant("f as offset"), log_odds)
    torch.testing.assert_close(constant("f as target margin"), -log_odds)
    torch.testing.assert_close(constant("f as soft label"), label_posterior(log_odds))
    dealt = constant("f by lot as soft label")
    labels = label_posterior(log_odds)
    assert not torch.equal(dealt, labels)
    torch.testing.assert_close(dealt.sort().values, labels.sort().values)
    weights = torch.tensor([pair.weight for pair in given["f as weight"].pairs])
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(weights.argsort(), log_odds.argsort())
    for name in (PLAIN, "kernel term, γ = 1"):
        assert given[name] is case.data


def test_rows_are_those_that_were_missing(
    case: OpenCase, found: dict[str, PreferenceFunction]
) -> None:
    names = ("kernel term, γ = 1", "f as offset")
    rows = list(measured(case, SOURCE, names, known=False))
    assert [row["kind"] for row in rows] == ["case", "run", "run"]
    assert [row["variant"] for row in rows[1:]] == list(names)
    assert all(row["ended_by"] == "budget" for row in rows[1:])
    assert [row["kind"] for row in measured(case, SOURCE, names[1:], known=True)] == ["run"]
    told = about(case, found)
    assert len(told["prompt"]) == len(told["functions"]["lexical"]["log_odds"]) == 12
