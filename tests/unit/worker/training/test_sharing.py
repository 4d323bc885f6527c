"""Packed pairs are the same pairs: states, losses and gradients equal those of padded rows."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from core.run_spec import LoraSpec
from core.spec import KernelTerm, KlSpec, ObjectiveSpec, PenaltyTerm
from objectives import build_objective, fit_geometry
from tests.unit.worker.training.micro import (
    VOCABULARY,
    ignore_progress,
    random_pairs,
    tiny_tokenizer,
)
from worker.training import attention as attention_module
from worker.training import sharing
from worker.training.attention import SharedAttention
from worker.training.batches import PairBatch, collate
from worker.training.evaluate import measure
from worker.training.forward import hidden_states
from worker.training.model import Policy, load_policy
from worker.training.reference import compute_reference
from worker.training.sharing import choose_attention, run_trunk
from worker.training.step import PairLoss, PairStep, TrainingData

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "initializer_range": 0.3,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip
WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),
    "gemma3-windowed": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **WINDOWED)),
    "mistral-windowed": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=MODELS)
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Policy:
    torch.manual_seed(0)
    folder = saved(tmp_path, MODELS[request.param]())
    policy = load_policy(folder, lora=LoraSpec(r=4, alpha=8), device=CPU)
    stir(policy)
    return policy


def stir(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.adapter().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def padded(policy: Policy) -> Policy:
    """The same model, made to see padded rows by the attention that transformers gives it."""
    policy.causal.set_attn_implementation("sdpa")
    return replace(policy, attention=None)


def batch_of(policy: Policy) -> PairBatch:
    return collate(random_pairs(5), [4, 0, 3], form=policy.form, device=CPU)


def test_states_and_embeddings_are_those_of_padded_rows(policy: Policy) -> None:
    assert policy.attention is SharedAttention.SEGMENTS
    packed = batch_of(policy)
    assert packed.input_ids.shape[0] == 1
    with torch.no_grad():
        found = hidden_states(policy, packed, embeddings=True)
        plain = padded(policy)
        expected = hidden_states(plain, batch_of(plain), embeddings=True)
    assert found.embeddings is not None
    assert expected.embeddings is not None
    torch.testing.assert_close(found.states, expected.states, rtol=1e-4, atol=1e-5)
    for name in ("prompt", "chosen", "rejected"):
        a, b = getattr(found.embeddings, name), getattr(expected.embeddings, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_padded_rows(policy: Policy) -> None:
    spec = ObjectiveSpec(
        kernel_term=KernelTerm.model_validate({"kernel": "polynomial"}),
        divergence_term=PenaltyTerm(divergence=KlSpec(), alpha=3.0),
    )
    gradients = []
    for form in (policy, padded(policy)):
        if form.attention is not None:
            form.causal.set_attn_implementation(form.attention.implementation)
        gradients.append(step_gradients(form, spec))
    for name, expected in gradients[1].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-5 * scale)


def step_gradients(policy: Policy, spec: ObjectiveSpec) -> dict[str, torch.Tensor]:
    pairs = random_pairs(6)
    table = compute_reference(policy, pairs, progress=ignore_progress)
    geometry = fit_geometry(table.embeddings, seed=0)
    objective = build_objective(spec, geometry=geometry, head=policy.head.weight)
    data = TrainingData(pairs, table.chosen_log_prob, table.rejected_log_prob)
    step = PairStep(PairLoss(policy, objective), policy, data, max_tokens=60)
    for parameter in policy.adapter().values():
        parameter.grad = None
    step.accumulate(range(6), denominator=6, clear=lambda: None)
    return {n: p.grad.clone() for n, p in policy.adapter().items() if p.grad is not None}


def test_an_untrained_policy_has_margins_of_exactly_zero(policy: Policy) -> None:
    policy.reset_adapter(0)
    measured = measure(policy, random_pairs(9), progress=ignore_progress)
    assert not measured.margins.any()
    assert measured.drift == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("attention", [SharedAttention.MASK, SharedAttention.FLEX])
def test_other_attentions_give_the_same_states(
    tmp_path: Path, attention: SharedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(saved(tmp_path, MODELS["llama"]()), lora=LoraSpec(), device=CPU)
    # Compiled for a CPU it would need a C++ compiler; the function is the same.
    monkeypatch.setattr(attention_module, "compiled_flex", lambda: flex_attention)
    batch = batch_of(policy)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        expected = run_trunk(policy.causal, batch, attention=SharedAttention.SEGMENTS)
        policy.causal.set_attn_implementation(attention.implementation)
        found = run_trunk(policy.causal, batch, attention=attention)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            lambda: BloomForCausalLM(
                BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
            ),
            "attention be set",
        ),
        (
            lambda: MambaForCausalLM(
                MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)
            ),
            "",
        ),
    ],
    ids=["alibi", "recurrent"],
)
def test_a_model_that_cannot_share_keeps_padded_rows_and_the_reason_is_logged(
    model: Callable[[], PreTrainedModel], why: str
) -> None:
    torch.manual_seed(0)
    causal = model().eval()
    before = causal.config._attn_implementation
    found = choose_attention(causal, device=CPU)
    assert found.attention is None
    assert found.reason
    assert why in found.reason
    assert causal.config._attn_implementation == before


def test_windows_that_only_a_mask_knows_are_not_lost() -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = Qwen2MoeConfig(
        **shape, num_experts=2, num_experts_per_tok=1, use_sliding_window=True, sliding_window=32,
        max_window_layers=2,
    )  # fmt: skip
    found = choose_attention(Qwen2MoeForCausalLM(config).eval(), device=CPU)
    assert found.attention is None
    assert "leave sliding windows to the mask" in found.reason


def test_in_low_precision_a_wrong_attention_is_still_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    causal = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval()
    assert choose_attention(causal, device=CPU).attention is SharedAttention.SEGMENTS
    everything = torch.ones(1, 1, 30, 30, dtype=torch.bool)
    monkeypatch.setattr(attention_module.Segments, "dense_mask", lambda _: everything)
    monkeypatch.setattr(sharing, "_candidates", lambda *_: (SharedAttention.MASK,))
    found = choose_attention(causal, device=CPU)
    assert found.attention is None
    assert "hidden states differ" in found.reason


def test_layers_that_a_probe_cannot_tell_apart_are_refused() -> None:
    causal = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    causal.config.attention_chunk_size = 64
    assert "chunks" in choose_attention(causal, device=CPU).reason


def test_what_was_fastest_is_chosen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "TIMED", {"cpu"})
    policy = load_policy(saved(tmp_path / "m", MODELS["llama"]()), lora=LoraSpec(), device=CPU)
    first = choose_attention(policy.causal, device=CPU, choices=tmp_path / "kept")
    assert "segments: " in first.reason
    assert "mask: " in first.reason
    assert all(p.grad is None for p in policy.adapter().values())
    (file,) = (tmp_path / "kept").iterdir()
    assert file.read_text() == str(first.attention)
    for kept in (SharedAttention.MASK, SharedAttention.SEGMENTS):
        file.write_text(kept.value)
        again = choose_attention(policy.causal, device=CPU, choices=tmp_path / "kept")
        assert again.attention is kept
        assert policy.causal.config._attn_implementation == kept.implementation
