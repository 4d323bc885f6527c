import pytest
from transformers import PreTrainedTokenizerBase

from core.errors import FailureCode, RunAborted
from tests.unit.worker.training.micro import tiny_tokenizer
from worker.ingest.canonical import CanonicalRow, Message, Pair, Role, Split, canonical_row
from worker.training.tokenize import (
    PLAIN_TEMPLATE,
    EncodedRow,
    TokenizedSplit,
    cut_prompt,
    encode_rendered,
    encode_row,
    encoded,
    prompt_ids,
    render_row,
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


STRADDLING = (
    "{% for m in messages %}{{ m['role'] }} says: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}assistant says: {% endif %}"
)
OPENS_OTHERWISE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>THINK{% endif %}"
)


def by_one_text_at_a_time(r: CanonicalRow, tokenizer: PreTrainedTokenizerBase) -> EncodedRow:
    """The row by `encode` of each text alone, and comparison token by token."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def text(turns: tuple[Message, ...], *, asked: bool) -> str:
        chat = [{"role": m.role.value, "content": m.content} for m in turns]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asked))

    asked = text(r.prompt, asked=True)
    answered = [text((*r.prompt, *answer), asked=False) for answer in (r.chosen, r.rejected)]
    prompt, whole = ids(asked), [ids(each) for each in answered]
    shared = len(prompt)
    for each in whole:
        same = [a == b for a, b in zip(prompt, each, strict=False)]
        shared = min(shared, same.index(False) if False in same else len(same))
    if shared < len(prompt) and all(each.startswith(asked) for each in answered):
        return EncodedRow(prompt, *(ids(each[len(asked) :]) for each in answered))
    return EncodedRow(prompt[:shared], *(each[shared:] for each in whole))


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE, STRADDLING, OPENS_OTHERWISE])
def test_many_rows_at_once_are_what_each_is_alone(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    words = ("", "né ", "  two\n", "Über", "\u200b", "…!", "42 ", "emoji 🙂", "\tthe the", "a ")
    rows = [
        row(
            f"{words[n % 10]}question {n} {words[n // 7 % 10] * (n % 5)}",
            f"{words[n // 3 % 10]}answer {n}" if n % 11 else "",
            f"{words[n // 2 % 10] * (n % 40)}other",
            system="Be brief." if n % 4 == 0 else None,
        )
        for n in range(150)
    ]
    alone = [by_one_text_at_a_time(each, tokenizer) for each in rows]
    together = list(encoded(rows, tokenizer))
    assert [each for each, _ in together] == rows
    assert [whole for _, whole in together] == alone
    assert encode_row(rows[3], tokenizer) == alone[3]
    assert encode_rendered([render_row(r, tokenizer) for r in rows[:7]], tokenizer) == alone[:7]
    straddled = [
        tokenizer.encode(render_row(r, tokenizer).chosen, add_special_tokens=False)
        != one.prompt + one.chosen
        for r, one in zip(rows, alone, strict=True)
    ]
    if template == STRADDLING:
        assert any(straddled), "a token over the border is one of the cases"
