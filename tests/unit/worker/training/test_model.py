import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import FailureCode, RunAborted
from core.run_spec import LoraSpec
from tests.unit.worker.training.micro import (
    TINY_LM,
    micro_policy,
)
from worker.training.generate import stop_tokens
from worker.training.model import load_policy

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
