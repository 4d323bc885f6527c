"""Raw Anthropic-HH transcripts, as published."""

import re
from typing import ClassVar

from core.layout_names import LayoutName
from worker.ingest.canonical import Message, Pair, Role
from worker.ingest.checks import text_field
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_common import Layout, build_pair, has_texts
from worker.ingest.rows import JsonObject

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": Role.USER, "Assistant": Role.ASSISTANT}


class HhTranscripts(Layout):
    """`chosen` and `rejected` are whole transcripts that differ in the last turn only."""

    name = LayoutName.ANTHROPIC_HH
    fields = ("chosen", "rejected")
    has_margin = True
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "chosen, the turns before the last",
        "chosen": "chosen, the last turn",
        "rejected": "rejected, the last turn",
    }

    def score(self, row: JsonObject) -> float:
        """1 when both sides begin with a turn of the human and there is no prompt."""
        return float(
            row.get("prompt") is None
            and has_texts(row, *self.fields)
            and all(is_transcript(str(row[name])) for name in self.fields)
        )

    def convert(self, row: JsonObject) -> Pair:
        """Split both transcripts; the turns before the last must be the same."""
        chosen, rejected = transcript(row, "chosen"), transcript(row, "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise RowFault(
                RowCode.LAST_TURN_DIFFERS,
                "the two transcripts part before the last turn",
                pointer="/rejected",
            )
        return build_pair(
            row,
            prompt=chosen[:-1],
            chosen=chosen[-1:],
            rejected=rejected[-1:],
            used=self.fields,
            layout=self,
        )


def is_transcript(text: str) -> bool:
    """Return whether a text begins with a turn of the human."""
    return text.lstrip().startswith("Human:")


def transcript(row: JsonObject, name: str, *, answer_open: bool = False) -> tuple[Message, ...]:
    """Split one transcript into turns without the white space around them.

    With `answer_open` a last, empty `Assistant:` is the place of the answer and left out.

    Raises:
        RowFault: the transcript does not begin with a speaker, or has an empty turn.
    """
    lead, *parts = _TURN.split("\n\n" + text_field(row, name).lstrip())
    if lead:
        raise RowFault(
            RowCode.ROLE_ORDER,
            "the transcript does not begin with `Human:` or `Assistant:`",
            pointer=f"/{name}",
        )
    turns = tuple(
        Message(_ROLES[speaker], text.strip())
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    )
    if answer_open and turns and turns[-1] == Message(Role.ASSISTANT, ""):
        turns = turns[:-1]
    for number, turn in enumerate(turns, start=1):
        if not turn.content:
            raise RowFault(
                RowCode.EMPTY_TEXT, f"turn {number} of the transcript is empty", pointer=f"/{name}"
            )
    return turns
