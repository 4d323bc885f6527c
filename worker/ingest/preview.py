"""Rows as a report shows them: whole in form, long texts cut."""

from typing import Any, Protocol

import orjson

from worker.ingest.canonical import CanonicalRow
from worker.ingest.rows import JsonObject

_CHARACTERS = 2000
_ITEMS = 50
_BYTES = 20_000


class PairObserver(Protocol):
    """Gets every pair that is kept, in the order of the canonical file."""

    def begin(self, *, pairs: int, size_bytes: int) -> None:
        """Say how many pairs will come, and how long the rows of all that were read are."""

    def see(self, row: CanonicalRow) -> None:
        """Take the next pair."""


def canonical_preview(row: CanonicalRow) -> dict[str, Any]:
    """Return a row as JSON with long texts cut."""
    data: dict[str, Any] = orjson.loads(orjson.dumps(row))
    for name in ("prompt", "chosen", "rejected"):
        data[name] = [
            {"role": message.role.value, "content": _cut(message.content)}
            for message in getattr(row, name)
        ]
    meta = orjson.dumps(row.meta)
    if len(meta) > _CHARACTERS:
        data["meta"] = {}
    return data


def raw_preview(row: JsonObject) -> JsonObject | None:
    """Return a row of the upload with long texts and lists cut, or None when it is long still."""
    cut = {name: _cut_value(value) for name, value in list(row.items())[:_ITEMS]}
    return cut if len(orjson.dumps(cut)) <= _BYTES else None


def _cut_value(value: Any) -> Any:
    match value:
        case str():
            return _cut(value)
        case list():
            return [_cut_value(item) for item in value[:_ITEMS]]
        case dict():
            return {name: _cut_value(item) for name, item in list(value.items())[:_ITEMS]}
        case _:
            return value


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"
