"""Layouts: how rows in the wild say prompt, chosen and rejected, and which one a file uses.

A layout is one small class with a name, the fields it needs, a score for "this row is mine" and a
conversion. To add one: write the class, add it to `LAYOUTS`, add a fixture of five rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from worker.ingest.canonical import Pair
from worker.ingest.layout_hh import HhTranscripts
from worker.ingest.layout_trl import (
    ConversationalExplicit,
    ConversationalImplicit,
    StandardExplicit,
    StandardImplicit,
)
from worker.ingest.rows import JsonObject


class Layout(Protocol):
    """One layout of preference data."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    mapping: ClassVar[dict[str, str]]
    implicit_prompt: ClassVar[bool]

    def score(self, row: JsonObject) -> float:
        """Return how sure it is, in [0, 1], that the row has this layout; 0: it has not."""

    def convert(self, row: JsonObject) -> Pair:
        """Return the pair of a row.

        Raises:
            RowFault: the row is not a pair; with code, pointer and detail.
        """


LAYOUTS: tuple[Layout, ...] = (
    StandardExplicit(),
    ConversationalExplicit(),
    HhTranscripts(),
    ConversationalImplicit(),
    StandardImplicit(),
)


@dataclass(frozen=True)
class Detection:
    """The layout of a file, how sure that is, and what else it might be, best first."""

    layout: Layout
    confidence: float
    alternatives: tuple[tuple[str, float], ...]


def detect(rows: Sequence[JsonObject]) -> Detection | None:
    """Return the layout with the highest mean score over the rows; earlier in LAYOUTS wins ties.

    When no row has any layout, the one whose fields are present most often is returned with
    confidence 0, so that the errors name the field that is missing; None when none has a field.
    """
    if not rows:
        return None
    scores = [(sum(layout.score(row) for row in rows) / len(rows), layout) for layout in LAYOUTS]
    best, layout = max(scores, key=lambda item: item[0])
    if best == 0.0:
        present, layout = max(
            ((_presence(layout, rows), layout) for layout in LAYOUTS), key=lambda item: item[0]
        )
        return Detection(layout, 0.0, ()) if present else None
    others = sorted(
        ((score, other.name) for score, other in scores if score > 0.0 and other is not layout),
        reverse=True,
    )
    return Detection(
        layout, round(best, 4), tuple((name, round(score, 4)) for score, name in others)
    )


def _presence(layout: Layout, rows: Sequence[JsonObject]) -> float:
    hits = sum(row.get(field) is not None for row in rows for field in layout.fields)
    return hits / (len(rows) * len(layout.fields))
