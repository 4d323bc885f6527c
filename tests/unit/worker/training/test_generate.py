"""Greedy answers, several prompts at once."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from tests.unit.worker.training.micro import micro_policy
from worker.training.generate import answers
from worker.training.model import Policy


def one_by_one(policy: Policy, prompt: list[int], *, new_tokens: int) -> list[int]:
    """Greedy decoding without a cache: the argmax of a whole forward pass for every token."""
    ids = list(prompt)
    stops = {policy.tokenizer.eos_token_id}
    with torch.no_grad():
        while len(ids) < len(prompt) + new_tokens:
            logits = policy.causal(input_ids=torch.tensor([ids]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ["llama_folder", "gpt2_folder"])
def test_prompts_of_other_lengths_change_no_answer(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    policy = micro_policy(request.getfixturevalue(architecture))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.adapter().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    prompts = [list(range(5, 5 + n)) for n in (3, 17, 9, 1)]
    expected = [told(policy, one_by_one(policy, ids, new_tokens=12)) for ids in prompts]
    assert answers(policy, prompts, new_tokens=12) == expected
    assert [answers(policy, [ids], new_tokens=12)[0] for ids in prompts] == expected
    assert len(set(expected)) > 1
    with policy.as_reference():
        base = answers(policy, prompts, new_tokens=12)
    assert base != expected


def told(policy: Policy, ids: Sequence[int]) -> str:
    return str(policy.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_an_answer_ends_at_its_end_token(llama_folder: object) -> None:
    policy = micro_policy(llama_folder)  # type: ignore[arg-type]
    prompts = [list(range(5, 5 + n)) for n in (3, 17, 9)]
    free = [one_by_one(policy, ids, new_tokens=8) for ids in prompts]
    assert all(len(ids) == 8 for ids in free)
    # The second token of the first answer becomes the end token.
    end = free[0][1]
    policy.tokenizer.eos_token = policy.tokenizer.convert_ids_to_tokens(end)
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    assert answers(policy, prompts, new_tokens=8) == [told(policy, ids) for ids in cut]
    assert any(len(a) != len(b) for a, b in pairwise(cut))
