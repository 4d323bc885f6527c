"""Which layout a file has, and which of the options asked for it can follow.

A layout is one small class with a name, the fields it needs, a score for "this row is mine" and a
conversion. To add one: name it in `core/layout_names.py`, write the class, add it to `LAYOUTS`, add
a fixture of five rows and a line in `docs/datasets.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from worker.ingest.layout_answers import (
    HelpSteer2,
    Kto,
    KtoLlamaFactory,
    KtoMsSwift,
    Nectar,
    NemoRl,
    UltraFeedbackRaw,
)
from worker.ingest.layout_chat import (
    Arena,
    ArgillaCleaned,
    AxolotlChat,
    H4UltraFeedback,
    HelpSteer3,
    MsSwift,
    OpenAi,
    ShareGpt,
)
from worker.ingest.layout_columns import (
    ArgillaUltraFeedback,
    Axolotl,
    LlamaFactoryAlpaca,
    MessagesChosenRejected,
    Misspelled,
    OrcaPairs,
    StackExchange,
)
from worker.ingest.layout_common import Layout
from worker.ingest.layout_hh import HhTranscripts
from worker.ingest.layout_judged import (
    ArenaKaggle,
    HelpSteer2Preference,
    PkuSafeRlhf,
    Shp,
    SummarizeFromFeedback,
    WebGpt,
)
from worker.ingest.layout_trl import (
    ConversationalExplicit,
    ConversationalImplicit,
    StandardExplicit,
    StandardImplicit,
)
from worker.ingest.rows import JsonObject

# Where two are equally sure, the earlier one is taken.
LAYOUTS: tuple[Layout, ...] = (
    StandardExplicit(),
    ConversationalExplicit(),
    HhTranscripts(),
    ConversationalImplicit(),
    StandardImplicit(),
    OpenAi(),
    ArgillaCleaned(),
    H4UltraFeedback(),
    ArgillaUltraFeedback(),
    UltraFeedbackRaw(),
    Shp(),
    HelpSteer2(),
    HelpSteer2Preference(),
    HelpSteer3(),
    Arena(),
    ArenaKaggle(),
    Nectar(),
    NemoRl(),
    Kto(),
    KtoLlamaFactory(),
    KtoMsSwift(),
    LlamaFactoryAlpaca(),
    ShareGpt(),
    MsSwift(),
    AxolotlChat(),
    StackExchange(),
    SummarizeFromFeedback(),
    PkuSafeRlhf(),
    WebGpt(),
    OrcaPairs(),
    Axolotl(),
    Misspelled(),
    MessagesChosenRejected(),
)
KNOWN_COLUMNS = frozenset(name for layout in LAYOUTS for name in layout.fields)
_MIN_PRESENCE = 0.5


@dataclass(frozen=True)
class Detection:
    """The layout of a file, how sure that is, and what else it might be, best first."""

    layout: Layout
    confidence: float
    alternatives: tuple[tuple[str, float], ...]


def detect(rows: Sequence[JsonObject]) -> Detection | None:
    """Return the layout with the highest mean score over the rows; earlier in LAYOUTS wins ties.

    When no row has any layout, the one whose fields are present most often is returned with
    confidence 0, so that the errors name the field that is missing; None when none has half of
    them.
    """
    if not rows:
        return None
    scores = [(_mean_score(layout, rows), layout) for layout in LAYOUTS]
    best, layout = max(scores, key=lambda item: item[0])
    if best == 0.0:
        present, layout = max(
            ((_presence(layout, rows), layout) for layout in LAYOUTS), key=lambda item: item[0]
        )
        return Detection(layout, 0.0, ()) if present >= _MIN_PRESENCE else None
    return Detection(layout, round(best, 4), _others(scores, layout))


def asked_for(layout: Layout, rows: Sequence[JsonObject]) -> Detection:
    """Return the detection of a layout that was named, with what the rows look like otherwise."""
    scores = [(_mean_score(other, rows), other) for other in LAYOUTS] if rows else []
    return Detection(
        layout,
        round(_mean_score(layout, rows), 4) if rows else 0.0,
        _others(scores, layout),
    )


def _others(
    scores: Sequence[tuple[float, Layout]], layout: Layout
) -> tuple[tuple[str, float], ...]:
    found = [
        (-score, other.name.value)
        for score, other in scores
        if score > 0.0 and other.name is not layout.name
    ]
    return tuple((name, round(-score, 4)) for score, name in sorted(found))


def _mean_score(layout: Layout, rows: Sequence[JsonObject]) -> float:
    return sum(layout.score(row) for row in rows) / len(rows)


def _presence(layout: Layout, rows: Sequence[JsonObject]) -> float:
    hits = sum(row.get(field) is not None for row in rows for field in layout.fields)
    return hits / (len(rows) * len(layout.fields))
