"""Fused adapters compute what peft's own layers compute."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from worker.training.low_rank import fuse_adapters

TOKENS = torch.tensor([[5, 9, 2, 44, 8], [7, 7, 1, 0, 3]])


def model(*, bias: bool = False) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attention_bias=bias, mlp_bias=bias,
        initializer_range=0.4,
    )  # fmt: skip
    base = LlamaForCausalLM(config).double()
    lora = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    made = get_peft_model(base, lora, autocast_adapter_dtype=False)
    assert isinstance(made, PeftModel)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return made.eval()


def loss_and_gradients(made: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    made.zero_grad()
    logits: Tensor = made(input_ids=TOKENS).logits
    loss = logits.log_softmax(-1)[..., 3].sum()
    loss.backward()
    return logits, {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_pefts(bias: bool) -> None:
    expected, gradients = loss_and_gradients(model(bias=bias))
    fused = model(bias=bias)
    assert fuse_adapters(fused) == 14
    found, ours = loss_and_gradients(fused)
    torch.testing.assert_close(found, expected)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient)


def test_it_is_pefts_own_forward_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = model()
    with torch.no_grad(), fused.disable_adapter():
        base = fused(input_ids=TOKENS).logits
    fuse_adapters(fused)

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("peft's scaled copy was made")

    for layer in fused.modules():
        if hasattr(layer, "lora_B"):
            monkeypatch.setattr(layer.lora_B["default"], "forward", refuse)
    with torch.no_grad():
        on = fused(input_ids=TOKENS).logits
        with fused.disable_adapter():
            off = fused(input_ids=TOKENS).logits
    assert torch.equal(off, base)
    assert not torch.allclose(on, off)


def test_under_autocast_and_after_merging_peft_does_it() -> None:
    expected, fused = model(), model()
    fuse_adapters(fused)
    for made in (expected, fused):
        made.float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)
    merged, plain = fused.merge_and_unload(), expected.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(merged(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)


def test_over_a_bfloat16_base_gradients_are_float32() -> None:
    expected, gradients = loss_and_gradients(model())
    fused = model()
    fuse_adapters(fused)
    fused.bfloat16()
    for name, parameter in fused.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    found, ours = loss_and_gradients(fused)
    gap = (found - expected).detach().abs().mean()
    assert float(gap) < 0.05 * float(expected.detach().std())
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert ours[name].dtype == torch.float32
        close = torch.nn.functional.cosine_similarity(
            ours[name].double().flatten(), gradient.flatten(), dim=0
        )
        assert float(close) > 0.98, name


def test_an_adapter_is_saved_and_loaded_as_before(tmp_path: Path) -> None:
    fused = model()
    fuse_adapters(fused)
    fused.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = model().unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, fused(input_ids=TOKENS).logits)
