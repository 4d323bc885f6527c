"""The four layouts of TRL."""

import re
from typing import ClassVar

from worker.ingest.canonical import Pair
from worker.ingest.checks import SAME_SIDES, messages_field, text_field
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_common import assistant, build_pair, common_turns, user
from worker.ingest.rows import JsonObject

_EXPLICIT = ("prompt", "chosen", "rejected")
_IMPLICIT = ("chosen", "rejected")

_ANSWER_MARK = re.compile(
    r"(?:\n(?:#{1,6} ?)?(?:assistant|response|answer|a) ?:|\[/INST\])\s*", re.IGNORECASE
)


def _all_of(row: JsonObject, names: tuple[str, ...], wanted: type) -> bool:
    return all(isinstance(row.get(name), wanted) for name in names)


class StandardExplicit:
    """`prompt`, `chosen` and `rejected` are texts, taken as they are."""

    name: ClassVar[str] = "trl_standard"
    fields: ClassVar[tuple[str, ...]] = _EXPLICIT
    mapping: ClassVar[dict[str, str]] = {name: name for name in _EXPLICIT}
    implicit_prompt: ClassVar[bool] = False

    def score(self, row: JsonObject) -> float:
        """1 when all three are texts."""
        return float(_all_of(row, _EXPLICIT, str))

    def convert(self, row: JsonObject) -> Pair:
        """One user turn, one assistant turn on each side."""
        return build_pair(
            row,
            prompt=user(text_field(row, "prompt")),
            chosen=assistant(text_field(row, "chosen")),
            rejected=assistant(text_field(row, "rejected")),
            used=_EXPLICIT,
            layout=self.name,
        )


class StandardImplicit:
    """`chosen` and `rejected` are texts that both begin with the prompt."""

    name: ClassVar[str] = "trl_standard_implicit"
    fields: ClassVar[tuple[str, ...]] = _IMPLICIT
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "the common beginning of chosen and rejected",
        "chosen": "the rest of chosen",
        "rejected": "the rest of rejected",
    }
    implicit_prompt: ClassVar[bool] = True

    def score(self, row: JsonObject) -> float:
        """0.8 when both are texts with a common beginning: it may be part of the answers."""
        if row.get("prompt") is not None or not _all_of(row, _IMPLICIT, str):
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
            layout=self.name,
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


class ConversationalExplicit:
    """`prompt`, `chosen` and `rejected` are lists of messages."""

    name: ClassVar[str] = "trl_conversational"
    fields: ClassVar[tuple[str, ...]] = _EXPLICIT
    mapping: ClassVar[dict[str, str]] = {name: name for name in _EXPLICIT}
    implicit_prompt: ClassVar[bool] = False

    def score(self, row: JsonObject) -> float:
        """1 when all three are lists."""
        return float(_all_of(row, _EXPLICIT, list))

    def convert(self, row: JsonObject) -> Pair:
        """As it is; a prompt that both sides repeat is taken off them."""
        prompt = messages_field(row, "prompt")
        chosen, rejected = messages_field(row, "chosen"), messages_field(row, "rejected")
        if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return build_pair(
            row,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            used=_EXPLICIT,
            layout=self.name,
        )


class ConversationalImplicit:
    """`chosen` and `rejected` are lists of messages that begin with the same turns."""

    name: ClassVar[str] = "trl_conversational_implicit"
    fields: ClassVar[tuple[str, ...]] = _IMPLICIT
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "the common first messages of chosen and rejected",
        "chosen": "the other messages of chosen",
        "rejected": "the other messages of rejected",
    }
    implicit_prompt: ClassVar[bool] = False

    def score(self, row: JsonObject) -> float:
        """1 when both are lists and there is no prompt."""
        return float(row.get("prompt") is None and _all_of(row, _IMPLICIT, list))

    def convert(self, row: JsonObject) -> Pair:
        """The common first messages are the prompt."""
        chosen, rejected = messages_field(row, "chosen"), messages_field(row, "rejected")
        if chosen == rejected:
            raise RowFault(RowCode.IDENTICAL_PAIR, SAME_SIDES)
        same = common_turns(chosen, rejected)
        return build_pair(
            row,
            prompt=chosen[:same],
            chosen=chosen[same:],
            rejected=rejected[same:],
            used=_IMPLICIT,
            layout=self.name,
        )
