"""The model that is trained, reset in place between runs, and the reference that it started as.

With low-rank adaptation the reference is the model with its adapter off; with full fine-tuning it
is what the model's folder says, read again where it is needed.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from core.errors import FailureCode, RunAborted
from core.run_spec import FinalRunSpec, LoraSpec
from objectives import Head
from worker.training.attention import SharedAttention
from worker.training.batches import Form
from worker.training.low_rank import fuse_adapters
from worker.training.memory import checkpoint_layers, quantization_config
from worker.training.sharing import choose_attention
from worker.training.tokenize import load_tokenizer, positions_of

log = logging.getLogger("kdpo.training")

_DEFAULTS = FinalRunSpec()
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class FrozenBase:
    """The weights that full fine-tuning starts from: a folder, and a copy of their output layer."""

    folder: Path
    head: Head

    def put_into(self, model: PreTrainedModel) -> None:
        """Make `model` the reference."""
        fresh = load_base(self.folder, dtype=torch.float32).get_parameter
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(fresh(name))


@dataclass(frozen=True)
class Policy:
    """A causal language model of which the adapter `default` is trained, or everything.

    Always in evaluation mode: dropout would add noise to log-ratios and break exact resume.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    attention: SharedAttention | None = None
    """How packed pairs attend; None where the model has to see padded rows."""
    base: FrozenBase | None = None
    """Where the reference's weights are when all of the model's are trained."""
    autocast: torch.dtype | None = None
    """In what the trunk computes, where that is not the type of its weights."""

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained."""
        return self.base is not None

    @property
    def precision(self) -> str:
        """What numbers depend on besides weights and input."""
        causal = self.causal
        kept = "4-bit weights" if getattr(causal, "is_loaded_in_4bit", False) else "weights"
        within = "" if self.autocast is None else f", computed in {self.autocast}"
        return f"{self.head.weight.dtype} {kept}{within}"

    @property
    def form(self) -> Form:
        """How its batches are laid out."""
        return Form.PLAIN if self.attention is None else Form.SHARED

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, without what an adapter wraps around it."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
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
    def reference_head(self) -> Head | None:
        """The reference's output layer where it is not the policy's."""
        return None if self.base is None else self.base.head

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
        return dict(sorted((n, p) for n, p in named if self.is_full or n.endswith((_A, _B))))

    def reset_adapter(self, seed: int) -> None:
        """Start over from the reference: A uniform as LoRA's own initialisation, B zero.

        A pure function of the seed, whatever ran before.
        """
        if self.base is not None:
            self.base.put_into(self.causal)
            return
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
        """Make the model the frozen reference within the block.

        An adapter is switched off; where all weights are trained they make room for those of the
        folder, which is for passes over data and not for single steps.
        """
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield
            return
        assert self.base is not None
        kept = {n: p.detach().to("cpu", copy=True) for n, p in self.adapter().items()}
        self.base.put_into(self.causal)
        try:
            yield
        finally:
            self.load_adapter(kept)

    def computing(self) -> AbstractContextManager[object]:
        """In what the trunk computes within the block."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def load_policy(
    folder: Path,
    *,
    lora: LoraSpec,
    device: torch.device,
    options: FinalRunSpec = _DEFAULTS,
    choices: Path | None = None,
) -> Policy:
    """Load safetensors weights with plain transformers, ready to train an adapter or all of them.

    Under `choices` is kept which attention was fastest on this machine.

    Raises:
        RunAborted: the folder holds no model that can be used (`model_not_found`), or 4 bits are
            asked for where they cannot be had (`dependency_error`).
    """
    tokenizer = load_tokenizer(folder)
    is_full = options.adaptation == "full"
    asked = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[options.precision]
    computed = asked or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    base = load_base(
        folder,
        dtype=torch.float32 if is_full else computed,
        quantization=quantization_config(options, computed, device),
        device=device,
    )
    if options.quantization is None:
        nn.Module.to(base, device)
    base.requires_grad_(is_full)
    if options.gradient_checkpointing:
        checkpoint_layers(base)
    if is_full:
        head = base.get_output_embeddings()
        policy = Policy(
            model=base,
            tokenizer=tokenizer,
            device=device,
            base=FrozenBase(folder, _frozen_head(head)) if isinstance(head, nn.Linear) else None,
            autocast=None if computed is torch.float32 else computed,
        )
    else:
        policy = Policy(model=_adapted(base, lora), tokenizer=tokenizer, device=device)
        policy.reset_adapter(0)
    policy.model.eval()
    _check_head(policy, folder)
    sharing = choose_attention(policy.causal, device=device, choices=choices)
    if sharing.attention is None:
        log.warning("every prompt is run twice, in padded rows: %s", sharing.reason)
    else:
        log.info("prompts are shared: %s %s", sharing.attention.name, sharing.reason)
    return replace(policy, attention=sharing.attention)


def _adapted(base: PreTrainedModel, lora: LoraSpec) -> PeftModel:
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
    assert isinstance(model, PeftModel)
    fuse_adapters(model)
    return model


def _frozen_head(head: nn.Linear) -> Head:
    bias = None if head.bias is None else head.bias.detach().clone()
    return Head(head.weight.detach().clone(), bias)


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Silence what no caller can act on: peft reads an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def load_base(
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load safetensors weights, all of them and all finite, and nothing that could run code.

    They are on the host, quantized ones on `device`: those are made there.

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
            quantization_config=quantization,
            # Else the library takes the current GPU, which may be another.
            device_map=None if quantization is None else {"": device},
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
