"""What was found in an upload: counts, errors by code, lint, preview."""

import math
from collections import Counter
from dataclasses import dataclass, field

import orjson

from core.errors import ErrorDetail, KdpoError
from core.lifecycle import DatasetStatus
from core.run_spec import SplitPolicy
from core.settings import DataLimits
from worker.ingest.canonical import CanonicalRow, Message, Split
from worker.ingest.choice import Choice
from worker.ingest.containers import Contents
from worker.ingest.faults import HINTS, RowCode, RowFault
from worker.ingest.pairing import LeftOut

LENGTH_BIAS_LIMIT = 0.5
_PREVIEW_ROWS = 3
_PREVIEW_CHARACTERS = 2000
_MAX_IGNORED_NAMES = 50
_MAX_MEMBERS = 100


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
    lengths: LengthTally = field(default_factory=LengthTally)
    ignored: Counter[str] = field(default_factory=Counter)
    preview: list[CanonicalRow] = field(default_factory=list)
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

    def accept(self, row: CanonicalRow, *, conflict: bool) -> None:
        """Count a pair that is kept."""
        self.lengths.add(_characters(row.chosen), _characters(row.rejected))
        if conflict:
            self.conflicts.add(self._place(row), keep=self.limits.examples_per_code)
        if len(self.preview) < _PREVIEW_ROWS:
            self.preview.append(row)

    def duplicate(self, row: CanonicalRow) -> None:
        """Count a pair that an earlier row already gave."""
        self.duplicates.add(self._place(row), keep=self.limits.examples_per_code)

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

    def lint(self) -> list[dict[str, object]]:
        """Return the checks of the data as a whole, each `ok` or `warn`."""
        identical = self.by_code.get(RowCode.IDENTICAL_PAIR, CodeTally())
        checks = [
            self._length_bias(),
            _counted("identical_pair", identical, "rows with equal sides were rejected"),
            _counted("duplicate_pair", self.duplicates, "repeated pairs were dropped"),
            _counted("label_conflict", self.conflicts, "pairs contradict an earlier one; kept"),
        ]
        layout = None if self.choice is None else self.choice.layout
        if layout is not None and layout.warning is not None and self.pairs:
            checks.append(
                {"check": "layout", "level": "warn", "count": self.pairs, "detail": layout.warning}
            )
        if layout is not None and layout.implicit_prompt and self.pairs:
            checks.append(
                {
                    "check": "implicit_prompt",
                    "level": "warn",
                    "count": self.pairs,
                    "detail": "the prompt was taken from the common beginning of both texts; "
                    "look at the preview, or give a `prompt` field",
                }
            )
        return checks

    def _length_bias(self) -> dict[str, object]:
        value = self.lengths.cohens_d()
        biased = value is None if self.pairs > 1 else False
        if value is not None:
            biased = abs(value) > LENGTH_BIAS_LIMIT
        detail = "no pairs"
        if self.pairs:
            chosen, rejected = self.lengths.means()
            detail = f"chosen has {chosen:.0f} characters on average, rejected {rejected:.0f}"
        return {
            "check": "length_bias",
            "level": "warn" if biased else "ok",
            "value": None if value is None else round(value, 4),
            "threshold": LENGTH_BIAS_LIMIT,
            "unit": "cohens_d",
            "detail": detail,
        }

    @staticmethod
    def _place(row: CanonicalRow) -> Place:
        return Place(row.line, f"/{row.line}", "")


def _characters(messages: tuple[Message, ...]) -> int:
    return sum(len(message.content) for message in messages)


def _counted(check: str, tally: CodeTally, detail: str) -> dict[str, object]:
    if not tally.count:
        return {"check": check, "level": "ok", "count": 0}
    return {
        "check": check,
        "level": "warn",
        "count": tally.count,
        "detail": detail,
        "lines": [place.line for place in tally.places],
    }


def status_of(tally: Tally, failure: KdpoError | None) -> DatasetStatus:
    """Return the state of a dataset: warnings come from rejected rows and from lint."""
    if failure is not None:
        return DatasetStatus.INVALID
    if tally.rejected or any(check["level"] == "warn" for check in tally.lint()):
        return DatasetStatus.READY_WITH_WARNINGS
    return DatasetStatus.READY


def build_report(
    tally: Tally,
    *,
    dataset_id: str,
    contents: Contents,
    policy: SplitPolicy,
    failure: KdpoError | None,
) -> dict[str, object]:
    """Return the report as JSON values; `complete` is false when reading stopped."""
    found = None if tally.choice is None else tally.choice.detection
    return {
        "object": "dataset.report",
        "dataset_id": dataset_id,
        "status": status_of(tally, failure).value,
        "complete": not tally.stopped_early,
        "detected": {
            "layout": None if found is None else found.layout.name.value,
            "confidence": 0.0 if found is None else found.confidence,
            "container": contents.container,
            "alternatives": [
                {"layout": name, "confidence": confidence}
                for name, confidence in (() if found is None else found.alternatives)
            ],
            **_archive(contents),
        },
        "mapping": {} if tally.choice is None else tally.choice.mapping(),
        "ignored_fields": {name[:100]: count for name, count in tally.ignored.most_common()},
        "counts": {
            "rows": tally.rows,
            "converted": tally.converted,
            "rejected": tally.rejected,
            "without_pair": tally.rows - tally.rejected - tally.converted,
            "ties_dropped": tally.left_out.ties,
            "below_margin": tally.left_out.below_margin,
            "identical_answers": tally.left_out.identical,
            "unpaired": tally.unpaired,
            "over_limit": tally.over_limit,
            "duplicates": tally.duplicates.count,
            "pairs": tally.pairs,
            "prompts": tally.prompts,
            **{split.value: tally.split_pairs[split] for split in Split},
        },
        "split": {
            "by": "prompt",
            "seed": policy.seed,
            "prompts": {split.value: count for split, count in tally.split_prompts.items()},
        },
        "errors": [
            {
                "code": code.value,
                "count": counted.count,
                "hint": HINTS[code],
                "examples": [
                    {"line": p.line, "pointer": p.pointer, "detail": p.detail}
                    for p in counted.places
                ],
            }
            for code, counted in tally.errors()
        ],
        "lint": tally.lint(),
        "failure": None
        if failure is None
        else {"code": failure.code, "message": failure.message, "hint": failure.hint},
        "preview": [_preview(row) for row in tally.preview],
    }


def _archive(contents: Contents) -> dict[str, object]:
    """Return what was read of an archive and what was left aside; nothing for other files."""
    if not contents.members:
        return {}
    return {
        "members": [
            {"name": m.name[:200], "container": m.container, "first_line": m.first_line}
            for m in contents.members[:_MAX_MEMBERS]
        ],
        "ignored_members": [name[:200] for name in contents.ignored[:_MAX_MEMBERS]],
    }


def _preview(row: CanonicalRow) -> dict[str, object]:
    """Return a row as JSON with long texts cut."""
    data: dict[str, object] = orjson.loads(orjson.dumps(row))
    for name in ("prompt", "chosen", "rejected"):
        data[name] = [
            {"role": message.role.value, "content": _cut(message.content)}
            for message in getattr(row, name)
        ]
    meta = orjson.dumps(row.meta)
    if len(meta) > _PREVIEW_CHARACTERS:
        data["meta"] = {}
    return data


def _cut(text: str) -> str:
    return text if len(text) <= _PREVIEW_CHARACTERS else text[:_PREVIEW_CHARACTERS] + "…"
