"""Everything that is counted while rows are read."""

import math
from collections import Counter
from dataclasses import dataclass, field

from core.errors import ErrorDetail
from core.settings import DataLimits
from worker.ingest.canonical import CanonicalRow, Message, Split
from worker.ingest.choice import Choice
from worker.ingest.faults import HINTS, RowCode, RowFault
from worker.ingest.overlap import Overlap
from worker.ingest.pairing import LeftOut
from worker.ingest.preview import raw_preview
from worker.ingest.rows import JsonObject

_PREVIEW_ROWS = 3
_RAW_ROWS = 100
_MAX_IGNORED_NAMES = 50
# Short prompts are repeated by chance.
_MIN_REPEATED = 20


@dataclass(frozen=True)
class Place:
    """Where a fault was found, with the pointer `/line/field`."""

    line: int
    pointer: str
    detail: str


@dataclass
class CodeTally:
    """How often one code occurred and its first places."""

    count: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, place: Place, *, keep: int) -> None:
        """Count one more; keep only the first places."""
        self.count += 1
        if len(self.places) < keep:
            self.places.append(place)


@dataclass
class LengthTally:
    """Sums for Cohen's d of the characters of chosen against rejected."""

    n: int = 0
    total: list[float] = field(default_factory=lambda: [0.0, 0.0])
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, chosen: int, rejected: int) -> None:
        """Count the lengths of one pair."""
        self.n += 1
        for side, value in enumerate((chosen, rejected)):
            self.total[side] += value
            self.squares[side] += value * value

    def means(self) -> tuple[float, float]:
        """Mean characters of chosen and of rejected; needs a pair."""
        return self.total[0] / self.n, self.total[1] / self.n

    def cohens_d(self) -> float | None:
        """d = (mean_c - mean_r) / sqrt((var_c + var_r) / 2), sample variances.

        Cohen 1988, section 2.2. Positive: chosen is longer. 0 when the means agree; None with
        fewer than two pairs or when all lengths of a side are equal and the means differ.
        """
        if self.n < 2:
            return None
        chosen, rejected = self.means()
        variances = [
            max(0.0, self.squares[side] - self.total[side] ** 2 / self.n) / (self.n - 1)
            for side in (0, 1)
        ]
        pooled = math.sqrt(sum(variances) / 2)
        if chosen == rejected:
            return 0.0
        return (chosen - rejected) / pooled if pooled > 0.0 else None


@dataclass
class Tally:
    """Everything that is counted while rows are read."""

    limits: DataLimits
    choice: Choice | None = None
    rows: int = 0
    rejected: int = 0
    converted: int = 0
    unpaired: int = 0
    pairs: int = 0
    over_limit: int = 0
    prompts: int = 0
    stopped_early: bool = False
    left_out: LeftOut = field(default_factory=LeftOut)
    by_code: dict[RowCode, CodeTally] = field(default_factory=dict)
    duplicates: CodeTally = field(default_factory=CodeTally)
    conflicts: CodeTally = field(default_factory=CodeTally)
    repeats: CodeTally = field(default_factory=CodeTally)
    overlap: Overlap = field(default_factory=Overlap)
    lengths: LengthTally = field(default_factory=LengthTally)
    ignored: Counter[str] = field(default_factory=Counter)
    preview: list[CanonicalRow] = field(default_factory=list)
    # Rows of the upload by line, the first ones that gave a pair; texts cut.
    raw: dict[int, JsonObject] = field(default_factory=dict)
    ties_kept: int = 0
    decided: int = 0
    split_pairs: Counter[Split] = field(default_factory=Counter)
    split_prompts: dict[Split, int] = field(default_factory=dict)

    def reject(self, line: int, fault: RowFault) -> Place:
        """Count a row that is not a pair."""
        self.rejected += 1
        place = Place(line, f"/{line}{fault.pointer}", fault.message)
        self.by_code.setdefault(fault.row_code, CodeTally()).add(
            place, keep=self.limits.examples_per_code
        )
        return place

    def ignore(self, names: tuple[str, ...]) -> None:
        """Count fields that the layout does not use."""
        for name in names:
            if name in self.ignored or len(self.ignored) < _MAX_IGNORED_NAMES:
                self.ignored[name] += 1

    def keep_raw(self, line: int, row: JsonObject) -> None:
        """Keep a row of the upload for the preview, if it is one of the first and not long."""
        if len(self.raw) < _RAW_ROWS:
            shown = raw_preview(row)
            if shown is not None:
                self.raw[line] = shown

    def accept(self, row: CanonicalRow, *, conflict: bool) -> None:
        """Count a pair that is kept."""
        self.lengths.add(_characters(row.chosen), _characters(row.rejected))
        if _repeats_prompt(row):
            self.repeats.add(_place(row), keep=self.limits.examples_per_code)
        if conflict:
            self.conflicts.add(_place(row), keep=self.limits.examples_per_code)
        if len(self.preview) < _PREVIEW_ROWS:
            self.preview.append(row)

    def duplicate(self, row: CanonicalRow) -> None:
        """Count a pair that an earlier row already gave."""
        self.duplicates.add(_place(row), keep=self.limits.examples_per_code)

    def details(self) -> list[ErrorDetail]:
        """Return one entry for each code of rejected rows, the most frequent first."""
        return [
            ErrorDetail(
                code=code.value,
                detail=tally.places[0].detail,
                pointer=tally.places[0].pointer,
                line=tally.places[0].line,
                count=tally.count,
                hint=HINTS[code],
            )
            for code, tally in self.errors()
        ]

    def errors(self) -> list[tuple[RowCode, CodeTally]]:
        """Return the codes of rejected rows, the most frequent first."""
        return sorted(self.by_code.items(), key=lambda item: (-item[1].count, item[0]))


def _place(row: CanonicalRow) -> Place:
    return Place(row.line, f"/{row.line}", "")


def _characters(messages: tuple[Message, ...]) -> int:
    return sum(len(message.content) for message in messages)


def _repeats_prompt(row: CanonicalRow) -> bool:
    """Whether an answer begins with the last turn of the prompt."""
    asked = row.prompt[-1].content.strip()
    return len(asked) >= _MIN_REPEATED and any(
        side[0].content.lstrip().startswith(asked) for side in (row.chosen, row.rejected)
    )
