"""A few answers of the base and of the aligned model, side by side."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from core.results import GeneratedSample
from worker.ingest.canonical import CanonicalRow
from worker.training.model import Policy
from worker.training.tokenize import cut_prompt, prompt_ids

MAX_NEW_TOKENS = 40
NUM_SAMPLES = 3


def generate_samples(
    policy: Policy, rows: Sequence[CanonicalRow], *, max_length: int
) -> tuple[GeneratedSample, ...]:
    """Answer the prompts of the first rows that differ, greedily, by reference and by policy."""
    firsts = {row.group_id: row for row in reversed(rows)}
    picked = [row for row in rows if firsts[row.group_id] is row][:NUM_SAMPLES]
    limit = min(max_length, policy.max_positions or max_length)
    prompts = [
        cut_prompt(
            prompt_ids(row.prompt, policy.tokenizer),
            max(1, limit - MAX_NEW_TOKENS),
            bos=policy.tokenizer.bos_token_id,
        )
        for row in picked
    ]
    aligned = [_answer(policy, ids) for ids in prompts]
    with policy.as_reference():
        base = [_answer(policy, ids) for ids in prompts]
    return tuple(
        GeneratedSample(prompt=row.prompt[-1].content, base=before, aligned=after)
        for row, before, after in zip(picked, base, aligned, strict=True)
    )


@torch.no_grad()
def _answer(policy: Policy, ids: list[int]) -> str:
    tokens = torch.tensor([ids], device=policy.device)
    tokenizer = policy.tokenizer
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop_tokens(
            tokenizer.eos_token_id, policy.causal.generation_config.eos_token_id
        ),
        pad_token_id=tokenizer.pad_token_id,
    )
    answer = policy.causal.generate(  # type: ignore[operator]
        input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config
    )
    return str(tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True)).strip()


def stop_tokens(*given: int | list[int] | None) -> list[int] | None:
    """Join what tokenizer and generation config name: one id, several (Llama 3, Qwen) or none."""
    ids: set[int] = set()
    for value in given:
        if value is not None:
            ids |= set(value) if isinstance(value, list) else {value}
    return sorted(ids) or None
