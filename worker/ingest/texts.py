"""Blocks of text to rows: lines of JSON, a JSON array, or lines of CSV."""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import orjson

from core.errors import InvalidInput, UnsupportedMedia
from worker.ingest.formats import DELIMITERS, Format

_SPACE = b" \t\r\n"
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\]')
# Of an oversize row only this much is kept.
_KEPT = 64


@dataclass(frozen=True, slots=True)
class Line:
    """One row as JSON; of an oversize row `data` holds only the beginning.

    `number` is its line in the text, or its place in an array or a table, from 1; `fault` says why
    it could not be made.
    """

    number: int
    data: bytes
    length: int
    oversize: bool
    fault: str | None = None


def made_line(number: int, data: bytes, *, max_bytes: int, fault: str | None = None) -> Line:
    """Return a row that was written by this program."""
    oversize = len(data) > max_bytes
    return Line(number, data[:_KEPT] if oversize else data, len(data), oversize, fault)


def split_lines(blocks: Iterator[bytes], *, max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a text without their ends.

    Raises:
        UnsupportedMedia: the first line shows one JSON object over several lines.
    """
    keep = max_bytes + 1
    pending = bytearray()
    number = length = 0
    is_first = True
    for block in blocks:
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            number += 1
            length += end - start
            pending += block[start : min(end, start + max(0, keep - len(pending)))]
            if is_first and pending.strip():
                is_first = False
                _refuse_open_object(bytes(pending))
            yield _line(number, bytes(pending), length, max_bytes)
            pending.clear()
            length = 0
            start = end + 1
        length += len(block) - start
        pending += block[start : start + max(0, keep - len(pending))]
    if length:
        yield _line(number + 1, bytes(pending), length, max_bytes)


def _line(number: int, data: bytes, length: int, max_bytes: int) -> Line:
    if length == len(data) and data.endswith(b"\r"):
        data, length = data[:-1], length - 1
    oversize = length > max_bytes
    return Line(number, data[:_KEPT] if oversize else data, length, oversize)


def _refuse_open_object(line: bytes) -> None:
    if line.strip() == b"{":
        raise UnsupportedMedia(
            "received one JSON object over several lines; expected one object a line, or an array",
            hint="write its rows one object a line: jq -c '.<name of the list>[]' data.json",
            param="file",
        )


def split_array(blocks: Iterator[bytes], *, max_bytes: int) -> Iterator[Line]:
    """Yield the elements of one JSON array as rows, whatever is between its commas.

    Only quotes and brackets are looked at: an element that is no valid JSON is found when it is
    parsed. Memory holds one block and one element.

    Raises:
        InvalidInput: `truncated_json`, or `corrupt_json` behind the end of the array.
    """
    return _ArrayScanner(max_bytes).rows(blocks)


class _ArrayScanner:
    """The state between blocks: how deep, whether in a string, the element so far."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._element = bytearray()
        self._length = 0
        self._number = 0

    def rows(self, blocks: Iterator[bytes]) -> Iterator[Line]:
        ended = False
        for block in blocks:
            if ended:
                _refuse_rest(block)
                continue
            for is_end, rest in self._scan(block):
                if self._length and self._element.strip(_SPACE):
                    self._number += 1
                    data = bytes(self._element).strip(_SPACE)
                    oversize = self._length > self._max_bytes
                    yield Line(
                        self._number, data[:_KEPT] if oversize else data, self._length, oversize
                    )
                self._element.clear()
                self._length = 0
                if is_end:
                    ended = True
                    _refuse_rest(rest)
        if not ended:
            raise InvalidInput(
                f"the JSON array ends after {self._number} rows without its `]`: the file was cut "
                "off",
                code="truncated_json",
                hint="upload the whole file again",
                param="file",
            )

    def _scan(self, block: bytes) -> Iterator[tuple[bool, bytes]]:
        """Yield at the end of each element: whether the array ends here, and what is behind it."""
        start = 0
        at = self._behind_string(block, 0) if self._in_string else 0
        while found := _OUTSIDE.search(block, at):
            token, at = found.group(), found.end()
            if token == b'"':
                self._in_string = True
                at = self._behind_string(block, at)
            elif token in b"{[":
                self._depth += 1
                if self._depth == 1:
                    start = at
            elif token in b"}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._take(block[start : found.start()])
                    yield True, block[at:]
                    return
            elif self._depth == 1:
                self._take(block[start : found.start()])
                start = at
                yield False, b""
        self._take(block[start:])

    def _behind_string(self, block: bytes, at: int) -> int:
        """Return the place behind the quote that ends the string, or the end of the block."""
        if self._escaped:
            self._escaped, at = False, at + 1
        while found := _INSIDE.search(block, at):
            at = found.end()
            if found.group() == b'"':
                self._in_string = False
                return at
            if at == len(block):
                self._escaped = True
            at += 1
        return len(block)

    def _take(self, part: bytes) -> None:
        self._length += len(part)
        self._element += part[: max(0, self._max_bytes + 1 - len(self._element))]


def _refuse_rest(rest: bytes) -> None:
    if rest.strip(_SPACE):
        raise InvalidInput(
            "there is text behind the end of the JSON array",
            code="corrupt_json",
            hint="write all rows into one array, or as JSON Lines",
            param="file",
        )


# Fields that layouts read as numbers or as true and false; every other cell is text.
_NUMBERS = frozenset(
    {
        *("margin", "score_chosen", "score_rejected", "chosen_avg_rating", "rejected_avg_rating"),
        *("chosen-rating", "rejected-rating", "chosen_rating", "rejected_rating"),
        *("labels", "score_ratio", "helpfulness", "preference_strength", "overall_preference"),
        *("winner_model_a", "winner_model_b", "winner_tie", "choice", "score_0", "score_1"),
        *("better_response_id", "safer_response_id"),
    }
)
_BOOLS = frozenset({"label", "kto_tag"})
_BOOL_WORDS = {"true": True, "1": True, "false": False, "0": False}
# An object, or the first of a list, with one of these is read as JSON.
_SHAPES = frozenset(
    {"role", "from", "messages", "rank", "response", "text", "full_text", "post", "article"}
)


class CsvRows:
    """Rows of a CSV or TSV text as JSON objects, one text for each column of the header.

    An empty cell is null; the columns that layouts read as numbers or as true and false are read so
    (under the names that `column_mapping` gives them); a cell with messages is read as JSON.
    """

    def __init__(
        self, format_: Format, *, column_mapping: Mapping[str, str], max_bytes: int
    ) -> None:
        self._delimiter = DELIMITERS[format_]
        self._fields = {column: field for field, column in column_mapping.items()}
        self._max_bytes = max_bytes

    def rows(self, blocks: Iterator[bytes]) -> Iterator[Line]:
        """Yield the rows; `number` is the line on which a row begins."""
        # The module's limit is one for the process, which parses one file.
        csv.field_size_limit(self._max_bytes)
        reader = csv.reader(self._texts(blocks), delimiter=self._delimiter, strict=True)
        names: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Line(number, b"", 0, oversize=False, fault=f"the row is no CSV: {error}")
                continue
            if cells is None:
                return
            if not cells or cells == [""]:
                continue
            if names is None:
                names = [name.strip() for name in cells]
            else:
                yield self._row(number, names, cells)

    def _texts(self, blocks: Iterator[bytes]) -> Iterator[str]:
        """Yield lines with their ends; a line that is no UTF-8 keeps its bytes as surrogates."""
        for line in split_long_lines(blocks, self._max_bytes):
            yield line.decode("utf-8", "surrogateescape")

    def _row(self, number: int, names: list[str], cells: list[str]) -> Line:
        if len(cells) != len(names):
            fault = f"the row has {len(cells)} cells and the header {len(names)}"
            return Line(number, b"", 0, oversize=False, fault=fault)
        try:
            data = orjson.dumps(
                {name: self._value(name, cell) for name, cell in zip(names, cells, strict=True)}
            )
        except (orjson.JSONEncodeError, TypeError):
            return Line(number, b"", 0, oversize=False, fault="the row is not valid UTF-8")
        return made_line(number, data, max_bytes=self._max_bytes)

    def _value(self, name: str, cell: str) -> object:
        if not cell:
            return None
        field = self._fields.get(name, name)
        if field in _BOOLS:
            return _BOOL_WORDS.get(cell.strip().lower(), cell)
        if field in _NUMBERS:
            try:
                return float(cell)
            except ValueError:
                return cell
        if cell[0] in "[{":
            return _structured(cell)
        return cell


def _structured(cell: str) -> object:
    """Return a cell as JSON when it holds messages or one of the objects that layouts read."""
    try:
        value = orjson.loads(cell)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return cell
    first = value[0] if isinstance(value, list) and value else value
    return value if isinstance(first, dict) and _SHAPES & set(first) else cell


def split_long_lines(blocks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield lines with their ends; a line beyond the limit comes in parts."""
    pending = b""
    for block in blocks:
        pending += block
        lines = pending.splitlines(keepends=True)
        pending = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        yield from lines
        if len(pending) > max_bytes:
            yield pending
            pending = b""
    if pending:
        yield pending
