"""From a file to numbered rows, within limits.

What a file is, is told from its first bytes, never from a name. Memory is bounded by one block and
one row (of tables: one batch), whatever the file claims or expands to.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from core.errors import UnsupportedMedia
from core.settings import DataLimits
from worker.ingest.archives import looks_like_data, members, no_data
from worker.ingest.decompress import BLOCK, Budget, decompressed
from worker.ingest.formats import (
    ARCHIVES,
    BOM,
    COMPRESSIONS,
    HEAD_BYTES,
    TABLES,
    TEXTS,
    Format,
    Unreadable,
    sniff,
    unsupported,
)
from worker.ingest.layouts import KNOWN_COLUMNS
from worker.ingest.texts import CsvRows, Line, split_array, split_lines


@dataclass
class Member:
    """One data file of an archive: `first_line` is where its rows begin in the numbers."""

    name: str
    container: str
    first_line: int


@dataclass
class Contents:
    """What was found in the file."""

    container: str | None = None
    members: list[Member] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


class LineReader:
    """Iterates over the rows of a file and counts what it has read.

    `folder` takes temporary files: members of archives, and compressed tables and archives.

    Raises while iterating:
        UnsupportedMedia: the first bytes are those of another format.
        TooLarge: `decompression_bomb`, `too_many_members`, or `file_too_large`.
        InvalidInput: the file is damaged, cut off, encrypted or unsafe.
    """

    def __init__(
        self,
        source: Path,
        *,
        limits: DataLimits,
        folder: Path,
        column_mapping: Mapping[str, str] | None = None,
    ) -> None:
        self._source = source
        self._limits = limits
        self._folder = folder
        self._mapping = column_mapping or {}
        self._columns = KNOWN_COLUMNS | frozenset(self._mapping.values())
        self._budget = Budget(limits)
        self.total_bytes = source.stat().st_size
        self.contents = Contents()
        self._in_archive = False
        # Bytes of the file that were read, by what is read now: a member, or a table that was
        # unpacked first, is the part of the file up to `_end`.
        self._read = 0.0
        self._end = float(self.total_bytes)
        self._scale = 1.0

    @property
    def read_bytes(self) -> int:
        """How much of the file was read."""
        return min(self.total_bytes, int(self._read))

    def __iter__(self) -> Iterator[Line]:
        with self._source.open("rb") as file:
            yield from self._rows(file)

    def _rows(self, file: BinaryIO) -> Iterator[Line]:
        format_ = self._sniffed(file)
        if format_ in ARCHIVES:
            self.contents.container = format_.value
            yield from self._archive(file, format_)
        elif format_ in COMPRESSIONS:
            yield from self._compressed(file, format_)
        else:
            self.contents.container = format_.value
            yield from self._plain(file, format_)

    def _sniffed(self, file: BinaryIO) -> Format:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        return self._format(head)

    def _format(self, head: bytes, *, inside: Format | None = None) -> Format:
        found = sniff(head, columns=self._columns)
        where = "" if inside is None else f" inside {_NAMES[inside]}"
        if isinstance(found, Unreadable):
            raise unsupported(f"{found.name}{where}", found.hint)
        if inside is not None and found in COMPRESSIONS | {Format.ZIP}:
            raise unsupported(
                f"{_NAMES.get(found, found)}{where}", "decompress it once: only one layer is read"
            )
        return found

    def _plain(self, file: BinaryIO, format_: Format) -> Iterator[Line]:
        if format_ in TABLES:
            yield from self._table(file, format_)
        else:
            yield from self._text(self._blocks(file), format_)

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        while block := file.read(BLOCK):
            self._count(len(block))
            yield block

    def _count(self, size: int) -> None:
        self._read += size * self._scale

    def _compressed(self, file: BinaryIO, compression: Format) -> Iterator[Line]:
        blocks = decompressed(file, compression, budget=self._budget, on_read=self._count)
        head = b""
        for block in blocks:
            head += block
            if len(head) >= HEAD_BYTES:
                break
        format_ = self._format(head, inside=compression)
        self.contents.container = f"{format_}.{compression}"
        if format_ in TEXTS:
            yield from self._text(chain((head,), blocks), format_)
            return
        if format_ in ARCHIVES and self._in_archive:
            raise _archive_in_archive(format_)
        # The other half is the reading of what is unpacked here.
        self._scale /= 2
        with tempfile.TemporaryFile(dir=self._folder) as copy:
            for block in chain((head,), blocks):
                copy.write(block)
            copy.seek(0)
            if format_ in ARCHIVES:
                yield from self._archive(copy, format_)
            else:
                yield from self._table(copy, format_)

    def _text(self, blocks: Iterator[bytes], format_: Format) -> Iterator[Line]:
        """Turn text into rows; a UTF-8 byte order mark is taken off."""
        most = self._limits.max_line_bytes
        measured = self._measured(blocks)
        match format_:
            case Format.JSON:
                yield from split_array(measured, max_bytes=most)
            case Format.CSV | Format.TSV | Format.CSV_SEMICOLON:
                rows = CsvRows(format_, column_mapping=self._mapping, max_bytes=most)
                yield from rows.rows(measured)
            case _:
                yield from split_lines(measured, max_bytes=most)

    def _measured(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        head = b""
        for block in blocks:
            head += block
            if len(head) >= len(BOM):
                break
        size = 0
        for block in chain((head.removeprefix(BOM),), blocks):
            size += len(block)
            self._budget.check_size(size)
            if block:
                yield block

    def _table(self, file: BinaryIO, format_: Format) -> Iterator[Line]:
        # A text must not load Arrow.
        from worker.ingest.tables import table_rows

        before = self._read

        def on_part(part: float) -> None:
            self._read = before + part * (self._end - before)

        yield from table_rows(
            file,
            format_,
            budget=self._budget,
            max_bytes=self._limits.max_line_bytes,
            on_part=on_part,
        )

    def _archive(self, file: BinaryIO, format_: Format) -> Iterator[Line]:
        """Yield the rows of all data files; numbers go on from one to the next."""
        last = 0
        before, left = self._read, self._end - self._read
        self._in_archive = True
        for member in members(file, format_, folder=self._folder, budget=self._budget):
            self._end = before + member.done * left
            self._scale = (self._end - self._read) / max(1, member.size)
            start = last
            for line in self._member(member.name, member.copy, first_line=start + 1):
                last = start + line.number
                yield Line(last, line.data, line.length, line.oversize, line.fault)
            self._read = self._end
        if not self.contents.members:
            raise no_data(self.contents.ignored)

    def _member(self, name: str, copy: BinaryIO, *, first_line: int) -> Iterator[Line]:
        head = copy.read(HEAD_BYTES)
        copy.seek(0)
        found = sniff(head, columns=self._columns, only_known=True)
        if isinstance(found, Unreadable) or not looks_like_data(head, found):
            self.contents.ignored.append(name)
            return
        if found in ARCHIVES:
            raise _archive_in_archive(found)
        member = Member(name, found.value, first_line)
        self.contents.members.append(member)
        if found in COMPRESSIONS:
            outer, self.contents.container = self.contents.container, None
            try:
                yield from self._compressed(copy, found)
                member.container = str(self.contents.container)
            finally:
                self.contents.container = outer
        else:
            yield from self._plain(copy, found)


_NAMES = {Format.GZIP: "gzip", Format.ZSTD: "zstd", Format.XZ: "xz"}


def _archive_in_archive(format_: Format) -> UnsupportedMedia:
    return UnsupportedMedia(
        f"received {format_} in an archive; expected data files in it",
        hint="unpack it: only one layer is read",
        param="file",
    )
