import pytest
from transformers import PreTrainedTokenizerBase

from core.errors import FailureCode, RunAborted
from tests.unit.worker.training.micro import tiny_tokenizer
from worker.ingest.canonical import CanonicalRow, Message, Pair, Role, Split, canonical_row
from worker.training.tokenize import (
    PLAIN_TEMPLATE,
    TokenizedSplit,
    cut_prompt,
    prompt_ids,
    tokenize_rows,
)


def row(prompt: str, chosen: str, rejected: str, *, system: str | None = None) -> CanonicalRow:
    turns = (Message(Role.USER, prompt),)
    if system is not None:
        turns = (Message(Role.SYSTEM, system), *turns)
    pair = Pair(
        prompt=turns, chosen=(Message(Role.ASSISTANT, chosen),),
        rejected=(Message(Role.ASSISTANT, rejected),), margin=None, source="t", meta={},
    )  # fmt: skip
    return canonical_row(pair, line=1, split=Split.TRAIN)


def tokens(
    *rows: CanonicalRow, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int = 512
) -> TokenizedSplit:
    return tokenize_rows(rows, tokenizer=tokenizer or tiny_tokenizer(), max_length=max_length)


def whole(tokenizer: PreTrainedTokenizerBase, r: CanonicalRow, answer: tuple[Message, ...]) -> str:
    turns = [{"role": m.role.value, "content": m.content} for m in (*r.prompt, *answer)]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
def test_prompt_and_response_are_the_whole_template(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    r = row("What is  two\nplus two?", "Four.\n\nSure.", "Cinq, né?", system="Be brief.")
    (pair,) = tokens(r, tokenizer=tokenizer).pairs
    for ids, answer in ((pair.chosen, r.chosen), (pair.rejected, r.rejected)):
        assert tokenizer.decode([*pair.prompt, *ids]) == whole(tokenizer, r, answer)
    asked = [{"role": m.role.value, "content": m.content} for m in r.prompt]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(pair.prompt) == rendered
    assert prompt_ids(r.prompt, tokenizer) == list(pair.prompt)


def test_response_ends_with_the_end_of_turn() -> None:
    tokenizer = tiny_tokenizer()
    (pair,) = tokens(row("Hi", "Yes", "No")).pairs
    assert tokenizer.eos_token_id in pair.chosen
    assert tokenizer.eos_token_id in pair.rejected


def test_a_template_that_opens_answers_otherwise_shares_what_is_equal() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>THINK{% endif %}"
    )
    r = row("Why?", "Because", "Never")
    (pair,) = tokens(r, tokenizer=tokenizer).pairs
    for ids, answer in ((pair.chosen, r.chosen), (pair.rejected, r.rejected)):
        assert tokenizer.decode([*pair.prompt, *ids]) == whole(tokenizer, r, answer)


def test_a_cut_prompt_keeps_its_first_token_if_that_is_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    long = "one two three four five six seven eight nine ten " * 10
    (pair,) = tokens(row(long, "yes", "no"), tokenizer=tokenizer, max_length=64).pairs
    assert pair.prompt[0] == tokenizer.bos_token_id
    assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) == 64
    assert cut_prompt([9, 1, 2, 3], 2, bos=9) == [9, 3]
    assert cut_prompt([9, 1, 2, 3], 1, bos=9) == [3]
    assert cut_prompt([8, 1, 2, 3], 2, bos=9) == [2, 3]
    assert cut_prompt([9, 1], 2, bos=9) == [9, 1]


def test_prompts_lose_their_beginning_then_responses_their_end() -> None:
    long = "one two three four five six seven eight nine ten " * 10
    full = tokens(row(long, "yes indeed", "no")).pairs[0]
    room = 64
    cut = tokens(row(long, "yes indeed", "no"), max_length=room)
    (pair,) = cut.pairs
    assert (cut.truncated_prompts, cut.truncated_responses) == (1, 0)
    assert pair.length == room
    assert pair.prompt == full.prompt[-len(pair.prompt) :]
    assert (pair.chosen, pair.rejected) == (full.chosen, full.rejected)

    cut = tokens(row(long, long + "a", long + "b " + long), max_length=room)
    assert cut.truncated_responses == 2
    assert not cut.pairs, "both answers begin alike: what is left of them is identical"
    assert cut.dropped_identical == 1

    cut = tokens(row(long, "A " + long, "B " + long), max_length=room)
    (pair,) = cut.pairs
    assert len(pair.prompt) == room // 4
    assert len(pair.chosen) == len(pair.rejected) == room - room // 4
    assert "2 answers were cut" in cut.warnings()[1]


def test_empty_answers_are_dropped_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    split = tokens(row("Q", "", "x"), row("Q", "a", "b"), tokenizer=tokenizer)
    assert split.dropped_empty == 1
    assert len(split.pairs) == 1
    assert split.warnings() == ["1 pairs were dropped: an answer has no tokens"]


def test_a_refusing_template_names_the_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RunAborted, match=r"line 1\): no system role") as caught:
        tokens(row("Q", "a", "b"), tokenizer=tokenizer)
    assert caught.value.failure is FailureCode.DATASET_INVALID
