"""From one line of bytes to a JSON object that is safe to look at."""

import json
import re
from typing import TypeAlias

import orjson

from core.settings import DataLimits
from worker.ingest.faults import RowCode, RowFault, escape_pointer
from worker.ingest.texts import Line

JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, "JsonValue"]

_C0_BYTES = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_C0_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_KEY = re.compile(rb'"\s*:')
_WRITABLE_DEPTH = 200  # orjson reads 1024 levels and writes 254
_DEPTH_MESSAGE = "depth limit exceeded"


def parse_row(line: Line, *, limits: DataLimits) -> JsonObject:
    """Parse one line.

    Raises:
        RowFault: the line is too long, not UTF-8, not a JSON object, too deep, has a key twice or
            a control character, or could not be made from a table. The message names offsets and
            never repeats the bytes.
    """
    if line.fault is not None:
        raise RowFault(RowCode.MALFORMED_ROW, line.fault)
    if line.oversize:
        raise RowFault(
            RowCode.LINE_TOO_LONG,
            f"the line has {line.length} bytes; at most {limits.max_line_bytes} are read",
        )
    try:
        line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault(
            RowCode.INVALID_UTF8, f"byte {error.start} of the line is not valid UTF-8"
        ) from error
    if found := _C0_BYTES.search(line.data):
        raise RowFault(
            RowCode.INVALID_CHARACTERS,
            f"byte {found.start()} of the line is the control character "
            f"U+{line.data[found.start()]:04X}",
        )
    try:
        value: JsonValue = orjson.loads(line.data)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith(_DEPTH_MESSAGE):
            raise _too_deep(limits) from error
        raise RowFault(
            RowCode.NOT_JSON, f"not valid JSON at character {error.pos}: {error.msg}"
        ) from error
    if not isinstance(value, dict):
        raise RowFault(RowCode.NOT_AN_OBJECT, f"received a JSON {kind(value)}, expected an object")
    keys = _inspect(value, limits=limits)
    # Counting `":` over-counts when texts contain it, and never under-counts: only then is the
    # exact and slower parser asked.
    if len(_KEY.findall(line.data)) > keys:
        _refuse_duplicate_keys(line.data)
    return value


def kind(value: JsonValue) -> str:
    """Return the JSON name of the type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int() | float():
            return "number"
        case list():
            return "array"
        case dict():
            return "object"


def _max_depth(limits: DataLimits) -> int:
    return min(limits.max_depth, _WRITABLE_DEPTH)


def _too_deep(limits: DataLimits) -> RowFault:
    return RowFault(
        RowCode.TOO_DEEP, f"objects and arrays are nested deeper than {_max_depth(limits)}"
    )


def _inspect(root: JsonObject, *, limits: DataLimits) -> int:
    """Check depth and characters of all values and keys; return how many keys there are."""
    keys, max_depth = 0, _max_depth(limits)
    stack: list[tuple[JsonValue, int, str]] = [(root, 1, "")]
    while stack:
        value, depth, pointer = stack.pop()
        if isinstance(value, str):
            _refuse_control(value, pointer)
            continue
        if not isinstance(value, dict | list):
            continue
        if depth > max_depth:
            raise _too_deep(limits)
        if isinstance(value, list):
            stack.extend(
                (item, depth + 1, f"{pointer}/{index}")
                for index, item in enumerate(value)
                if isinstance(item, str | dict | list)
            )
            continue
        keys += len(value)
        for key, item in value.items():
            _refuse_control(key, pointer)
            if isinstance(item, str | dict | list):
                stack.append((item, depth + 1, f"{pointer}/{escape_pointer(key)}"))
    return keys


def _refuse_control(text: str, pointer: str) -> None:
    if found := _C0_TEXT.search(text):
        raise RowFault(
            RowCode.INVALID_CHARACTERS,
            f"character {found.start()} is the control character U+{ord(found.group()):04X}",
            pointer=pointer,
        )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise RowFault(
                RowCode.DUPLICATE_KEY, f"the key {key[:100]!r} occurs twice in one object"
            )
        result[key] = value
    return result


def _refuse_duplicate_keys(data: bytes) -> None:
    # Numbers stay text: their value is orjson's business, and int() of many digits is slow.
    json.loads(data, object_pairs_hook=_unique, parse_int=str, parse_float=str)
