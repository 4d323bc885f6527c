"""The base model with one low-rank adapter, reset in place between runs, off for the reference."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from core.errors import FailureCode, RunAborted
from core.run_spec import LoraSpec
from worker.training.attention import SharedAttention
from worker.training.batches import Form
from worker.training.low_rank import fuse_adapters
from worker.training.sharing import choose_attention
from worker.training.tokenize import load_tokenizer

log = logging.getLogger("kdpo.training")

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Policy:
    """A causal language model whose only trained weights are those of the adapter `default`.

    Always in evaluation mode: dropout would add noise to log-ratios and break exact resume.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    attention: SharedAttention | None = None
    """How packed pairs attend; None where the model has to see padded rows."""

    @property
    def form(self) -> Form:
        """How its batches are laid out."""
        return Form.PLAIN if self.attention is None else Form.SHARED

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model around which the adapter is wrapped."""
        model = self.model.get_base_model()
        assert isinstance(model, PreTrainedModel)
        return model

    @property
    def trunk(self) -> nn.Module:
        """Everything up to the last hidden state after the final norm."""
        trunk: nn.Module = self.causal.base_model
        return trunk

    @property
    def head(self) -> nn.Linear:
        """The output layer."""
        head = self.causal.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def hidden_size(self) -> int:
        """H, the width of the last hidden state."""
        return self.head.in_features

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model has positions for, if it says."""
        return positions_of(self.causal.config)

    def adapter(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in a stable order."""
        named = self.model.named_parameters()
        return dict(sorted((name, p) for name, p in named if name.endswith((_A, _B))))

    def reset_adapter(self, seed: int) -> None:
        """Start over from the reference: A uniform as LoRA's own initialisation, B zero.

        A pure function of the seed, whatever ran before.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.adapter().items():
                if name.endswith(_B):
                    parameter.zero_()
                else:
                    fresh = torch.empty(parameter.shape)
                    nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                    parameter.copy_(fresh)

    def load_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Put saved values into the adapter."""
        with torch.no_grad():
            for name, parameter in self.adapter().items():
                parameter.copy_(tensors[name])

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Switch the adapter off within the block: the model is the frozen reference."""
        with self.model.disable_adapter():
            yield


def positions_of(config: PreTrainedConfig) -> int | None:
    """Longest sequence that a configuration has positions for, under whatever name it says so."""
    # An attribute, not a key: GPT-2 and others store it as n_positions and map the name.
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def load_policy(folder: Path, *, lora: LoraSpec, device: torch.device) -> Policy:
    """Load safetensors weights with plain transformers and wrap them; float32 on a CPU, else bf16.

    Raises:
        RunAborted: the folder holds no model that can be used (`model_not_found`).
    """
    tokenizer = load_tokenizer(folder)
    base = load_base(folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    nn.Module.to(base, device)
    base.requires_grad_(False)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a factor; peft only divides it
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    with peft_warnings_off():
        model = get_peft_model(base, config)
    fuse_adapters(model)
    model.eval()
    policy = Policy(model=model, tokenizer=tokenizer, device=device)
    policy.reset_adapter(0)
    _check_head(policy, folder)
    sharing = choose_attention(policy.causal, device=device)
    if sharing.attention is None:
        log.warning("every prompt is run twice, in padded rows: %s", sharing.reason)
    else:
        log.info("prompts are shared: %s %s", sharing.attention.name, sharing.reason)
    return replace(policy, attention=sharing.attention)


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Silence what no caller can act on: peft reads an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def load_base(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load safetensors weights, all of them and all finite, and nothing that could run code.

    Raises:
        RunAborted: the folder holds no model that can be used (`model_not_found`).
    """
    _check_folder(folder)
    transformers_logging.disable_progress_bar()
    model: PreTrainedModel
    report: dict[str, set[str]]
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _unusable(folder, f"cannot be loaded: {reason}") from error
    wrong = sorted({*report["missing_keys"], *report["mismatched_keys"]}, key=str)
    if wrong:
        raise _unusable(folder, f"lacks weights of the architecture, e.g. {wrong[0]}")
    broken = next((n for n, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if broken is not None:
        raise _unusable(folder, f"holds NaN or infinity in {broken}")
    return model


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise _unusable(folder, "has no config.json")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise _unusable(
            folder,
            f"has pickled weights only ({pickles[0]}), which can run code when they are loaded",
        )
    raise _unusable(folder, "has no *.safetensors file")


def _check_head(policy: Policy, folder: Path) -> None:
    """Make sure that head(trunk(x)) are the model's logits: log-probs are computed from that."""
    if not isinstance(policy.causal.get_output_embeddings(), nn.Linear):
        raise _unusable(folder, "has an output layer that is not linear")
    rows = policy.causal.config.get_text_config().vocab_size
    tokens = (torch.arange(8, device=policy.device) * 7 % rows)[None]
    with torch.no_grad():
        hidden = policy.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        ours = policy.head(hidden).float()
        theirs = policy.causal(input_ids=tokens, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2):
        raise _unusable(
            folder,
            f"({policy.causal.config.model_type}) changes its logits after the output layer, "
            "which kdpo does not support",
        )


def _unusable(folder: Path, why: str) -> RunAborted:
    return RunAborted(
        f"the model in {folder} {why}",
        failure=FailureCode.MODEL_NOT_FOUND,
        hint="a model folder needs config.json, *.safetensors and the tokenizer's files",
    )
