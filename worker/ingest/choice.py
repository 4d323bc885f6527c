"""What is done with the rows: their layout, the columns renamed for it, the rules of the policy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from core.errors import InvalidInput
from core.run_spec import DatasetPolicy
from worker.ingest.canonical import Answers, Pair
from worker.ingest.faults import RowFault, escape_pointer
from worker.ingest.layout_common import Grouping, Layout
from worker.ingest.layout_judged import PkuSafeRlhf
from worker.ingest.layouts import LAYOUTS, Detection, asked_for, detect
from worker.ingest.pairing import Rules
from worker.ingest.rows import JsonObject

_MAX_NAMES = 20


@dataclass(frozen=True)
class Choice:
    """How the rows of one file are read."""

    detection: Detection
    column_mapping: Mapping[str, str]
    rules: Rules

    @property
    def layout(self) -> Layout:
        """The layout that is used."""
        return self.detection.layout

    def convert(self, row: JsonObject) -> Pair | Answers:
        """Convert a row after renaming its columns; pointers name the columns of the file.

        Raises:
            RowFault: the row says no preference.
        """
        if not self.column_mapping:
            return self.layout.convert(row)
        try:
            return self.layout.convert(renamed(row, self.column_mapping))
        except RowFault as fault:
            for field, column in self.column_mapping.items():
                start = f"/{escape_pointer(field)}"
                if fault.pointer == start or fault.pointer.startswith(start + "/"):
                    fault.pointer = f"/{escape_pointer(column)}{fault.pointer[len(start) :]}"
                    break
            raise

    def mapping(self) -> dict[str, str]:
        """Return what each part of a pair was taken from, in columns of the file."""
        return {
            part: self.column_mapping.get(field, field)
            for part, field in self.layout.mapping.items()
        }


def renamed(row: JsonObject, mapping: Mapping[str, str]) -> JsonObject:
    """Return the row with columns under the names of fields; a field that was there is replaced."""
    taken = {*mapping, *mapping.values()}
    return {
        **{name: value for name, value in row.items() if name not in taken},
        **{field: row[column] for field, column in mapping.items() if column in row},
    }


def choose(rows: Sequence[JsonObject], policy: DatasetPolicy) -> Choice | None:
    """Return how rows like these are read; None when no layout has half of their fields.

    Raises:
        InvalidInput: `unusable_mapping`, `unusable_layout`, or `option_ignored` for an option of
            the policy that has no meaning for the layout.
    """
    if policy.column_mapping:
        if not rows:
            return None
        _refuse_unknown_columns(rows, policy.column_mapping)
        rows = [renamed(row, policy.column_mapping) for row in rows]
    found = detect(rows)
    if policy.layout is not None and rows:
        wanted = next(layout for layout in LAYOUTS if layout.name is policy.layout)
        found = asked_for(wanted, rows)
        if found.confidence == 0.0:
            raise _unusable(wanted, rows, policy)
    elif policy.column_mapping and (found is None or found.confidence == 0.0):
        raise _unusable(None if found is None else found.layout, rows, policy)
    if found is None:
        return None
    layout = _configured(found.layout, policy)
    found = Detection(layout, found.confidence, found.alternatives)
    if found.confidence > 0.0:
        _refuse_ignored(layout, policy)
        _refuse_unread_fields(layout, rows, policy.column_mapping)
    return Choice(
        detection=found,
        column_mapping=policy.column_mapping,
        rules=Rules.of(
            policy, has_margin=layout.has_margin, can_tie=layout.can_tie, seed=policy.split.seed
        ),
    )


def _configured(layout: Layout, policy: DatasetPolicy) -> Layout:
    if isinstance(layout, PkuSafeRlhf) and policy.target is not None:
        return PkuSafeRlhf(target=policy.target)
    return layout


def _refuse_unknown_columns(rows: Sequence[JsonObject], mapping: Mapping[str, str]) -> None:
    missing = [column for column in mapping.values() if all(column not in row for row in rows)]
    if missing:
        raise InvalidInput(
            f"column_mapping names {_quoted(missing)}, which none of the first {len(rows)} rows "
            f"has; they have {_columns(rows)}",
            code="unusable_mapping",
            hint="map fields of the layout to columns of the file: "
            '{"prompt": "<column>", "chosen": "<column>", "rejected": "<column>"}',
            param="policy",
        )


def _unusable(
    layout: Layout | None, rows: Sequence[JsonObject], policy: DatasetPolicy
) -> InvalidInput:
    """Return why no row has the layout that was asked for, or any after renaming."""
    after = " after column_mapping" if policy.column_mapping else ""
    wanted = "any known layout" if policy.layout is None else f"layout `{policy.layout}`"
    expected = (
        "for example `prompt`, `chosen`, `rejected`"
        if policy.layout is None or layout is None
        else _quoted(layout.fields)
    )
    return InvalidInput(
        f"none of the first {len(rows)} rows has {wanted}{after}: received {_columns(rows)}, "
        f"expected {expected} of the types that docs/datasets.md names",
        code="unusable_mapping" if policy.column_mapping else "unusable_layout",
        hint="correct `column_mapping`, or drop `layout` to have it detected",
        param="policy",
    )


def _refuse_unread_fields(
    layout: Layout, rows: Sequence[JsonObject], mapping: Mapping[str, str]
) -> None:
    """Refuse a mapping to a field that no row's conversion reads."""
    unread = set(mapping)
    for row in rows:
        try:
            unread &= set(layout.convert(row).ignored)
        except RowFault:
            continue
        if not unread:
            return
    if unread and any(_converts(layout, row) for row in rows):
        raise InvalidInput(
            f"column_mapping names {_quoted(sorted(unread))}, which layout `{layout.name}` does "
            f"not read; it reads {_quoted(layout.fields)}",
            code="unusable_mapping",
            hint="drop these entries, or set `layout` to one that reads them",
            param="policy",
        )


def _converts(layout: Layout, row: JsonObject) -> bool:
    try:
        layout.convert(row)
    except RowFault:
        return False
    return True


def _refuse_ignored(layout: Layout, policy: DatasetPolicy) -> None:
    """Refuse options that the layout cannot follow."""
    refusals: list[tuple[str, object, str, Iterable[Layout]]] = []
    match layout.grouping:
        case Grouping.PAIR:
            grouped = [other for other in LAYOUTS if other.grouping is not Grouping.PAIR]
            refusals.append(("pairing", policy.pairing, "its rows are pairs already", grouped))
        case Grouping.PROMPT:
            if policy.pairing == "adjacent":
                ranked = [o for o in LAYOUTS if o.grouping in (Grouping.ROW, Grouping.ADJACENT)]
                why = "its answers are good or bad and have no order"
                refusals.append(("pairing", policy.pairing, why, ranked))
        case Grouping.ROW | Grouping.ADJACENT:
            pass
        case _:
            assert_never(layout.grouping)
    if not layout.can_tie:
        tied = [other for other in LAYOUTS if other.can_tie]
        refusals.append(("on_tie", policy.on_tie, "it knows no ties", tied))
    if not layout.has_margin:
        graded = [other for other in LAYOUTS if other.has_margin]
        refusals.append(("min_margin", policy.min_margin, "it has no margins", graded))
    if not isinstance(layout, PkuSafeRlhf):
        refusals.append(("target", policy.target, "it has one verdict", (PkuSafeRlhf(),)))
    for option, value, why, others in refusals:
        if value is not None:
            raise InvalidInput(
                f"{option} {value!r} would be ignored: the file has layout `{layout.name}`, and "
                f"{why}",
                code="option_ignored",
                hint=f"drop {option}; it is for {', '.join(other.name for other in others)}",
                param="policy",
            )


def _columns(rows: Sequence[JsonObject]) -> str:
    return _quoted(dict.fromkeys(name for row in rows for name in row)) or "no column"


def _quoted(names: Iterable[str]) -> str:
    listed = [f"`{name[:40]}`" for name in names]
    more = len(listed) - _MAX_NAMES
    return ", ".join(listed[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
