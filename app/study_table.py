"""The trials of a search as a table: one row each, everything nested spread over columns."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.responses import unix
from app.study_tasks import Kind
from app.trial_views import in_words
from core.run_spec import CandidateSpec
from models.experiment import TrialRow

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Column:
    """A name and a cell for each trial."""

    name: str
    kind: Kind
    cells: tuple[Cell, ...]


def trial_table(rows: Sequence[TrialRow]) -> list[Column]:
    """Return the table; of `params.`, `setting.` and `metrics.` the columns that any trial has."""
    fixed = [_fixed(row) for row in rows]
    spread = [
        _flat("params", row.candidate)
        | _flat("setting", row.setting)
        | _flat("metrics", row.metrics)
        for row in rows
    ]
    more = sorted({name for cells in spread for name in cells}, key=_place)
    names = [*_FIXED, *more]
    table = [{**first, **second} for first, second in zip(fixed, spread, strict=True)]
    return [_column(name, [cells.get(name) for cells in table]) for name in names]


def csv_text(columns: Sequence[Column]) -> str:
    """Return the table as CSV (RFC 4180); what is not there is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([column.name for column in columns])
    for row in zip(*(column.cells for column in columns), strict=True):
        writer.writerow([_text(cell) for cell in row])
    return out.getvalue()


_FIXED: dict[str, Kind] = {
    "study_id": Kind.TEXT,
    "number": Kind.INT,
    "id": Kind.TEXT,
    "status": Kind.TEXT,
    "ended_by": Kind.TEXT,
    "origin": Kind.TEXT,
    "arm": Kind.TEXT,
    "draw": Kind.INT,
    "repeat": Kind.INT,
    "rung": Kind.INT,
    "label": Kind.TEXT,
    "words": Kind.TEXT,
    "log_loss": Kind.FLOAT,
    "drift": Kind.FLOAT,
    "feasible": Kind.BOOL,
    "gpu_seconds": Kind.FLOAT,
    "created_at": Kind.INT,
    "finished_at": Kind.INT,
}


def _fixed(row: TrialRow) -> dict[str, Cell]:
    candidate = CandidateSpec.model_validate(row.candidate)
    return {
        "study_id": row.study_id,
        "number": row.number,
        "id": row.id,
        "status": row.status.value,
        "ended_by": None if row.ended_by is None else row.ended_by.value,
        "origin": row.origin,
        "arm": row.arm,
        "draw": row.draw,
        "repeat": row.repeat,
        "rung": row.rung,
        "label": candidate.objective.label,
        "words": in_words(candidate),
        "log_loss": row.log_loss,
        "drift": row.drift,
        "feasible": row.feasible,
        "gpu_seconds": row.gpu_seconds,
        "created_at": int(row.created_at),
        "finished_at": unix(row.finished_at),
    }


def _flat(name: str, value: Any) -> dict[str, Cell]:
    """Return what is nested below a name as `name.key.key`."""
    if isinstance(value, dict):
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {
        key: cell for part, item in pairs for key, cell in _flat(f"{name}.{part}", item).items()
    }


def _place(name: str) -> tuple[int, str]:
    return ("params", "setting", "metrics").index(name.partition(".")[0]), name


def _column(name: str, cells: list[Cell]) -> Column:
    kind = _FIXED.get(name) or _kind(cells)
    match kind:
        case Kind.FLOAT:
            return Column(name, kind, tuple(None if c is None else float(c) for c in cells))
        case Kind.TEXT:
            return Column(name, kind, tuple(None if c is None else _text(c) for c in cells))
        case Kind.BOOL | Kind.INT:
            return Column(name, kind, tuple(cells))


def _kind(cells: Sequence[Cell]) -> Kind:
    """Return the narrowest kind that holds all cells; numbers of both kinds are floats."""
    types = {type(cell) for cell in cells if cell is not None}
    if types == {bool}:
        return Kind.BOOL
    if types == {int}:
        return Kind.INT
    return Kind.FLOAT if types and types <= {int, float} else Kind.TEXT


def _text(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case bool():
            return "true" if cell else "false"
        case float():
            return repr(cell)
        case int() | str():
            return str(cell)
