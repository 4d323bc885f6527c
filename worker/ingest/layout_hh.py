"""Raw Anthropic-HH transcripts, as published."""

import re
from typing import ClassVar

from worker.ingest.canonical import Message, Pair, Role
from worker.ingest.checks import text_field
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.layout_common import build_pair
from worker.ingest.rows import JsonObject

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": Role.USER, "Assistant": Role.ASSISTANT}


class HhTranscripts:
    """`chosen` and `rejected` are whole transcripts that differ in the last turn only."""

    name: ClassVar[str] = "anthropic_hh"
    fields: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    mapping: ClassVar[dict[str, str]] = {
        "prompt": "chosen, the turns before the last",
        "chosen": "chosen, the last turn",
        "rejected": "rejected, the last turn",
    }
    implicit_prompt: ClassVar[bool] = False

    def score(self, row: JsonObject) -> float:
        """1 when both sides begin with a turn of the human and there is no prompt."""
        sides = (row.get("chosen"), row.get("rejected"))
        return float(
            row.get("prompt") is None
            and all(isinstance(s, str) and s.lstrip().startswith("Human:") for s in sides)
        )

    def convert(self, row: JsonObject) -> Pair:
        """Split both transcripts; the turns before the last must be the same."""
        chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
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
            layout=self.name,
        )


def _turns(row: JsonObject, name: str) -> tuple[Message, ...]:
    """Split one transcript into turns without the white space around them."""
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
    for number, turn in enumerate(turns, start=1):
        if not turn.content:
            raise RowFault(
                RowCode.EMPTY_TEXT, f"turn {number} of the transcript is empty", pointer=f"/{name}"
            )
    return turns
