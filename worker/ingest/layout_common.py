"""What a layout is, and what the layouts share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

from core.layout_names import LayoutName
from worker.ingest.canonical import Answer, Answers, Message, Pair, Role
from worker.ingest.checks import (
    SAME_SIDES,
    check_completion,
    check_differs,
    check_prompt,
    message_of,
    messages_field,
    optional_number,
    present,
    text_field,
    wrong_type,
)
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.rows import JsonObject

_OPTIONAL = frozenset({"margin", "score_chosen", "score_rejected", "source", "meta"})


class Grouping(StrEnum):
    """Which answers are compared with each other."""

    PAIR = "pair"
    ROW = "row"
    ADJACENT = "adjacent"
    PROMPT = "prompt"


class Layout(ABC):
    """One layout of preference data.

    `fields` are those that tell it; `mapping` says in the report what each was taken for.
    `grouping`: a row is a pair (PAIR), has all answers to a prompt (ROW), or is one answer to the
    prompt of its neighbours (ADJACENT) or of any other row (PROMPT). `can_tie` and `has_margin` say
    whether its comparisons may have no winner and whether they may have a strength.
    """

    name: ClassVar[LayoutName]
    fields: ClassVar[tuple[str, ...]]
    mapping: ClassVar[dict[str, str]]
    grouping: ClassVar[Grouping] = Grouping.PAIR
    can_tie: ClassVar[bool] = False
    has_margin: ClassVar[bool] = False
    implicit_prompt: ClassVar[bool] = False
    warning: ClassVar[str | None] = None

    @abstractmethod
    def score(self, row: JsonObject) -> float:
        """Return how sure it is, in [0, 1], that the row has this layout; 0: it has not."""

    @abstractmethod
    def convert(self, row: JsonObject) -> Pair | Answers:
        """Return the pair of a row, or its answers where `grouping` is not PAIR.

        Raises:
            RowFault: the row says no preference; with code, pointer and detail.
        """


def has_texts(row: JsonObject, *names: str) -> bool:
    """Return whether all of these fields are texts."""
    return all(isinstance(row.get(name), str) for name in names)


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def has_numbers(row: JsonObject, *names: str) -> bool:
    """Return whether all of these fields are numbers."""
    return all(is_number(row.get(name)) for name in names)


def user(text: str) -> tuple[Message, ...]:
    """Return a prompt of one user turn."""
    return (Message(Role.USER, text),)


def assistant(text: str) -> tuple[Message, ...]:
    """Return a completion of one assistant turn."""
    return (Message(Role.ASSISTANT, text),)


def system_turn(row: JsonObject, name: str = "system") -> tuple[Message, ...]:
    """Return the system message of a field that may be missing, null or blank."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    return (Message(Role.SYSTEM, text_field(row, name)),)


def prompt_of(row: JsonObject, name: str) -> tuple[Message, ...]:
    """Return a prompt that is a text or a list of messages."""
    if isinstance(row.get(name), list):
        return messages_field(row, name)
    return user(text_field(row, name))


def answer_of(row: JsonObject, name: str, at: str = "") -> tuple[Message, ...]:
    """Return an answer that is a text, one message or a list of messages."""
    match value := present(row, name, at):
        case list():
            return messages_field(row, name, at)
        case dict():
            return (message_of(value, f"{at}/{name}"),)
        case str():
            return assistant(text_field(row, name, at))
        case _:
            raise wrong_type(value, name, "string, message or list of messages", at)


def common_turns(a: Sequence[Message], b: Sequence[Message]) -> int:
    """Return how many leading turns are the same."""
    same = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        same += 1
    return same


def split_common(
    a: tuple[Message, ...], b: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """Return the common first turns of two conversations and what is left of each.

    Raises:
        RowFault: the two are the same.
    """
    if a == b:
        raise RowFault(RowCode.IDENTICAL_PAIR, SAME_SIDES)
    same = common_turns(a, b)
    return a[:same], (a[same:], b[same:])


def without_prompt(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return an answer without the turns of the prompt, if it repeats them."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def unused(row: JsonObject, used: Sequence[str]) -> tuple[str, ...]:
    """Return the fields of a row that a layout did not read."""
    return tuple(name for name in row if name not in used and name != "source")


def source_of(row: JsonObject, layout: Layout) -> str:
    """Return the field `source` where it is a text, else the layout's name."""
    source = row.get("source")
    return source if isinstance(source, str) else layout.name.value


def build_pair(
    row: JsonObject,
    *,
    prompt: tuple[Message, ...],
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    used: tuple[str, ...],
    layout: Layout,
) -> Pair:
    """Return the checked pair of `chosen` and `rejected` with margin, source and meta of the row.

    The margin is the field `margin`, else score_chosen - score_rejected where both are given.

    Raises:
        RowFault: the turns break a rule of `checks`.
    """
    check_turns(
        prompt, chosen, rejected, at=("/prompt" if "prompt" in used else "/chosen", "/chosen",
        "/rejected"),
    )  # fmt: skip
    margin = optional_number(row, "margin")
    better, worse = optional_number(row, "score_chosen"), optional_number(row, "score_rejected")
    if margin is None and better is not None and worse is not None:
        margin = better - worse
    meta = row.get("meta")
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        source=source_of(row, layout),
        meta=meta if isinstance(meta, dict) else ({} if meta is None else {"meta": meta}),
        ignored=tuple(name for name in row if name not in used and name not in _OPTIONAL),
    )


def check_turns(
    prompt: tuple[Message, ...],
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    *,
    at: tuple[str, str, str],
) -> None:
    """Check the three parts of a pair; `at` are their pointers.

    Raises:
        RowFault: the turns break a rule of `checks`.
    """
    check_prompt(prompt, at[0])
    check_completion(chosen, at[1])
    check_completion(rejected, at[2])
    check_differs(chosen, rejected)


def preferred_pair(
    row: JsonObject,
    *,
    layout: Layout,
    prompt: tuple[Message, ...],
    sides: tuple[tuple[Message, ...], tuple[Message, ...]],
    names: tuple[str, str, str],
    winner: int | None = 0,
    margin: float | None = None,
    used: Sequence[str] = (),
) -> Pair:
    """Return the checked pair of two sides; `winner` 0 or 1, None for a tie.

    `names` are the fields of the prompt and of the two sides, `used` the others that were read.

    Raises:
        RowFault: the turns break a rule of `checks`.
    """
    check_turns(prompt, *sides, at=(f"/{names[0]}", f"/{names[1]}", f"/{names[2]}"))
    chosen, rejected = sides if winner != 1 else sides[::-1]
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        source=source_of(row, layout),
        meta={},
        ignored=unused(row, (*names, *used)),
        tie=winner is None,
    )


def checked_answers(
    row: JsonObject,
    *,
    layout: Layout,
    prompt: tuple[Message, ...],
    answers: Sequence[tuple[tuple[Message, ...], float, str]],
    at: str,
    used: Sequence[str],
) -> Answers:
    """Return checked answers, each given as turns, score and pointer; `at` is the prompt's.

    Raises:
        RowFault: the turns break a rule of `checks`.
    """
    check_prompt(prompt, at)
    for messages, _, pointer in answers:
        check_completion(messages, pointer)
    return Answers(
        prompt=prompt,
        answers=tuple(Answer(messages, score) for messages, score, _ in answers),
        source=source_of(row, layout),
        meta={},
        ignored=unused(row, used),
    )
