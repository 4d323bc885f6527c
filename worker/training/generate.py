"""A few answers of the base and of the aligned model, side by side."""

from collections.abc import Sequence
from itertools import takewhile

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
    picked = one_row_a_prompt(rows)[:NUM_SAMPLES]
    limit = min(max_length, policy.max_positions or max_length)
    ids = prompts_to_answer(policy, picked, max_tokens=max(1, limit - MAX_NEW_TOKENS))
    aligned = [answers(policy, [one], new_tokens=MAX_NEW_TOKENS)[0] for one in ids]
    with policy.as_reference():
        base = [answers(policy, [one], new_tokens=MAX_NEW_TOKENS)[0] for one in ids]
    return tuple(
        GeneratedSample(prompt=row.prompt[-1].content, base=before, aligned=after)
        for row, before, after in zip(picked, base, aligned, strict=True)
    )


def one_row_a_prompt(rows: Sequence[CanonicalRow]) -> list[CanonicalRow]:
    """Return the first row of each prompt, in order."""
    firsts = {row.group_id: row for row in reversed(rows)}
    return [row for row in rows if firsts[row.group_id] is row]


def prompts_to_answer(
    policy: Policy, rows: Sequence[CanonicalRow], *, max_tokens: int
) -> list[list[int]]:
    """Return the prompts as token ids; what is longer loses its beginning."""
    return [
        cut_prompt(
            prompt_ids(row.prompt, policy.tokenizer),
            max_tokens,
            bos=policy.tokenizer.bos_token_id,
        )
        for row in rows
    ]


@torch.no_grad()
def answers(policy: Policy, prompts: Sequence[list[int]], *, new_tokens: int) -> list[str]:
    """Return the greedy answers of what the policy is now to prompts, all of them at once.

    Shorter ones are filled up at their beginning, where the attention mask hides it.
    """
    tokenizer = policy.tokenizer
    width = max(map(len, prompts))
    fill = tokenizer.pad_token_id or 0
    tokens = torch.tensor([[fill] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    stops = stop_tokens(tokenizer.eos_token_id, policy.causal.generation_config.eos_token_id)
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=fill
    )
    found = policy.causal.generate(  # type: ignore[operator]
        input_ids=tokens.to(policy.device),
        attention_mask=mask.to(policy.device),
        generation_config=config,
    )
    ends = set(stops or ())
    written = [
        list(takewhile(lambda token: token not in ends, ids)) for ids in found[:, width:].tolist()
    ]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]


def stop_tokens(*given: int | list[int] | None) -> list[int] | None:
    """Join what tokenizer and generation config name: one id, several (Llama 3, Qwen) or none."""
    ids: set[int] = set()
    for value in given:
        if value is not None:
            ids |= set(value) if isinstance(value, list) else {value}
    return sorted(ids) or None
