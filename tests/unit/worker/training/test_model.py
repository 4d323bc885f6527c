import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import FailureCode, RunAborted
from core.run_spec import LoraSpec
from tests.unit.worker.training.micro import (
    TINY_LM,
    Bench,
    ignore_progress,
    micro_policy,
    random_pairs,
)
from worker.training import reference
from worker.training.generate import stop_tokens
from worker.training.model import load_policy
from worker.training.reference import (
    model_sha256,
    reference_key,
    reference_table,
    tokenizer_sha256,
    tokens_sha256,
)

CPU = torch.device("cpu")


def load(folder: Path) -> None:
    load_policy(folder, lora=LoraSpec(), device=CPU)


def refused(folder: Path) -> str:
    with pytest.raises(RunAborted) as caught:
        load(folder)
    assert caught.value.failure is FailureCode.MODEL_NOT_FOUND
    return caught.value.message


@pytest.fixture
def copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


@pytest.mark.parametrize("architecture", ["llama_folder", "gpt2_folder"])
def test_only_the_adapter_is_trained_and_the_head_has_none(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    policy = micro_policy(request.getfixturevalue(architecture))
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == set(policy.adapter())
    assert not any("lm_head" in name for name in trained)
    per_layer = 7 if architecture == "llama_folder" else 4
    assert len(trained) == 2 * 2 * per_layer
    assert not policy.model.training


def test_resetting_is_a_function_of_the_seed(llama_folder: Path) -> None:
    policy = micro_policy(llama_folder)
    policy.reset_adapter(1)
    first = {n: p.detach().clone() for n, p in policy.adapter().items()}
    with torch.no_grad():
        for parameter in policy.adapter().values():
            parameter.add_(1.0)
    policy.reset_adapter(2)
    assert any(not torch.equal(first[n], p) for n, p in policy.adapter().items())
    policy.reset_adapter(1)
    for name, parameter in policy.adapter().items():
        assert torch.equal(first[name], parameter)
        assert bool((parameter == 0).all()) == ("lora_B" in name)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickled weights only (pytorch_model.bin)" in refused(copy)


def test_missing_files_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be loaded" in refused(copy)


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(copy)


def test_broken_numbers_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "NaN or infinity in model.norm.weight" in refused(copy)


def test_a_model_without_tokenizer_is_refused(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink()
    assert "tokenizer" in refused(copy)


def test_the_example_model_loads() -> None:
    policy = load_policy(TINY_LM, lora=LoraSpec(), device=CPU)
    assert (policy.hidden_size, policy.max_positions) == (192, 1024)
    assert policy.head.weight.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama_folder", "gpt2_folder"])
def test_positions_are_known_by_either_name(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    assert micro_policy(request.getfixturevalue(architecture)).max_positions == 128


def test_stop_tokens_may_be_one_several_or_none() -> None:
    assert stop_tokens(2, [7, 2, 5]) == [2, 5, 7]
    assert stop_tokens(None, 4) == [4]
    assert stop_tokens(None, None) is None


# ------------------------------------------------------- the reference on disk


def test_the_token_sample_is_even_over_all_batches(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "FORWARD_TOKENS", 40)
    everything = reference.compute_reference(bench.policy, bench.pairs, progress=ignore_progress)
    tokens = everything.token_log_probs
    monkeypatch.setattr(reference, "TOKEN_SAMPLE", len(tokens) // 5)
    sample = reference.compute_reference(bench.policy, bench.pairs, progress=ignore_progress)
    stride = -(-len(tokens) // (len(tokens) // 5))
    assert torch.equal(sample.token_log_probs, tokens[::stride])


def key_of(bench: Bench, folder: Path) -> str:
    return reference_key(
        model=model_sha256(folder), tokenizer=tokenizer_sha256(folder),
        tokens=tokens_sha256(bench.pairs), device=CPU,
    )  # fmt: skip


def test_a_stored_reference_is_used_again_until_it_is_damaged(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    compute = reference.compute_reference

    def counted(*arguments: object, **options: object) -> reference.ReferenceTable:
        passes.append(1)
        return compute(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "compute_reference", counted)

    def table() -> reference.ReferenceTable:
        return reference_table(
            bench.policy, bench.pairs, folder=tmp_path, key="k" * 64, progress=ignore_progress
        )

    first, again = table(), table()
    assert len(passes) == 1
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    mended = table()
    assert len(passes) == 2
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, mended.tensors()[name])
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_the_reference_key_depends_on_weights_tokenizer_and_tokens(
    bench: Bench, llama_folder: Path, copy: Path
) -> None:
    key = key_of(bench, llama_folder)
    assert key_of(bench, copy) == key, "content counts, not the folder"
    other = Bench(bench.policy, random_pairs(12, seed=1))
    assert key_of(other, llama_folder) != key
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    weights = key_of(bench, copy)
    (copy / "chat_template.jinja").write_text("{{ 1 }}")
    assert len({key, weights, key_of(bench, copy)}) == 3
