"""Reward models: what they are given to read, what they say, which folders are none."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from core.errors import InvalidInput, RunAborted
from tests.unit.worker.training.micro import TINY_LM
from worker.ingest.canonical import Message, Role
from worker.training.reward import RewardModel, load_reward_model

CPU = torch.device("cpu")
PROMPT = (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "What is two and two?"))
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


def llama(folder: Path, *, positions: int = 512, template: str | None = TEMPLATE) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM, local_files_only=True)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=positions,
        eos_token_id=1, pad_token_id=0, bos_token_id=None, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """An encoder, which reads pairs and whose tokenizer has no chat template."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "four", "what", "is", "be"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=12)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(judge: RewardModel, prompt: tuple[Message, ...], answer: str) -> dict[str, list[int]]:
    """What the model's forward pass is given, and that its reward is of that."""
    seen: list[dict[str, Any]] = []
    hook = judge.model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given), with_kwargs=True
    )
    judge.reward(prompt, answer)
    hook.remove()
    return {name: value[0].tolist() for name, value in seen[0].items()}


def test_a_conversation_is_read_by_the_models_own_template(tmp_path: Path) -> None:
    folder = llama(tmp_path / "judge")
    judge = load_reward_model(folder, device=CPU)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "system: Be brief.\nuser: What is two and two?\nassistant: Four.\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert read(judge, PROMPT, "Four.")["input_ids"] == ids
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert judge.reward(PROMPT, "Four.") == pytest.approx(expected, rel=1e-6)
    assert judge.reward(PROMPT, "Five, or so.") != judge.reward(PROMPT, "Four.")


def test_what_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    judge = load_reward_model(llama(tmp_path / "judge", positions=8), device=CPU)
    whole = load_reward_model(llama(tmp_path / "whole"), device=CPU)
    assert judge.max_tokens == 8
    ids = read(judge, PROMPT, "Four.")["input_ids"]
    assert ids == read(whole, PROMPT, "Four.")["input_ids"][-8:]


def test_an_encoder_reads_question_and_answer_as_its_pair(tmp_path: Path) -> None:
    judge = load_reward_model(bert(tmp_path / "judge"), device=CPU)
    question = (Message(Role.USER, "what is two two"),)
    given = read(judge, question, "four")
    words = judge.tokenizer.convert_ids_to_tokens(given["input_ids"])
    assert words == ["[CLS]", "what", "is", "two", "two", "[SEP]", "four", "[SEP]"]
    assert given["token_type_ids"] == [0] * 6 + [1] * 2
    assert judge.max_tokens == 12
    long = read(judge, (Message(Role.USER, "be be be be be be be what is two two"),), "four")
    words = judge.tokenizer.convert_ids_to_tokens(long["input_ids"])
    assert len(words) == 12
    assert words[0] == "[CLS]"
    assert words[-7:] == ["what", "is", "two", "two", "[SEP]", "four", "[SEP]"]
    turns = read(judge, PROMPT, "four")["input_ids"]
    assert len(turns) > len(given["input_ids"])


def test_rewards_are_not_rounded_to_the_trunks_precision(tmp_path: Path) -> None:
    judge = load_reward_model(llama(tmp_path / "judge"), device=CPU)
    nn.Module.to(judge.model.model, torch.bfloat16)
    found = torch.tensor(judge.reward(PROMPT, "Four."), dtype=torch.float32)
    assert found != found.bfloat16().float()


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    judge = load_reward_model(llama(tmp_path / "judge"), device=CPU)
    with pytest.raises(RunAborted, match=r"'What is two.*no tools here"):
        judge.reward((PROMPT[1], Message(Role.TOOL, "4")), "Four.")


def test_rewards_are_finite(tmp_path: Path) -> None:
    judge = load_reward_model(llama(tmp_path / "judge"), device=CPU)
    with torch.no_grad():
        judge.model.score.weight.fill_(math.inf)
    with pytest.raises(RunAborted, match="expected a finite number"):
        judge.reward(PROMPT, "Four.")


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    folder = llama(tmp_path / "judge")
    change(folder, architectures=["LlamaForCausalLM"])
    with pytest.raises(InvalidInput, match="is a LlamaForCausalLM with 1 outputs"):
        load_reward_model(folder, device=CPU)
    change(folder, architectures=None)
    with pytest.raises(InvalidInput, match="without an architecture"):
        load_reward_model(folder, device=CPU)
    change(folder, architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"})
    with pytest.raises(InvalidInput, match="with 2 outputs"):
        load_reward_model(folder, device=CPU)
    # Two are what transformers makes of a configuration that does not say.
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="with 2 outputs"):
        load_reward_model(folder, device=CPU)


def test_a_damaged_reward_model_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path / "judge")
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunAborted, match=r"lacks weights of the architecture, e.g. score.weight"):
        load_reward_model(folder, device=CPU)
    broken = {**weights, "score.weight": torch.full_like(head, math.nan)}
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunAborted, match=r"holds NaN or infinity in score.weight"):
        load_reward_model(folder, device=CPU)
    change(folder, model_type="unheard_of")
    with pytest.raises(RunAborted, match="cannot be loaded"):
        load_reward_model(folder, device=CPU)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = llama(tmp_path / "judge")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunAborted, match="cannot be loaded"):
        load_reward_model(folder, device=CPU)
