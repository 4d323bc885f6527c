"""Layouts whose rows are conversations: lists of messages."""

from typing import ClassVar

from core.layout_names import LayoutName
from worker.ingest.canonical import Message, Pair, Role
from worker.ingest.checks import (
    message_of,
    messages_field,
    number_field,
    object_field,
    objects_field,
    one_of,
    optional_number,
    text_field,
)
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_common import (
    Layout,
    answer_of,
    preferred_pair,
    prompt_of,
    split_common,
    system_turn,
    user,
    without_prompt,
)
from worker.ingest.rows import JsonObject

_SHAREGPT_ROLES = {
    "human": Role.USER,
    "user": Role.USER,
    "gpt": Role.ASSISTANT,
    "assistant": Role.ASSISTANT,
    "system": Role.SYSTEM,
    "observation": Role.TOOL,
    "function_call": Role.ASSISTANT,
}


def _lists(row: JsonObject, *names: str) -> bool:
    return all(isinstance(row.get(name), list) for name in names)


def _split(
    prompt: tuple[Message, ...], sides: tuple[tuple[Message, ...], tuple[Message, ...]]
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """Return prompt and answers of sides that may repeat the conversation before the answer.

    Some exports give the first user turn as `prompt` and again at the head of both sides: where a
    side has a turn of user or system, the common turns of both are the whole prompt.
    """
    if all(turn.role not in (Role.USER, Role.SYSTEM) for side in sides for turn in side):
        return prompt, sides
    return split_common(*sides)


class H4UltraFeedback(Layout):
    """Hugging Face H4's binarized UltraFeedback: the sides repeat the user turn of `prompt`."""

    name = LayoutName.H4_ULTRAFEEDBACK
    fields = ("prompt", "chosen", "rejected")
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "chosen": "chosen, the turns after the prompt",
        "rejected": "rejected, the turns after the prompt",
        "margin": "score_chosen - score_rejected",
    }

    def score(self, row: JsonObject) -> float:
        """1 beside `prompt_id` or `messages`; 0.85 for the same types without them."""
        if not isinstance(row.get("prompt"), str) or not _lists(row, "chosen", "rejected"):
            return 0.0
        return 1.0 if "prompt_id" in row or "messages" in row else 0.85

    def convert(self, row: JsonObject) -> Pair:
        """Turns that both sides repeat are the prompt."""
        prompt, sides = _split(
            user(text_field(row, "prompt")),
            (messages_field(row, "chosen"), messages_field(row, "rejected")),
        )
        better, worse = (optional_number(row, f"score_{side}") for side in ("chosen", "rejected"))
        return preferred_pair(
            row,
            layout=self,
            prompt=prompt,
            sides=sides,
            names=self.fields,
            margin=None if better is None or worse is None else better - worse,
            used=("prompt_id", "messages", "score_chosen", "score_rejected"),
        )


class ArgillaCleaned(Layout):
    """Argilla's cleaned UltraFeedback, its rating columns with hyphens.

    The names of the columns are from memory; the spelling with underscores is read as well.
    """

    name = LayoutName.ARGILLA_CLEANED
    fields = ("prompt", "chosen", "rejected", "chosen-rating", "rejected-rating")
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "chosen": "chosen, the turns after the prompt",
        "rejected": "rejected, the turns after the prompt",
        "margin": "chosen-rating - rejected-rating",
    }

    def score(self, row: JsonObject) -> float:
        """1 when prompt, both conversations and both ratings are there."""
        return float(
            isinstance(row.get("prompt"), str)
            and _lists(row, "chosen", "rejected")
            and all(self._rating(row, side) in row for side in ("chosen", "rejected"))
        )

    def convert(self, row: JsonObject) -> Pair:
        """The margin is the difference of the ratings."""
        ratings = (self._rating(row, "chosen"), self._rating(row, "rejected"))
        better, worse = (number_field(row, name) for name in ratings)
        prompt, sides = _split(
            user(text_field(row, "prompt")),
            (messages_field(row, "chosen"), messages_field(row, "rejected")),
        )
        return preferred_pair(
            row,
            layout=self,
            prompt=prompt,
            sides=sides,
            names=("prompt", "chosen", "rejected"),
            margin=better - worse,
            used=ratings,
        )

    @staticmethod
    def _rating(row: JsonObject, side: str) -> str:
        return f"{side}_rating" if f"{side}_rating" in row else f"{side}-rating"


class OpenAi(Layout):
    """OpenAI's preference data, also of Azure, Together and Fireworks."""

    name = LayoutName.OPENAI
    fields = ("input", "preferred_output", "non_preferred_output")
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "input.messages",
        "chosen": "preferred_output",
        "rejected": "non_preferred_output",
    }

    def score(self, row: JsonObject) -> float:
        """1 when `input` has messages and both outputs are lists."""
        given = row.get("input")
        return float(
            isinstance(given, dict)
            and isinstance(given.get("messages"), list)
            and _lists(row, *self.fields[1:])
        )

    def convert(self, row: JsonObject) -> Pair:
        """As it is; a `reasoning` beside a content is not read."""
        return preferred_pair(
            row,
            layout=self,
            prompt=messages_field(object_field(row, "input"), "messages", "/input"),
            sides=(
                messages_field(row, "preferred_output"),
                messages_field(row, "non_preferred_output"),
            ),
            names=self.fields,
        )


class ShareGpt(Layout):
    """LLaMA-Factory's sharegpt form: turns of `from` and `value`."""

    name = LayoutName.LLAMA_FACTORY_SHAREGPT
    fields = ("conversations", "chosen", "rejected")
    mapping: ClassVar[dict[str, str]] = {
        "system": "system",
        "prompt": "conversations",
        "chosen": "chosen",
        "rejected": "rejected",
    }

    def score(self, row: JsonObject) -> float:
        """1 when `conversations` is a list and both sides are one turn."""
        return float(
            _lists(row, "conversations")
            and all(isinstance(row.get(name), dict) for name in ("chosen", "rejected"))
        )

    def convert(self, row: JsonObject) -> Pair:
        """`human` is user, `gpt` and `function_call` are assistant, `observation` is tool."""
        sides = tuple(
            (sharegpt_turn(object_field(row, name), f"/{name}"),) for name in ("chosen", "rejected")
        )
        return preferred_pair(
            row,
            layout=self,
            prompt=system_turn(row) + sharegpt_turns(row),
            sides=(sides[0], sides[1]),
            names=self.fields,
            used=("system",),
        )


def sharegpt_turns(row: JsonObject) -> tuple[Message, ...]:
    """Return the turns of `conversations`."""
    return tuple(
        sharegpt_turn(item, f"/conversations/{index}")
        for index, item in enumerate(objects_field(row, "conversations"))
    )


def sharegpt_turn(item: JsonObject, pointer: str) -> Message:
    """Return one turn of `from` and `value`, or of `role` and `content`."""
    if "from" not in item and "role" in item:
        return message_of(item, pointer)
    speaker = text_field(item, "from", pointer)
    if speaker not in _SHAREGPT_ROLES:
        raise RowFault(
            RowCode.UNKNOWN_ROLE,
            f"`from` is not one of {', '.join(_SHAREGPT_ROLES)}",
            pointer=f"{pointer}/from",
        )
    return Message(_SHAREGPT_ROLES[speaker], text_field(item, "value", pointer))


class AxolotlChat(Layout):
    """Axolotl's chat_template.default: `messages` and one message on each side."""

    name = LayoutName.AXOLOTL_CHAT
    fields = ("messages", "chosen", "rejected")
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "messages",
        "chosen": "chosen",
        "rejected": "rejected",
    }

    def score(self, row: JsonObject) -> float:
        """1 when `messages` is a list and both sides are objects."""
        return float(
            _lists(row, "messages")
            and all(isinstance(row.get(name), dict) for name in self.fields[1:])
        )

    def convert(self, row: JsonObject) -> Pair:
        """As it is."""
        return preferred_pair(
            row,
            layout=self,
            prompt=messages_field(row, "messages"),
            sides=(answer_of(row, "chosen"), answer_of(row, "rejected")),
            names=self.fields,
        )


class MsSwift(Layout):
    """ms-swift: the last of `messages` is chosen; the other is a text or messages."""

    name = LayoutName.MS_SWIFT
    fields = ("messages", "rejected_response")
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "messages, before the last",
        "chosen": "messages, the last",
        "rejected": "rejected_response or rejected_messages",
    }

    def score(self, row: JsonObject) -> float:
        """1 when `messages` is a list and the other answer is there."""
        other = row.get("rejected_response") or row.get("rejected_messages")
        return float(_lists(row, "messages") and isinstance(other, str | list))

    def convert(self, row: JsonObject) -> Pair:
        """Messages that `rejected_messages` repeats are taken off."""
        *prompt, chosen = messages_field(row, "messages")
        name = "rejected_messages" if row.get("rejected_messages") else "rejected_response"
        return preferred_pair(
            row,
            layout=self,
            prompt=tuple(prompt),
            sides=((chosen,), without_prompt(tuple(prompt), answer_of(row, name))),
            names=("messages", "messages", name),
        )


class Arena(Layout):
    """Chatbot Arena: two conversations and which of them won."""

    name = LayoutName.ARENA
    fields = ("conversation_a", "conversation_b", "winner")
    can_tie = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "the common turns of both conversations",
        "a": "conversation_a",
        "b": "conversation_b",
        "preference": "winner",
    }

    def score(self, row: JsonObject) -> float:
        """1 when both conversations and a winner are there."""
        return float(
            _lists(row, "conversation_a", "conversation_b") and isinstance(row.get("winner"), str)
        )

    def convert(self, row: JsonObject) -> Pair:
        """`tie` and `tie (bothbad)` are ties."""
        winners: dict[object, int | None] = {
            "model_a": 0,
            "model_b": 1,
            "tie": None,
            "tie (bothbad)": None,
            "both_bad": None,
        }
        winner = one_of(row, "winner", ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad"))
        prompt, sides = split_common(
            messages_field(row, "conversation_a"), messages_field(row, "conversation_b")
        )
        return preferred_pair(
            row,
            layout=self,
            prompt=prompt,
            sides=sides,
            names=("conversation_a", "conversation_a", "conversation_b"),
            winner=winners[winner],
            used=self.fields,
        )


class HelpSteer3(Layout):
    """HelpSteer3: a context and two responses; negative preference means the first is better."""

    name = LayoutName.HELPSTEER3
    fields = ("context", "response1", "response2", "overall_preference")
    can_tie = True
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "context",
        "a": "response1",
        "b": "response2",
        "preference": "overall_preference",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the four fields are there."""
        return float(
            isinstance(row.get("context"), str | list)
            and all(isinstance(row.get(name), str) for name in ("response1", "response2"))
            and isinstance(row.get("overall_preference"), int | float)
        )

    def convert(self, row: JsonObject) -> Pair:
        """The sign is the order, the size the margin, 0 a tie."""
        preference = number_field(row, "overall_preference")
        return preferred_pair(
            row,
            layout=self,
            prompt=prompt_of(row, "context"),
            sides=(answer_of(row, "response1"), answer_of(row, "response2")),
            names=self.fields[:3],
            winner=None if preference == 0 else int(preference > 0),
            margin=abs(preference),
            used=self.fields,
        )
