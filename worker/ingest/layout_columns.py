"""Layouts whose rows are columns of text: one for the prompt, one for each side."""

from collections.abc import Iterator
from typing import ClassVar

from core.layout_names import LayoutName
from worker.ingest.canonical import Message, Pair, Role
from worker.ingest.checks import list_field, number_field, text_field, wrong_type
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_common import (
    Layout,
    answer_of,
    assistant,
    has_numbers,
    has_texts,
    preferred_pair,
    prompt_of,
    system_turn,
    user,
)
from worker.ingest.layout_hh import HhTranscripts
from worker.ingest.layout_trl import (
    ConversationalExplicit,
    ConversationalImplicit,
    StandardExplicit,
    StandardImplicit,
)
from worker.ingest.rows import JsonObject


class ArgillaUltraFeedback(Layout):
    """Argilla's binarized preferences: texts with their average ratings."""

    name = LayoutName.ARGILLA_ULTRAFEEDBACK
    fields = (
        "instruction",
        "chosen_response",
        "rejected_response",
        "chosen_avg_rating",
        "rejected_avg_rating",
    )
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "instruction",
        "chosen": "chosen_response",
        "rejected": "rejected_response",
        "margin": "chosen_avg_rating - rejected_avg_rating",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the texts and both ratings are there."""
        return float(has_texts(row, *self.fields[:3]) and has_numbers(row, *self.fields[3:]))

    def convert(self, row: JsonObject) -> Pair:
        """The margin is the difference of the ratings."""
        better, worse = (number_field(row, name) for name in self.fields[3:])
        return preferred_pair(
            row,
            layout=self,
            prompt=user(text_field(row, "instruction")),
            sides=(
                assistant(text_field(row, "chosen_response")),
                assistant(text_field(row, "rejected_response")),
            ),
            names=self.fields[:3],
            margin=better - worse,
            used=self.fields,
        )


class StackExchange(Layout):
    """Stack Exchange paired: `response_j` was preferred to `response_k`."""

    name = LayoutName.STACK_EXCHANGE
    fields = ("question", "response_j", "response_k")
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "question",
        "chosen": "response_j",
        "rejected": "response_k",
    }

    def score(self, row: JsonObject) -> float:
        """1 when all three are texts."""
        return float(has_texts(row, *self.fields))

    def convert(self, row: JsonObject) -> Pair:
        """As it is."""
        return preferred_pair(
            row,
            layout=self,
            prompt=user(text_field(row, "question")),
            sides=(
                assistant(text_field(row, "response_j")),
                assistant(text_field(row, "response_k")),
            ),
            names=self.fields,
        )


class OrcaPairs(Layout):
    """Intel's orca_dpo_pairs: a system message, blank for some rows, and a question."""

    name = LayoutName.ORCA
    fields = ("system", "question", "chosen", "rejected")
    mapping: ClassVar[dict[str, str]] = {
        "system": "system",
        "prompt": "question",
        "chosen": "chosen",
        "rejected": "rejected",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the three texts are there and a `system` that may be null."""
        return float(
            "system" in row
            and isinstance(row["system"], str | None)
            and has_texts(row, *self.fields[1:])
        )

    def convert(self, row: JsonObject) -> Pair:
        """A blank system message is left out."""
        return preferred_pair(
            row,
            layout=self,
            prompt=system_turn(row) + user(text_field(row, "question")),
            sides=(
                assistant(text_field(row, "chosen")),
                assistant(text_field(row, "rejected")),
            ),
            names=("question", "chosen", "rejected"),
            used=self.fields,
        )


class LlamaFactoryAlpaca(Layout):
    """LLaMA-Factory's alpaca form: `input` continues `instruction`, `history` comes before."""

    name = LayoutName.LLAMA_FACTORY_ALPACA
    fields = ("instruction", "chosen", "rejected")
    mapping: ClassVar[dict[str, str]] = {
        "system": "system",
        "prompt": "history, instruction, input",
        "chosen": "chosen",
        "rejected": "rejected",
    }

    def score(self, row: JsonObject) -> float:
        """1 beside `input` or `history`; 0.95 without: other tools use the three names too."""
        if not has_texts(row, *self.fields):
            return 0.0
        return 1.0 if "input" in row or "history" in row else 0.95

    def convert(self, row: JsonObject) -> Pair:
        """The prompt is `instruction`, and `input` on the next line where there is one."""
        return preferred_pair(
            row,
            layout=self,
            prompt=alpaca_prompt(row),
            sides=(
                assistant(text_field(row, "chosen")),
                assistant(text_field(row, "rejected")),
            ),
            names=self.fields,
            used=ALPACA_PROMPT,
        )


ALPACA_PROMPT = ("system", "history", "instruction", "input")


def alpaca_prompt(row: JsonObject) -> tuple[Message, ...]:
    """Return system message, history and instruction with its input."""
    text = text_field(row, "instruction")
    if row.get("input") not in (None, ""):
        text += "\n" + text_field(row, "input")
    return (*system_turn(row), *_history(row), *user(text))


def _history(row: JsonObject) -> Iterator[Message]:
    """Yield the earlier turns: a list of [question, answer]."""
    if row.get("history") in (None, []):
        return
    for index, item in enumerate(list_field(row, "history")):
        if not isinstance(item, list) or len(item) != len(("question", "answer")):
            raise wrong_type(item, str(index), "[question, answer]", "/history")
        for role, text in zip((Role.USER, Role.ASSISTANT), item, strict=True):
            if not isinstance(text, str):
                raise wrong_type(text, str(index), "[question, answer] of texts", "/history")
            yield Message(role, text)


class Axolotl(Layout):
    """Axolotl's formats: each part under one of a few names, and a system message."""

    name = LayoutName.AXOLOTL
    fields = ("prompt", "chosen", "rejected")
    mapping: ClassVar[dict[str, str]] = {
        "system": "system",
        "prompt": "prompt, input, question or instruction",
        "chosen": "chosen or chosen_response",
        "rejected": "rejected or rejected_response",
    }
    _PROMPTS = ("prompt", "input", "question", "instruction")
    _CHOSEN = ("chosen", "chosen_response")
    _REJECTED = ("rejected", "rejected_response")

    def score(self, row: JsonObject) -> float:
        """0.9 when each part is found once; less where the names are those of another layout."""
        names = self._names(row)
        if names is None or sum(name in row for name in self._PROMPTS) > 1:
            return 0.0
        if names == self.fields:
            return 0.9 if row.get("system") else 0.0
        if names[1:] == ("chosen", "rejected") and "system" in row:
            return 0.8
        return 0.85 if names[0] == "instruction" else 0.9

    def convert(self, row: JsonObject) -> Pair:
        """The first name of each part that the row has is read."""
        names = self._names(row)
        if names is None:
            # The plain names: the fault says which one is missing or of which type it is.
            names = ("prompt", "chosen", "rejected")
        return preferred_pair(
            row,
            layout=self,
            prompt=system_turn(row) + user(text_field(row, names[0])),
            sides=(assistant(text_field(row, names[1])), assistant(text_field(row, names[2]))),
            names=names,
            used=("system",),
        )

    def _names(self, row: JsonObject) -> tuple[str, str, str] | None:
        found = [
            next((name for name in names if isinstance(row.get(name), str)), None)
            for names in (self._PROMPTS, self._CHOSEN, self._REJECTED)
        ]
        prompt, chosen, rejected = found
        if prompt is None or chosen is None or rejected is None:
            return None
        return prompt, chosen, rejected


class Misspelled(Layout):
    """`choosen` for `chosen`, as in some uploads to the Hub; read as one of TRL's layouts or HH."""

    name = LayoutName.MISSPELLED
    fields = ("choosen", "rejected")
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "chosen": "choosen",
        "rejected": "rejected",
    }
    warning = "the column `choosen` was read as `chosen`: correct the name"

    def score(self, row: JsonObject) -> float:
        """1 when the row with the name corrected has one of the layouts."""
        if row.get("choosen") is None or "chosen" in row:
            return 0.0
        return float(_plain_score(_corrected(row)) > 0.0)

    def convert(self, row: JsonObject) -> Pair:
        """Convert the row with the name corrected."""
        if "chosen" in row:
            raise RowFault(
                RowCode.DUPLICATE_KEY, "the row has `chosen` and `choosen`", pointer="/choosen"
            )
        corrected = _corrected(row)
        return max(_PLAIN, key=lambda layout: layout.score(corrected)).convert(corrected)


_PLAIN: tuple[
    StandardExplicit
    | ConversationalExplicit
    | HhTranscripts
    | ConversationalImplicit
    | StandardImplicit,
    ...,
] = (
    StandardExplicit(),
    ConversationalExplicit(),
    HhTranscripts(),
    ConversationalImplicit(),
    StandardImplicit(),
)


def _corrected(row: JsonObject) -> JsonObject:
    return {("chosen" if name == "choosen" else name): value for name, value in row.items()}


def _plain_score(row: JsonObject) -> float:
    return max(layout.score(row) for layout in _PLAIN)


class MessagesChosenRejected(Layout):
    """`messages` with `chosen` and `rejected` beside it: often taught, and no vendor's form."""

    name = LayoutName.MESSAGES_CHOSEN_REJECTED
    fields = ("messages", "chosen", "rejected")
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "messages",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    warning = (
        "`messages` with `chosen` and `rejected` is not OpenAI's preference form (`input`, "
        "`preferred_output`, `non_preferred_output`); it was read as prompt and answers"
    )

    def score(self, row: JsonObject) -> float:
        """1 when `messages` is a list that ends before the answers and there is no `prompt`."""
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages or "prompt" in row:
            return 0.0
        sides = (row.get("chosen"), row.get("rejected"))
        if not all(isinstance(side, str | list) for side in sides):
            return 0.0
        return 0.4 if _has_user_turn(sides[0]) else 1.0

    def convert(self, row: JsonObject) -> Pair:
        """`messages` is the prompt."""
        return preferred_pair(
            row,
            layout=self,
            prompt=prompt_of(row, "messages"),
            sides=(answer_of(row, "chosen"), answer_of(row, "rejected")),
            names=self.fields,
        )


def _has_user_turn(side: object) -> bool:
    return isinstance(side, list) and any(
        isinstance(turn, dict) and turn.get("role") == "user" for turn in side
    )
