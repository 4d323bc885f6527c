"""A reward model: a sequence classifier with one output, which scores an answer to a prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from core.errors import FailureCode, RunAborted
from core.reward_models import check_reward_model
from worker.ingest.canonical import Message, Role
from worker.training.tokenize import (
    PLAIN_TEMPLATE,
    cut_prompt,
    load_tokenizer,
    positions_of,
    rendered_ids,
)

# Tokenizers that know no limit say 1e30.
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class RewardModel:
    """A loaded classifier and its tokenizer; it reads `max_tokens` at most, None: any number."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    max_tokens: int | None

    @torch.no_grad()
    def reward(self, prompt: Sequence[Message], answer: str) -> float:
        """Return the reward of an answer; what is too long is cut at its beginning.

        The configuration's padding token stays: some models read the last token that is not it.

        Raises:
            RunAborted: the reward is not finite (`loss_nan`), or the model's chat template refuses
                the conversation (`dataset_invalid`).
        """
        logits = self.model(**self._encoded(prompt, answer)).logits
        value = float(logits[0, 0])
        if not math.isfinite(value):
            raise RunAborted(
                f"the reward model gives {value} for an answer, expected a finite number",
                failure=FailureCode.LOSS_NAN,
                hint="name another reward model",
            )
        return value

    def _encoded(self, prompt: Sequence[Message], answer: str) -> dict[str, Tensor]:
        """Return a conversation by the model's chat template, else as the tokenizer's own pair."""
        if self.tokenizer.chat_template == PLAIN_TEMPLATE:
            pair = self.tokenizer(
                _as_text(prompt), answer, return_tensors="pt",
                truncation=self.max_tokens is not None, max_length=self.max_tokens,
            )  # fmt: skip
            return {name: value.to(self.device) for name, value in pair.items()}
        try:
            ids = rendered_ids((*prompt, Message(Role.ASSISTANT, answer)), self.tokenizer)
        except TemplateError as error:
            raise RunAborted(
                f"the reward model's chat template refuses a prompt that begins with "
                f"{prompt[0].content[:60]!r}: {error}",
                failure=FailureCode.DATASET_INVALID,
                hint="name another reward model, one whose template knows these roles",
            ) from error
        if self.max_tokens is not None:
            ids = cut_prompt(ids, self.max_tokens, bos=self.tokenizer.bos_token_id)
        tokens = torch.tensor([ids], device=self.device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def load_reward_model(folder: Path, *, device: torch.device) -> RewardModel:
    """Load a classifier with one output from safetensors, whole and finite; no code of its runs.

    On a GPU the trunk computes in bfloat16 and the output layer in float32: rewards that are
    rounded to eight bits would tie.

    Raises:
        InvalidInput: it is another kind of model (`model_not_reward_model`).
        RunAborted: it cannot be loaded (`model_not_found`).
    """
    check_reward_model(folder)
    model: PreTrainedModel
    report: dict[str, set[str]]
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _unusable(folder, f"cannot be loaded: {reason}") from error
    wrong = sorted({*report["missing_keys"], *report["mismatched_keys"]}, key=str)
    if wrong:
        raise _unusable(folder, f"lacks weights of the architecture, e.g. {wrong[0]}")
    broken = next((n for n, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if broken is not None:
        raise _unusable(folder, f"holds NaN or infinity in {broken}")
    nn.Module.to(model, device)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 1:
            module.float().register_forward_pre_hook(_to_float)
    tokenizer = load_tokenizer(folder)
    tokenizer.truncation_side = "left"
    limits = (positions_of(model.config), tokenizer.model_max_length)
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    return RewardModel(model, tokenizer, device, max_tokens=min(known, default=None))


def _to_float(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in given)


def _as_text(prompt: Sequence[Message]) -> str:
    """Return a prompt without a template: a single question as it is, turns by name."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{turn.role.value.capitalize()}: {turn.content}" for turn in prompt)


def _unusable(folder: Path, why: str) -> RunAborted:
    return RunAborted(
        f"the reward model in {folder} {why}",
        failure=FailureCode.MODEL_NOT_FOUND,
        hint="name another one",
    )
