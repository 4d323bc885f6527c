"""Layouts whose rows have no pairs but answers: ranked, scored, or good and bad ones."""

from typing import ClassVar, TypeGuard

from core.layout_names import LayoutName
from worker.ingest.canonical import Answers, Message, Role
from worker.ingest.checks import (
    messages_field,
    number_field,
    object_field,
    objects_field,
    optional_number,
    present,
    text_field,
    wrong_type,
)
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_chat import sharegpt_turns
from worker.ingest.layout_columns import ALPACA_PROMPT, alpaca_prompt
from worker.ingest.layout_common import (
    Grouping,
    Layout,
    answer_of,
    assistant,
    checked_answers,
    has_numbers,
    has_texts,
    prompt_of,
    system_turn,
    user,
)
from worker.ingest.layout_hh import is_transcript, transcript
from worker.ingest.rows import JsonObject, JsonValue

_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def _first(row: JsonObject, name: str) -> JsonObject:
    """Return the first object of a list, or an empty one."""
    value = row.get(name)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return value[0]
    return {}


class UltraFeedbackRaw(Layout):
    """UltraFeedback as published: four completions with ratings of four aspects.

    `overall_score` is not read: early revisions have 10 where 1 was meant.
    """

    name = LayoutName.ULTRAFEEDBACK_RAW
    fields = ("instruction", "completions")
    grouping = Grouping.ROW
    can_tie = True
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "instruction",
        "answers": "completions[].response",
        "score": "completions[].fine-grained_score, else the mean of its four ratings",
    }

    def score(self, row: JsonObject) -> float:
        """1 when completions have a response and a score or annotations."""
        first = _first(row, "completions")
        return float(
            has_texts(row, "instruction")
            and "response" in first
            and ("annotations" in first or "fine-grained_score" in first)
        )

    def convert(self, row: JsonObject) -> Answers:
        """Completions are scored by the mean rating of the four aspects."""
        return checked_answers(
            row,
            layout=self,
            prompt=user(text_field(row, "instruction")),
            answers=[
                (
                    assistant(text_field(item, "response", f"/completions/{index}")),
                    _fine_grained(item, f"/completions/{index}"),
                    f"/completions/{index}/response",
                )
                for index, item in enumerate(objects_field(row, "completions"))
            ],
            at="/instruction",
            used=self.fields,
        )


def _fine_grained(item: JsonObject, at: str) -> float:
    score = optional_number(item, "fine-grained_score", at)
    if score is not None:
        return score
    annotations = object_field(item, "annotations", at)
    ratings = []
    for aspect in _ASPECTS:
        place = f"{at}/annotations/{aspect}"
        rating = present(object_field(annotations, aspect, f"{at}/annotations"), "Rating", place)
        try:
            ratings.append(float(str(rating)))
        except ValueError:
            raise RowFault(
                RowCode.UNKNOWN_VALUE, "`Rating` is not a number", pointer=f"{place}/Rating"
            ) from None
    return sum(ratings) / len(ratings)


class HelpSteer2(Layout):
    """HelpSteer2: one response a row; rows beside each other share the prompt."""

    name = LayoutName.HELPSTEER2
    fields = ("prompt", "response", "helpfulness")
    grouping = Grouping.ADJACENT
    can_tie = True
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "answers": "response of neighbouring rows with the same prompt",
        "score": "helpfulness",
    }

    def score(self, row: JsonObject) -> float:
        """1 when prompt, response and a helpfulness are there."""
        return float(has_texts(row, "prompt", "response") and has_numbers(row, "helpfulness"))

    def convert(self, row: JsonObject) -> Answers:
        """The response with its helpfulness."""
        return checked_answers(
            row,
            layout=self,
            prompt=user(text_field(row, "prompt")),
            answers=[
                (
                    assistant(text_field(row, "response")),
                    number_field(row, "helpfulness"),
                    "/response",
                )
            ],
            at="/prompt",
            used=self.fields,
        )


class Nectar(Layout):
    """Nectar: a transcript and its answers, ranked from 1."""

    name = LayoutName.NECTAR
    fields = ("prompt", "answers")
    grouping = Grouping.ROW
    can_tie = True
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "answers": "answers[].answer",
        "score": "answers[].rank, the lowest is best",
    }

    def score(self, row: JsonObject) -> float:
        """1 when answers have an answer and a rank."""
        first = _first(row, "answers")
        return float(has_texts(row, "prompt") and "answer" in first and "rank" in first)

    def convert(self, row: JsonObject) -> Answers:
        """A prompt that is no transcript is one user turn."""
        text = text_field(row, "prompt")
        return checked_answers(
            row,
            layout=self,
            prompt=transcript(row, "prompt", answer_open=True)
            if is_transcript(text)
            else user(text),
            answers=[
                (
                    assistant(text_field(item, "answer", f"/answers/{index}").strip()),
                    -number_field(item, "rank", f"/answers/{index}"),
                    f"/answers/{index}/answer",
                )
                for index, item in enumerate(objects_field(row, "answers"))
            ],
            at="/prompt",
            used=self.fields,
        )


class NemoRl(Layout):
    """NeMo-RL: a context and completions, ranked from 0."""

    name = LayoutName.NEMO_RL
    fields = ("context", "completions")
    grouping = Grouping.ROW
    can_tie = True
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "context",
        "answers": "completions[].completion",
        "score": "completions[].rank, the lowest is best",
    }

    def score(self, row: JsonObject) -> float:
        """1 when completions have a completion and a rank."""
        first = _first(row, "completions")
        return float(
            isinstance(row.get("context"), str | list) and "completion" in first and "rank" in first
        )

    def convert(self, row: JsonObject) -> Answers:
        """As it is."""
        return checked_answers(
            row,
            layout=self,
            prompt=prompt_of(row, "context"),
            answers=[
                (
                    answer_of(item, "completion", f"/completions/{index}"),
                    -number_field(item, "rank", f"/completions/{index}"),
                    f"/completions/{index}/completion",
                )
                for index, item in enumerate(objects_field(row, "completions"))
            ],
            at="/context",
            used=self.fields,
        )


class Kto(Layout):
    """KTO and TRL's unpaired preference: one completion and whether it is good."""

    name = LayoutName.KTO
    fields = ("prompt", "completion", "label")
    grouping = Grouping.PROMPT
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "answers": "completion of rows with the same prompt",
        "score": "label",
    }

    def score(self, row: JsonObject) -> float:
        """1 when prompt, completion and a true or false label are there."""
        return float(
            all(isinstance(row.get(name), str | list) for name in ("prompt", "completion"))
            and _is_label(row.get("label"))
        )

    def convert(self, row: JsonObject) -> Answers:
        """Good completions are compared with bad ones of the same prompt."""
        prompt = prompt_of(row, "prompt")
        return _labelled(
            row, layout=self, prompt=prompt, answer=answer_of(row, "completion"),
            names=("prompt", "completion", "label"), used=self.fields,
        )  # fmt: skip


class KtoLlamaFactory(Layout):
    """LLaMA-Factory's KTO form: alpaca, messages or sharegpt, with `kto_tag`."""

    name = LayoutName.KTO_LLAMA_FACTORY
    fields = ("kto_tag",)
    grouping = Grouping.PROMPT
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "instruction and input; or messages or conversations before the last turn",
        "answers": "output, or the last turn, of rows with the same prompt",
        "score": "kto_tag",
    }

    def score(self, row: JsonObject) -> float:
        """1 when a true or false `kto_tag` and a text or a conversation are there."""
        return float(
            _is_label(row.get("kto_tag"))
            and (
                has_texts(row, "instruction", "output")
                or any(isinstance(row.get(n), list) for n in ("messages", "conversations"))
            )
        )

    def convert(self, row: JsonObject) -> Answers:
        """`instruction` with `output`, else the last turn of a conversation."""
        used = (*ALPACA_PROMPT, "output", "messages", "conversations", "kto_tag")
        if row.get("messages") is not None:
            turns, name = system_turn(row) + messages_field(row, "messages"), "messages"
        elif row.get("conversations") is not None:
            turns, name = system_turn(row) + sharegpt_turns(row), "conversations"
        else:
            return _labelled(
                row, layout=self, prompt=alpaca_prompt(row), answer=answer_of(row, "output"),
                names=("instruction", "output", "kto_tag"), used=used,
            )  # fmt: skip
        return _labelled(
            row, layout=self, prompt=turns[:-1], answer=turns[-1:],
            names=(name, name, "kto_tag"), used=used,
        )  # fmt: skip


class KtoMsSwift(Layout):
    """ms-swift's KTO form: `messages`, the last of which is good or bad as `label` says."""

    name = LayoutName.KTO_MS_SWIFT
    fields = ("messages", "label")
    grouping = Grouping.PROMPT
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "messages, before the last",
        "answers": "messages, the last, of rows with the same prompt",
        "score": "label",
    }

    def score(self, row: JsonObject) -> float:
        """1 when messages and a true or false label are there."""
        return float(isinstance(row.get("messages"), list) and _is_label(row.get("label")))

    def convert(self, row: JsonObject) -> Answers:
        """The last message is the answer."""
        turns = messages_field(row, "messages")
        return _labelled(
            row, layout=self, prompt=turns[:-1], answer=turns[-1:],
            names=("messages", "messages", "label"), used=self.fields,
        )  # fmt: skip


def _is_label(value: JsonValue) -> TypeGuard[bool | int | float]:
    """Whether a value says good or bad: true, false, 1 or 0 (tables have no true and false)."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def _labelled(
    row: JsonObject,
    *,
    layout: Layout,
    prompt: tuple[Message, ...],
    answer: tuple[Message, ...],
    names: tuple[str, str, str],
    used: tuple[str, ...],
) -> Answers:
    """Return one answer with score 1 or 0."""
    label = present(row, names[2])
    if not _is_label(label):
        raise wrong_type(label, names[2], "true or false, or 1 or 0")
    if answer and answer[-1].role is not Role.ASSISTANT:
        raise RowFault(
            RowCode.ROLE_ORDER,
            "the last turn is no answer of the assistant",
            pointer=f"/{names[1]}",
        )
    return checked_answers(
        row,
        layout=layout,
        prompt=prompt,
        answers=[(answer, float(label), f"/{names[1]}")],
        at=f"/{names[0]}",
        used=used,
    )
