"""The shipped inputs are what README says, and are ready as they are."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
EXAMPLES = ROOT / "examples"
SHARED = ROOT.parent / "shared" / "data"

SUMS = [line.split("  ") for line in (EXAMPLES / "SHA256SUMS").read_text().splitlines()]

# Two prompts that differ in a comma, one of them held out.
OVERLAP = {"hh-harmless", "hh-harmless-raw"}
TEMPLATES = {"comve-reasons"}
"""Prompts of one template, a few words of which vary."""
SHARED_FILES = {
    # name: pairs, prompts, layout, rejected rows by code
    "ai-risk": (2965, 2913, "trl_standard", {}),
    "comve-reasons": (3000, 3000, "trl_standard", {}),
    # One prompt has a form feed where LaTeX had \\frac.
    "dpo-en-demo": (294, 294, "trl_conversational", {"invalid_characters": 1}),
    "gsm8k-solutions": (2407, 1163, "trl_standard", {}),
    "hh-harmless": (2299, 2297, "trl_conversational", {}),
    # Transcripts with an empty turn or two turns of one side in a row.
    "hh-harmless-raw": (
        2299,
        2297,
        "anthropic_hh",
        {"last_turn_differs": 5, "empty_text": 4, "role_order": 4},
    ),
    "pandalm-human": (760, 153, "trl_standard", {}),
    "truthfulqa": (2218, 811, "trl_standard", {}),
}


@pytest.mark.parametrize(("expected", "name"), SUMS)
def test_shipped_files_do_not_change(expected, name):
    assert hashlib.sha256((EXAMPLES / name).read_bytes()).hexdigest() == expected


def test_every_shipped_input_has_its_sum():
    inputs = {
        str(path.relative_to(EXAMPLES))
        for folder in ("data", "models")
        for path in (EXAMPLES / folder).rglob("*")
        if path.is_file() and path.name != "README.md"
    }
    assert inputs == {name for _, name in SUMS}


@pytest.mark.parametrize(
    ("name", "pairs", "prompts", "layout"),
    [
        ("truthfulqa-600.jsonl.gz", 600, 224, "trl_standard"),
        ("hh-harmless-raw-50.jsonl", 50, 50, "anthropic_hh"),
    ],
)
def test_shipped_data_are_ready(run, name, pairs, prompts, layout):
    outcome = run(EXAMPLES / "data" / name)
    assert outcome.result.status == "ready"
    assert (outcome.result.num_pairs, outcome.result.num_prompts) == (pairs, prompts)
    assert outcome.report["detected"]["layout"] == layout


def test_shipped_model_is_safetensors_of_the_stated_size():
    folder = EXAMPLES / "models" / "tiny-lm"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    sizes = [b - a for a, b in (tensor["data_offsets"] for tensor in header.values())]
    assert 2_300_000 < sum(sizes) / 2 < 2_500_000


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger data sets are not here")
@pytest.mark.parametrize("name", SHARED_FILES)
def test_larger_data_sets(run, name):
    pairs, prompts, layout, codes = SHARED_FILES[name]
    outcome = run(SHARED / f"{name}.jsonl.gz")
    assert (outcome.result.num_pairs, outcome.result.num_prompts) == (pairs, prompts)
    assert outcome.report["detected"]["layout"] == layout
    assert outcome.codes == codes
    warned = {check["check"] for check in outcome.report["lint"] if check["level"] == "warn"}
    expected = {"eval_overlap"} if name in OVERLAP else set()
    assert warned == expected | ({"eval_similar"} if name in TEMPLATES else set())
    assert outcome.result.status == ("ready_with_warnings" if codes or warned else "ready")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger data sets are not here")
def test_raw_transcripts_give_the_converted_pairs(run):
    # The converted file has no blanks at the ends of lines.
    def pairs(name):
        return {
            tuple(re.sub(r"[ \t]+(?=\n)", "", m.content) for m in row.prompt + row.chosen)
            for row in run(SHARED / f"{name}.jsonl.gz").rows
        }

    raw, converted = pairs("hh-harmless-raw"), pairs("hh-harmless")
    assert len(raw) > 2000
    assert raw == converted


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger data sets are not here")
def test_shipped_pairs_are_pairs_of_the_source():
    source = set(gzip.decompress((SHARED / "truthfulqa.jsonl.gz").read_bytes()).splitlines())
    shipped = gzip.decompress((EXAMPLES / "data" / "truthfulqa-600.jsonl.gz").read_bytes())
    assert set(shipped.splitlines()) <= source
