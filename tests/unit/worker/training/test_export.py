import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import FailureCode, RunAborted
from core.modelref import ModelRef
from core.results import Evaluation
from core.spec import KernelTerm, MixtureKernelSpec, ObjectiveSpec
from tests.unit.worker.training.micro import Bench, Recorder
from worker.ingest.canonical import Message, Pair, Role, Split, canonical_row
from worker.training.evaluate import same_objective
from worker.training.export import CardFacts, export_adapter, export_merged
from worker.training.folders import SealedFolder, open_sealed
from worker.training.generate import generate_samples

HMK = ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec(), gamma=0.3))


def facts(folder: Path, weights: dict[str, float] | None = None) -> CardFacts:
    return CardFacts(
        label="final",
        base=ModelRef(name="micro", source="local", path=folder),
        objective=HMK,
        training={"learning_rate": 0.01},
        model_sha256="a" * 64,
        tokenizer_sha256="b" * 64,
        dataset_sha256="d" * 64,
        seed=7,
        evaluation=Evaluation(
            log_loss=0.61, temperature=2.0, accuracy=0.7, accuracy_length_normalized=0.6,
            calibration_error=0.05, drift=0.02, chosen_displacement=-0.3, pairs=12, prompts=6,
        ),
        comparison=same_objective(),
        recommendation="rec_1",
        mixture_weights=weights,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(
    bench: Bench, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SealedFolder, torch.Tensor, dict[str, float]]:
    """A checkpoint, the trained policy's log-probs on a sequence, its mixture weights."""
    outcome = bench.train(HMK, hooks=Recorder(), total_steps=12, learning_rate=0.02)
    assert outcome.mixture_weights is not None
    tokens = torch.tensor([[*bench.pairs[0].prompt, *bench.pairs[0].chosen]])
    with torch.no_grad():
        expected = bench.policy.model(input_ids=tokens).logits.log_softmax(-1)
    sealed = export_adapter(
        bench.policy,
        tmp_path_factory.mktemp("export") / "final",
        token="1-final",
        facts=facts(llama_folder, outcome.mixture_weights),
    )
    return sealed, expected, outcome.mixture_weights


def quietly_loaded(loader: type, folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft, about transformers
        model: torch.nn.Module = loader.from_pretrained(folder)  # type: ignore[attr-defined]
    return model.eval()


def log_probs(model: torch.nn.Module, bench: Bench) -> torch.Tensor:
    tokens = torch.tensor([[*bench.pairs[0].prompt, *bench.pairs[0].chosen]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits.log_softmax(-1)
    return found


def test_plain_peft_loads_the_very_policy(
    bench: Bench, exported: tuple[SealedFolder, torch.Tensor, dict[str, float]]
) -> None:
    sealed, expected, _ = exported
    model = quietly_loaded(AutoPeftModelForCausalLM, sealed.path)
    torch.testing.assert_close(log_probs(model, bench), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), bench.policy.as_reference():
        base = log_probs(bench.policy.model, bench)
    assert not torch.allclose(base, expected, atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(sealed.path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert answer.shape[1] > prompt["input_ids"].shape[1]


def test_merged_weights_are_the_same_model(
    bench: Bench,
    llama_folder: Path,
    tmp_path: Path,
    exported: tuple[SealedFolder, torch.Tensor, dict[str, float]],
) -> None:
    sealed, expected, _ = exported
    merged = export_merged(
        llama_folder, sealed.path, tmp_path / "merged", token="1", about={"label": "merged"}
    )
    model = quietly_loaded(AutoModelForCausalLM, merged.path)
    torch.testing.assert_close(log_probs(model, bench), expected, rtol=1e-4, atol=1e-4)
    names = {p.name for p in merged.path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "manifest.json"} <= names
    assert not any(name.startswith("adapter") for name in names)
    open_sealed(merged.path, manifest_name="manifest.json")


def test_the_folder_says_what_it_is(
    llama_folder: Path, exported: tuple[SealedFolder, torch.Tensor, dict[str, float]]
) -> None:
    sealed, _, weights = exported
    folder = sealed.path
    names = {p.name for p in folder.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md",
        "training_config.json", "manifest.json", "SHA256SUMS",
    } <= names  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama_folder)
    training = json.loads((folder / "training_config.json").read_text())
    assert training["mixture_weights"] == pytest.approx(weights)
    assert training["objective"]["kernel_term"]["kernel"]["type"] == "hmk"
    card = (folder / "README.md").read_text()
    assert "base_model:" not in card, "the base is a folder of this machine"
    says = ("d" * 64, "rec_1", "0.6100", "| Seed | 7 |", "torch 2", "own baseline")
    assert [said for said in says if said not in card] == []
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    assert len(sums) == len(names) - 2
    for line in sums:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {entry["path"] for entry in manifest["files"]} == names - {"manifest.json"}
    assert {entry["path"] for entry in sealed.all_files} == names
    assert manifest["base_model"]["path"] == str(llama_folder)
    assert all((folder / name).stat().st_mode & 0o777 == 0o644 for name in names)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_broken_weights_are_never_published(
    bench: Bench, llama_folder: Path, tmp_path: Path
) -> None:
    bench.policy.reset_adapter(0)
    first = next(iter(bench.policy.adapter().values()))
    with torch.no_grad():
        first[0, 0] = float("inf")
    with pytest.raises(RunAborted, match="not published") as caught:
        export_adapter(bench.policy, tmp_path / "x", token="1", facts=facts(llama_folder))
    assert caught.value.failure is FailureCode.LOSS_NAN
    assert list(tmp_path.iterdir()) == []


def test_samples_answer_different_prompts_with_and_without_the_adapter(bench: Bench) -> None:
    bench.train(HMK, hooks=Recorder(), total_steps=12, learning_rate=0.05)
    rows = [
        canonical_row(
            Pair(
                prompt=(Message(Role.USER, prompt),), chosen=(Message(Role.ASSISTANT, answer),),
                rejected=(Message(Role.ASSISTANT, "no"),), margin=None, source="t", meta={},
            ),
            line=1, split=Split.TEST,
        )
        for prompt, answer in (("One?", "a"), ("One?", "b"), ("Two?", "c"), ("Long? " * 200, "d"))
    ]  # fmt: skip
    samples = generate_samples(bench.policy, rows, max_length=128)
    assert [s.prompt for s in samples] == ["One?", "Two?", "Long? " * 200]
    assert any(s.base != s.aligned for s in samples)
    assert samples == generate_samples(bench.policy, rows, max_length=128)
