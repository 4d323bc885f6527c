"""DPO as TRL's DPOTrainer computes it: one batch, its tokenisation and collation, both losses.

Kernel off. Where TRL stays finite and no log-ratio is in a bounded tail, loss, rewards, margins,
accuracies and every parameter's gradient agree in float32. Where ours differs on purpose: links
with an exponential go on along a tangent beyond exponent 4, where TRL's overflow or lose their
gradient.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from core.spec import (
    DivergenceSpec,
    FAlpha,
    FDivergenceSpec,
    FForwardKl,
    JensenShannonSpec,
    KlSpec,
    LinkTerm,
    ObjectiveSpec,
)
from objectives import (
    Head,
    ObjectiveOutput,
    PreferenceBatch,
    build_objective,
    segment_sum,
    stream_scores,
)

pytestmark = pytest.mark.filterwarnings("ignore")
RTOL = 1e-5
BETA = 0.3
WORDS = [f"w{i}" for i in range(40)]
DIVERGENCES: dict[str, tuple[str, DivergenceSpec | None]] = {
    "reverse_kl": ("reverse_kl", None),
    "reverse_kl as a link": ("reverse_kl", KlSpec()),
    "forward_kl": ("forward_kl", FDivergenceSpec(f=FForwardKl())),
    "js_divergence": ("js_divergence", JensenShannonSpec()),
    "alpha_divergence": ("alpha_divergence", FDivergenceSpec(f=FAlpha(order=0.5))),
}
every_divergence = pytest.mark.parametrize(
    ("theirs", "ours"), DIVERGENCES.values(), ids=DIVERGENCES.keys()
)


@dataclass(frozen=True)
class Setting:
    """A trainer of TRL and the batch that its own dataloader makes."""

    trainer: DPOTrainer
    model: LlamaForCausalLM
    reference: LlamaForCausalLM
    batch: dict[str, Tensor]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setting]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)

    def setting(divergence: str, *, drift: float = 0.0) -> Setting:
        model = policy()
        reference = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter += drift * torch.randn(parameter.shape, generator=generator)
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                output_dir=str(tmp_path),
                beta=BETA,
                f_divergence_type=divergence,
                f_alpha_divergence_coef=0.5,
                per_device_train_batch_size=6,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                seed=0,
            ),
            train_dataset=preferences(),
            processing_class=tokenizer(),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        return Setting(trainer, model.eval(), reference.eval(), batch)

    return setting


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def preferences() -> Dataset:
    """Six pairs whose prompts and answers differ in length."""
    generator = torch.Generator().manual_seed(2)

    def text(least: int, most: int) -> str:
        length = int(torch.randint(least, most, (), generator=generator))
        drawn = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in drawn)

    return Dataset.from_list(
        [
            {"prompt": text(2, 6), "chosen": " " + text(2, 6), "rejected": " " + text(1, 8)}
            for _ in range(6)
        ]
    )


def sequence_log_probs(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of TRL's rows, chosen then rejected, out of our streamed scores."""
    mask = batch["completion_mask"][:, 1:].bool()
    states = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state[:, :-1][mask]
    labels = batch["input_ids"][:, 1:][mask]
    scores = stream_scores(states, labels, Head(model.lm_head.weight), tile_elements=200)
    rows = mask.nonzero()[:, 0]
    return segment_sum(scores.log_prob, rows, mask.shape[0])


def evaluate(setting: Setting, divergence: DivergenceSpec | None) -> ObjectiveOutput:
    spec = ObjectiveSpec(
        beta=BETA,
        divergence_term=None if divergence is None else LinkTerm(divergence=divergence),
    )
    with torch.no_grad():
        reference = sequence_log_probs(setting.reference, setting.batch)
    return objective_of(spec, sequence_log_probs(setting.model, setting.batch) - reference)


def objective_of(spec: ObjectiveSpec, log_ratios: Tensor) -> ObjectiveOutput:
    chosen, rejected = log_ratios.chunk(2)
    batch = PreferenceBatch(
        log_ratio_chosen=chosen,
        log_ratio_rejected=rejected,
        embeddings=None,
        token_divergence=None,
    )
    output: ObjectiveOutput = build_objective(spec, geometry=None, head=None)(batch)
    return output


def trl_loss(setting: Setting) -> tuple[Tensor, dict[str, float]]:
    loss = setting.trainer.compute_loss(setting.trainer.model, dict(setting.batch))
    metrics = setting.trainer._metrics["eval"]
    return loss, {name: values[-1] for name, values in metrics.items()}


def gradients(model: LlamaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@every_divergence
def test_loss_metrics_and_gradients_are_those_of_trl(
    make: Callable[..., Setting], theirs: str, ours: DivergenceSpec | None
) -> None:
    setting = make(theirs, drift=0.02)
    expected, metrics = trl_loss(setting)
    actual = evaluate(setting, ours)
    assert abs(metrics["rewards/margins"]) > 0.05
    torch.testing.assert_close(actual.loss.mean(), expected, rtol=RTOL, atol=0)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        value = float(actual.metrics[f"rewards/{name}"].mean())
        assert value == pytest.approx(metrics[f"rewards/{name}"], rel=RTOL, abs=1e-6), name
    one, other = (gradients(setting.model, loss) for loss in (actual.loss.mean(), expected))
    for name, gradient in one.items():
        error = (gradient - other[name]).norm() / other[name].norm()
        assert float(error) <= RTOL, name


@every_divergence
def test_both_start_at_log_two_with_margins_of_zero(
    make: Callable[..., Setting], theirs: str, ours: DivergenceSpec | None
) -> None:
    setting = make(theirs)
    expected, metrics = trl_loss(setting)
    actual = evaluate(setting, ours)
    for loss in (expected, actual.loss.mean()):
        assert float(loss.detach()) == pytest.approx(math.log(2.0), rel=1e-6)
    assert metrics["rewards/margins"] == 0.0
    assert actual.metrics["rewards/margins"].tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("theirs", "ours", "chosen", "rejected"),
    [
        ("forward_kl", FDivergenceSpec(f=FForwardKl()), -95.0, -89.0),
        ("alpha_divergence", FDivergenceSpec(f=FAlpha(order=0.5)), -200.0, -170.0),
    ],
    ids=["forward_kl is NaN", "alpha_divergence has no gradient"],
)
def test_where_long_answers_break_trl_ours_still_learns(
    make: Callable[..., Setting],
    theirs: str,
    ours: DivergenceSpec,
    chosen: float,
    rejected: float,
) -> None:
    """On purpose different: the chosen answer lost more likelihood and has to gain it back."""
    setting = make(theirs)
    policy_log_probs = sequence_log_probs(setting.model, setting.batch)
    fallen = torch.tensor([chosen] * 6 + [rejected] * 6)
    reference = policy_log_probs.detach() - fallen
    setting.trainer.precompute_ref_logps = True
    setting.batch["ref_chosen_logps"], setting.batch["ref_rejected_logps"] = reference.chunk(2)
    expected, _ = trl_loss(setting)
    of_theirs = gradients(setting.model, expected)
    broken = [not bool(g.isfinite().all()) or not bool(g.any()) for g in of_theirs.values()]
    assert all(broken)
    log_ratios = fallen.clone().requires_grad_()
    spec = ObjectiveSpec(beta=BETA, divergence_term=LinkTerm(divergence=ours))
    loss = objective_of(spec, log_ratios).loss
    (slope,) = torch.autograd.grad(loss.sum(), log_ratios)
    assert bool(loss.isfinite().all())
    assert bool((slope[:6] < -0.1).all())
    assert bool((slope[6:] > 0.1).all())
