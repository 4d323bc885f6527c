"""Layouts whose rows have two answers and say beside them which one is better."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from core.layout_names import LayoutName
from worker.ingest.canonical import Message, Pair, Role
from worker.ingest.checks import (
    number_field,
    object_field,
    objects_field,
    one_of,
    optional_number,
    text_field,
    wrong_type,
)
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_common import (
    Layout,
    assistant,
    has_numbers,
    has_texts,
    preferred_pair,
    split_common,
    user,
)
from worker.ingest.rows import JsonObject

Sides = tuple[tuple[Message, ...], tuple[Message, ...]]


def _two_texts(row: JsonObject, first: str, second: str) -> Sides:
    return assistant(text_field(row, first)), assistant(text_field(row, second))


def _sign_winner(preference: float) -> int | None:
    """Negative: the first; positive: the second; 0: a tie."""
    return None if preference == 0 else int(preference > 0)


class Shp(Layout):
    """Stanford Human Preferences: two comments on a post, with their votes."""

    name = LayoutName.SHP
    fields = ("history", "human_ref_A", "human_ref_B", "labels")
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "history",
        "a": "human_ref_A",
        "b": "human_ref_B",
        "preference": "labels",
        "margin": "log(score_ratio)",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the post, both comments and a label are there."""
        return float(has_texts(row, *self.fields[:3]) and has_numbers(row, "labels"))

    def convert(self, row: JsonObject) -> Pair:
        """Label 1: A is better. The margin is the logarithm of the ratio of the votes."""
        label = one_of(row, "labels", (0, 1))
        ratio = optional_number(row, "score_ratio")
        if ratio is not None and ratio <= 0.0:
            raise RowFault(
                RowCode.UNKNOWN_VALUE, "`score_ratio` is not positive", pointer="/score_ratio"
            )
        return preferred_pair(
            row,
            layout=self,
            prompt=user(text_field(row, "history")),
            sides=_two_texts(row, "human_ref_A", "human_ref_B"),
            names=("history", "human_ref_A", "human_ref_B"),
            winner=0 if label == 1 else 1,
            margin=None if ratio is None else abs(math.log(ratio)),
            used=("labels", "score_ratio"),
        )


class HelpSteer2Preference(Layout):
    """HelpSteer2's preference file: two responses and a strength from -3 to 3.

    From memory: a positive strength means that the second response is better.
    """

    name = LayoutName.HELPSTEER2_PREFERENCE
    fields = ("prompt", "response_1", "response_2", "preference_strength")
    can_tie = True
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "a": "response_1",
        "b": "response_2",
        "preference": "preference_strength",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the texts and a strength are there."""
        return float(has_texts(row, *self.fields[:3]) and has_numbers(row, self.fields[3]))

    def convert(self, row: JsonObject) -> Pair:
        """The sign is the order, the size the margin, 0 a tie."""
        strength = number_field(row, "preference_strength")
        return preferred_pair(
            row,
            layout=self,
            prompt=user(text_field(row, "prompt")),
            sides=_two_texts(row, "response_1", "response_2"),
            names=("prompt", "response_1", "response_2"),
            winner=_sign_winner(strength),
            margin=abs(strength),
            used=self.fields,
        )


class ArenaKaggle(Layout):
    """The Arena's 55k votes of the Kaggle competition: cells are JSON texts of lists."""

    name = LayoutName.ARENA_KAGGLE
    fields = ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b")
    can_tie = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "a": "response_a",
        "b": "response_b",
        "preference": "winner_model_a, winner_model_b, winner_tie",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the three texts and the marks of the winner are there."""
        return float(has_texts(row, *self.fields[:3]) and all(n in row for n in self.fields[3:]))

    def convert(self, row: JsonObject) -> Pair:
        """Turns are laid out again; both conversations may differ in the last answer only."""
        marks = tuple(number_field(row, f"winner_{n}") for n in ("model_a", "model_b", "tie"))
        if sorted(marks) != [0, 0, 1]:
            raise RowFault(
                RowCode.UNKNOWN_VALUE,
                "not exactly one of `winner_model_a`, `winner_model_b`, `winner_tie` is 1",
                pointer="/winner_model_a",
            )
        questions = _decoded(row, "prompt")
        prompt, sides = split_common(
            _laid_out(questions, row, "response_a"), _laid_out(questions, row, "response_b")
        )
        return preferred_pair(
            row,
            layout=self,
            prompt=prompt,
            sides=sides,
            names=("prompt", "response_a", "response_b"),
            winner=(0, 1, None)[marks.index(1)],
            used=(*self.fields, "winner_tie"),
        )


def _decoded(row: JsonObject, name: str) -> list[str]:
    """Return the texts of a cell that is a JSON list."""
    try:
        value = json.loads(text_field(row, name))
    except (ValueError, RecursionError):
        raise RowFault(
            RowCode.WRONG_TYPE, f"`{name}` is no JSON list of texts", pointer=f"/{name}"
        ) from None
    if not isinstance(value, list) or not value:
        raise wrong_type(value, name, "a JSON list of texts")
    texts = []
    for item in value:
        if not isinstance(item, str):
            raise wrong_type(item, name, "a JSON list of texts")
        if not item.strip():
            raise RowFault(RowCode.EMPTY_TEXT, f"`{name}` has an empty turn", pointer=f"/{name}")
        texts.append(item)
    return texts


def _laid_out(questions: list[str], row: JsonObject, name: str) -> tuple[Message, ...]:
    answers = _decoded(row, name)
    if len(answers) != len(questions):
        raise RowFault(
            RowCode.ROLE_ORDER,
            f"`{name}` has {len(answers)} turns and `prompt` {len(questions)}",
            pointer=f"/{name}",
        )
    return tuple(
        turn
        for question, answer in zip(questions, answers, strict=True)
        for turn in (Message(Role.USER, question), Message(Role.ASSISTANT, answer))
    )


class SummarizeFromFeedback(Layout):
    """OpenAI's comparisons of summaries: a post or an article and two summaries of it."""

    name = LayoutName.SUMMARIZE_FROM_FEEDBACK
    fields = ("info", "summaries", "choice")
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "info: subreddit, title, post or article",
        "a": "summaries.0.text",
        "b": "summaries.1.text",
        "preference": "choice",
        "margin": "extra.confidence",
    }

    def score(self, row: JsonObject) -> float:
        """1 when info, summaries and a choice are there."""
        return float(
            isinstance(row.get("info"), dict)
            and isinstance(row.get("summaries"), list)
            and has_numbers(row, "choice")
        )

    def convert(self, row: JsonObject) -> Pair:
        """`choice` is the place of the better summary; the annotator's confidence is the margin."""
        info = object_field(row, "info")
        extra = row.get("extra")
        summaries = objects_field(row, "summaries")
        if len(summaries) != len(("a", "b")):
            raise RowFault(
                RowCode.UNKNOWN_VALUE,
                f"`summaries` has {len(summaries)} entries, expected 2",
                pointer="/summaries",
            )
        choice = one_of(row, "choice", (0, 1))
        first, second = (
            assistant(text_field(item, "text", f"/summaries/{index}").strip())
            for index, item in enumerate(summaries)
        )
        return preferred_pair(
            row,
            layout=self,
            prompt=user(_article(info)),
            sides=(first, second),
            names=("info", "summaries", "summaries"),
            winner=0 if choice == 0 else 1,
            margin=optional_number(extra, "confidence", "/extra")
            if isinstance(extra, dict)
            else None,
            used=(*self.fields, "extra"),
        )


def _article(info: JsonObject) -> str:
    """Return the text to be summarised in the form of the paper (Stiennon et al. 2020, app. B)."""
    text = text_field(info, "post" if info.get("post") else "article", "/info")
    heads = [
        f"{name.upper()}: {name_prefix}{info[name]}"
        for name, name_prefix in (("subreddit", "r/"), ("title", ""))
        if isinstance(info.get(name), str) and info[name]
    ]
    label = "POST" if info.get("post") else "ARTICLE"
    return "\n\n".join((*heads, f"{label}: {text}", "TL;DR:"))


@dataclass(frozen=True)
class PkuSafeRlhf(Layout):
    """PKU-SafeRLHF: one response may be better and the other one safer."""

    target: Literal["better", "safer"] = "better"

    name: ClassVar[LayoutName] = LayoutName.PKU_SAFERLHF
    fields: ClassVar[tuple[str, ...]] = (
        "prompt",
        "response_0",
        "response_1",
        "better_response_id",
        "safer_response_id",
    )
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "a": "response_0",
        "b": "response_1",
        "preference": "better_response_id or safer_response_id, as `target` says",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the texts and both verdicts are there."""
        return float(has_texts(row, *self.fields[:3]) and has_numbers(row, *self.fields[3:]))

    def convert(self, row: JsonObject) -> Pair:
        """The verdict that `target` names is read."""
        verdict = one_of(row, f"{self.target}_response_id", (0, 1))
        return preferred_pair(
            row,
            layout=self,
            prompt=user(text_field(row, "prompt")),
            sides=_two_texts(row, "response_0", "response_1"),
            names=("prompt", "response_0", "response_1"),
            winner=0 if verdict == 0 else 1,
            used=(f"{self.target}_response_id",),
        )


class WebGpt(Layout):
    """WebGPT comparisons: two answers with scores that mirror each other.

    From memory: `question` is an object with `full_text`; a text is read as well.
    """

    name = LayoutName.WEBGPT
    fields = ("question", "answer_0", "answer_1", "score_0", "score_1")
    can_tie = True
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "question.full_text",
        "a": "answer_0",
        "b": "answer_1",
        "preference": "score_0, score_1",
    }

    def score(self, row: JsonObject) -> float:
        """1 when the question, both answers and both scores are there."""
        return float(
            isinstance(row.get("question"), dict | str)
            and has_texts(row, "answer_0", "answer_1")
            and has_numbers(row, "score_0", "score_1")
        )

    def convert(self, row: JsonObject) -> Pair:
        """The higher score is better, the difference the margin."""
        question = row.get("question")
        text = (
            text_field(question, "full_text", "/question")
            if isinstance(question, dict)
            else text_field(row, "question")
        )
        lead = number_field(row, "score_1") - number_field(row, "score_0")
        return preferred_pair(
            row,
            layout=self,
            prompt=user(text),
            sides=_two_texts(row, "answer_0", "answer_1"),
            names=("question", "answer_0", "answer_1"),
            winner=_sign_winner(lead),
            margin=abs(lead),
            used=self.fields,
        )
