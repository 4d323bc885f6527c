"""From canonical rows to token ids, as the model's chat template writes them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from core.errors import FailureCode, RunAborted
from worker.ingest.canonical import CanonicalRow, Message

# Turns by name and the end token after each answer, for base models that never saw a chat format.
PLAIN_TEMPLATE = (
    "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}"
    "{% if eos_token is defined and eos_token %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
BATCH_ROWS = 64
"""Rows that go through the tokenizer together; ids do not depend on it."""
_PROMPT_SHARE = 4


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair; `prompt + chosen` is the whole conversation as the template writes it."""

    id: str
    group_id: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    weight: float

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as the template writes it: the prompt that asks for an answer, and both wholes."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of one row's three parts; `prompt + chosen` is the conversation as written."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def fitted(self, max_length: int, *, bos: int | None) -> "EncodedRow":
        """Return what is left of it within `max_length` tokens; see `tokenize_rows`."""
        longest = max(len(self.chosen), len(self.rejected))
        room = max(max_length - longest, min(len(self.prompt), max_length // _PROMPT_SHARE))
        prompt = cut_prompt(self.prompt, room, bos=bos)
        limit = max_length - len(prompt)
        return EncodedRow(prompt, self.chosen[:limit], self.rejected[:limit])

    @property
    def is_empty(self) -> bool:
        """Whether a part has no tokens."""
        return not (self.prompt and self.chosen and self.rejected)

    def is_usable(self, max_length: int, *, bos: int | None) -> bool:
        """Whether a pair is left of it within `max_length` tokens."""
        left = self.fitted(max_length, bos=bos)
        return not self.is_empty and left.chosen != left.rejected


@dataclass(frozen=True)
class TokenizedSplit:
    """Pairs of one split in file order, and what happened to the others."""

    pairs: tuple[TokenizedPair, ...]
    truncated_prompts: int = 0
    truncated_responses: int = 0
    dropped_identical: int = 0
    dropped_empty: int = 0

    def warnings(self) -> list[str]:
        """Sentences about what was cut or dropped, for the job's events."""
        told = (
            (self.truncated_prompts, "prompts were cut at their beginning to fit max_length"),
            (self.truncated_responses, "answers were cut at their end to fit max_length"),
            (self.dropped_identical, "pairs were dropped: both answers have the same tokens"),
            (self.dropped_empty, "pairs were dropped: an answer has no tokens"),
        )
        return [f"{count} {what}" for count, what in told if count]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder; one without a chat template gets a plain one.

    Raises:
        RunAborted: there is no tokenizer that can be read (`model_not_found`).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunAborted(
            f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}",
            failure=FailureCode.MODEL_NOT_FOUND,
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions_of(config: PreTrainedConfig) -> int | None:
    """Longest sequence that a configuration has positions for, under whatever name it says so."""
    # An attribute, not a key: GPT-2 and others store it as n_positions and map the name.
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def tokenize_rows(
    rows: Iterable[CanonicalRow],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_row: Callable[[CanonicalRow, EncodedRow], None] | None = None,
) -> TokenizedSplit:
    """Tokenise pairs; nothing is longer than `max_length` tokens.

    The prompt ends with the template's generation prompt, a response holds everything after it,
    the end-of-turn token included. A prompt loses its beginning first (a quarter of `max_length`
    is left to it, a BOS token stays), then the response its end. Both responses have the same
    prompt tokens. `on_row` gets every row as it is before anything is cut or dropped.

    Raises:
        RunAborted: the template refuses a conversation (`dataset_invalid`), naming the row.
    """
    found = encoded(rows, tokenizer)
    return cut_rows(found, max_length=max_length, bos=tokenizer.bos_token_id, on_row=on_row)


def cut_rows(
    rows: Iterable[tuple[CanonicalRow, EncodedRow]],
    *,
    max_length: int,
    bos: int | None,
    on_row: Callable[[CanonicalRow, EncodedRow], None] | None = None,
) -> TokenizedSplit:
    """Do all of `tokenize_rows` that follows the encoding."""
    pairs: list[TokenizedPair] = []
    counts = dict.fromkeys(("prompts", "responses", "identical", "empty"), 0)
    for row, whole in rows:
        if on_row is not None:
            on_row(row, whole)
        if whole.is_empty:
            counts["empty"] += 1
            continue
        left = whole.fitted(max_length, bos=bos)
        counts["prompts"] += len(left.prompt) < len(whole.prompt)
        counts["responses"] += len(left.chosen) < len(whole.chosen)
        counts["responses"] += len(left.rejected) < len(whole.rejected)
        if left.chosen == left.rejected:
            counts["identical"] += 1
            continue
        pairs.append(
            TokenizedPair(
                id=row.id,
                group_id=row.group_id,
                prompt=tuple(left.prompt),
                chosen=tuple(left.chosen),
                rejected=tuple(left.rejected),
                weight=row.weight,
            )
        )
    return TokenizedSplit(
        pairs=tuple(pairs),
        truncated_prompts=counts["prompts"],
        truncated_responses=counts["responses"],
        dropped_identical=counts["identical"],
        dropped_empty=counts["empty"],
    )


def encoded(
    rows: Iterable[CanonicalRow], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[CanonicalRow, EncodedRow]]:
    """Yield rows with their token ids, uncut; the tokenizer gets `BATCH_ROWS` of them at a time.

    Raises:
        RunAborted: the template refuses a conversation (`dataset_invalid`), naming the row.
    """
    rest = iter(rows)
    while batch := list(islice(rest, BATCH_ROWS)):
        yield from zip(
            batch,
            encode_rendered([render_row(r, tokenizer) for r in batch], tokenizer),
            strict=True,
        )


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt that is to be answered."""
    return _ids(tokenizer, [_render(tokenizer, messages, answer_next=True)])[0]


def cut_prompt(prompt: list[int], room: int, *, bos: int | None) -> list[int]:
    """Drop a prompt's beginning so that `room` >= 1 tokens are left, a leading `bos` among them."""
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos and room > 1:
        return [bos, *prompt[-(room - 1) :]]
    return prompt[-room:]


def encode_row(row: CanonicalRow, tokenizer: PreTrainedTokenizerBase) -> EncodedRow:
    """Return the token ids of a row as the chat template writes it, uncut.

    Raises:
        RunAborted: the template refuses the conversation (`dataset_invalid`), naming the row.
    """
    return encode_rendered([render_row(row, tokenizer)], tokenizer)[0]


def render_row(row: CanonicalRow, tokenizer: PreTrainedTokenizerBase) -> RenderedRow:
    """Return the texts of a row as the chat template writes them.

    Raises:
        RunAborted: the template refuses the conversation (`dataset_invalid`), naming the row.
    """
    try:
        return RenderedRow(
            _render(tokenizer, row.prompt, answer_next=True),
            _render(tokenizer, (*row.prompt, *row.chosen), answer_next=False),
            _render(tokenizer, (*row.prompt, *row.rejected), answer_next=False),
        )
    except TemplateError as error:
        raise RunAborted(
            f"the model's chat template refuses row {row.id} (line {row.line}): "
            f"{_first_line(error)}",
            failure=FailureCode.DATASET_INVALID,
            hint="drop the row, or use a model whose template knows these roles",
        ) from error


def encode_rendered(
    rows: Sequence[RenderedRow], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedRow]:
    """Return the token ids of rows, in order; the tokenizer sees all of their texts at once."""
    texts = [text for row in rows for text in (row.prompt, row.chosen, row.rejected)]
    ids = _ids(tokenizer, texts)
    found: list[EncodedRow] = []
    for number, row in enumerate(rows):
        prompt, *whole = ids[3 * number : 3 * number + 3]
        shared = min(_shared_prefix(prompt, each) for each in whole)
        if shared < len(prompt) and all(
            text.startswith(row.prompt) for text in (row.chosen, row.rejected)
        ):
            # A token straddles the border: what follows the prompt is encoded on its own, as it is
            # when the model answers.
            start = len(row.prompt)
            chosen, rejected = _ids(tokenizer, [row.chosen[start:], row.rejected[start:]])
        else:
            # Where something is left of the prompt, the template opens an answer otherwise than it
            # asks for one (e.g. an empty thought).
            prompt = prompt[:shared]
            chosen, rejected = (each[shared:] for each in whole)
        found.append(EncodedRow(prompt, chosen, rejected))
    return found


def rendered_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a whole conversation, under the tokenizer's chat template."""
    return _ids(tokenizer, [_render(tokenizer, messages, answer_next=False)])[0]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool
) -> str:
    turns = [{"role": m.role.value, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
    return str(text)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [list(ids) for ids in found]


def _shared_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next(i for i, x in enumerate(a) if i >= len(b) or x != b[i])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
