"""The four layouts of TRL."""

import re
from typing import ClassVar

from core.layout_names import LayoutName
from worker.ingest.canonical import Pair
from worker.ingest.checks import SAME_SIDES, messages_field, text_field
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_common import (
    Layout,
    assistant,
    build_pair,
    has_texts,
    split_common,
    user,
    without_prompt,
)
from worker.ingest.rows import JsonObject

_EXPLICIT = ("prompt", "chosen", "rejected")
_IMPLICIT = ("chosen", "rejected")

_ANSWER_MARK = re.compile(
    r"(?:\n(?:#{1,6} ?)?(?:assistant|response|answer|a) ?:|\[/INST\])\s*", re.IGNORECASE
)


def _has_lists(row: JsonObject, *names: str) -> bool:
    return all(isinstance(row.get(name), list) for name in names)


class StandardExplicit(Layout):
    """`prompt`, `chosen` and `rejected` are texts, taken as they are."""

    name = LayoutName.TRL_STANDARD
    fields = _EXPLICIT
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {name: name for name in _EXPLICIT}

    def score(self, row: JsonObject) -> float:
        """1 when all three are texts; less beside a `system` that would not be read."""
        return (0.7 if row.get("system") else 1.0) if has_texts(row, *_EXPLICIT) else 0.0

    def convert(self, row: JsonObject) -> Pair:
        """One user turn, one assistant turn on each side."""
        return build_pair(
            row,
            prompt=user(text_field(row, "prompt")),
            chosen=assistant(text_field(row, "chosen")),
            rejected=assistant(text_field(row, "rejected")),
            used=_EXPLICIT,
            layout=self,
        )


class StandardImplicit(Layout):
    """`chosen` and `rejected` are texts that both begin with the prompt."""

    name = LayoutName.TRL_STANDARD_IMPLICIT
    fields = _IMPLICIT
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "the common beginning of chosen and rejected",
        "chosen": "the rest of chosen",
        "rejected": "the rest of rejected",
    }
    implicit_prompt = True

    def score(self, row: JsonObject) -> float:
        """0.8 when both are texts with a common beginning: it may be part of the answers."""
        if row.get("prompt") is not None or not has_texts(row, *_IMPLICIT):
            return 0.0
        chosen, rejected = str(row["chosen"]), str(row["rejected"])
        return 0.8 if split_point(chosen, rejected)[0] else 0.2

    def convert(self, row: JsonObject) -> Pair:
        """Cut both texts where the prompt ends; white space and labels at the cut are dropped."""
        chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
        if chosen.strip() == rejected.strip():
            raise RowFault(RowCode.IDENTICAL_PAIR, SAME_SIDES)
        end, start = split_point(chosen, rejected)
        if not chosen[:end].strip():
            raise RowFault(
                RowCode.NO_PROMPT, "the two texts have no common beginning", pointer="/chosen"
            )
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not text[start:].strip():
                raise RowFault(
                    RowCode.EMPTY_TEXT,
                    f"nothing of `{name}` is left after the common beginning",
                    pointer=f"/{name}",
                )
        return build_pair(
            row,
            prompt=user(chosen[:end].strip()),
            chosen=assistant(chosen[start:].lstrip()),
            rejected=assistant(rejected[start:].lstrip()),
            used=_IMPLICIT,
            layout=self,
        )


def split_point(a: str, b: str) -> tuple[int, int]:
    """Return where the prompt ends and where the answers start, in both texts.

    The common beginning is cut at the last mark of an answer in it (`\\nAssistant:`,
    `### Response:`, `\\nA:`, `[/INST]`), else at the last end of a word. (0, 0): there is none.
    """
    common = _common_length(a, b)
    marks = list(_ANSWER_MARK.finditer(a, 0, common))
    if marks:
        return marks[-1].span()
    if any(len(text) > common and not text[common].isspace() for text in (a, b)):
        while common and not a[common - 1].isspace():
            common -= 1
    return common, common


def _common_length(a: str, b: str) -> int:
    """Length of the common beginning, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class ConversationalExplicit(Layout):
    """`prompt`, `chosen` and `rejected` are lists of messages."""

    name = LayoutName.TRL_CONVERSATIONAL
    fields = _EXPLICIT
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {name: name for name in _EXPLICIT}

    def score(self, row: JsonObject) -> float:
        """1 when all three are lists."""
        return float(_has_lists(row, *_EXPLICIT))

    def convert(self, row: JsonObject) -> Pair:
        """As it is; a prompt that both sides repeat is taken off them."""
        prompt = messages_field(row, "prompt")
        chosen, rejected = messages_field(row, "chosen"), messages_field(row, "rejected")
        return build_pair(
            row,
            prompt=prompt,
            chosen=without_prompt(prompt, chosen),
            rejected=without_prompt(prompt, rejected),
            used=_EXPLICIT,
            layout=self,
        )


class ConversationalImplicit(Layout):
    """`chosen` and `rejected` are lists of messages that begin with the same turns."""

    name = LayoutName.TRL_CONVERSATIONAL_IMPLICIT
    fields = _IMPLICIT
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "the common first messages of chosen and rejected",
        "chosen": "the other messages of chosen",
        "rejected": "the other messages of rejected",
    }

    def score(self, row: JsonObject) -> float:
        """1 when both are lists and there is no prompt; less where `messages` may be the prompt."""
        if row.get("prompt") is not None or not _has_lists(row, *_IMPLICIT):
            return 0.0
        return 0.5 if isinstance(row.get("messages"), list) else 1.0

    def convert(self, row: JsonObject) -> Pair:
        """The common first messages are the prompt."""
        chosen, rejected = messages_field(row, "chosen"), messages_field(row, "rejected")
        prompt, sides = split_common(chosen, rejected)
        return build_pair(
            row,
            prompt=prompt,
            chosen=sides[0],
            rejected=sides[1],
            used=_IMPLICIT,
            layout=self,
        )
