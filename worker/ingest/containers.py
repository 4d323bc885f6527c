"""From a file to numbered lines of bytes, within limits.

The container is told from its first bytes, never from a name. Memory is bounded by one block and
one line, whatever the file claims or expands to.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from core.errors import InvalidInput, TooLarge, UnsupportedMedia
from core.settings import MIB, DataLimits

_BLOCK = 64 * 1024
_HEAD = 512
_RATIO_FREE_BYTES = MIB
_MAX_EMPTY_MEMBERS = 1000
_GZIP_WBITS = 31
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"

_HINT_JSONL = "upload JSON Lines: one JSON object a line, UTF-8, plain or gzip (.jsonl, .jsonl.gz)"

_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x28\xb5\x2f\xfd", "zstd", "decompress it first: zstd -d file.zst"),
    (b"\xfd7zXZ\x00", "xz", "decompress it first: xz -d file.xz"),
    (b"BZh", "bzip2", "decompress it first: bzip2 -d file.bz2"),
    (b"PK\x03\x04", "zip", "unpack it and upload the JSONL file inside"),
    (b"PK\x05\x06", "zip", "unpack it and upload the JSONL file inside"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "unpack it and upload the JSONL file inside"),
    (b"PAR1", "parquet", "convert it: datasets.Dataset.from_parquet(f).to_json('data.jsonl')"),
    (b"ARROW1", "arrow", "convert it: datasets.Dataset.from_file(f).to_json('data.jsonl')"),
    (b"\x89HDF\r\n", "hdf5", _HINT_JSONL),
    (b"SQLite format 3\x00", "sqlite", _HINT_JSONL),
    (b"%PDF", "pdf", _HINT_JSONL),
    (b"\xff\xfe\x00\x00", "utf-32 text", "convert it: iconv -f UTF-32 -t UTF-8 in > out"),
    (b"\x00\x00\xfe\xff", "utf-32 text", "convert it: iconv -f UTF-32 -t UTF-8 in > out"),
    (b"\xff\xfe", "utf-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
    (b"\xfe\xff", "utf-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
)


class Container(StrEnum):
    """What can be read."""

    JSONL = "jsonl"
    JSONL_GZ = "jsonl.gz"


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end; of an oversize line `data` holds only the beginning."""

    number: int
    data: bytes
    length: int
    oversize: bool


def _unsupported(head: bytes) -> tuple[str, str] | None:
    """Return the name and hint of a known format that is not JSONL text, if `head` is one."""
    for magic, name, hint in _MAGICS:
        if head.startswith(magic):
            return name, hint
    if head[257:262] == b"ustar":
        return "tar", "unpack it and upload the JSONL file inside"
    if len(head) >= 4 and any(head[::2]) != any(head[1::2]):
        return "utf-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"
    return None


def _refuse(head: bytes, *, inside_gzip: bool) -> None:
    """Raise UnsupportedMedia when `head` is of a known format that is not JSONL text."""
    found = _unsupported(head)
    if found is None and inside_gzip and head.startswith(_GZIP_MAGIC):
        found = ("gzip inside gzip", "decompress it once: only one layer is read")
    if found is None:
        return
    name, hint = found
    where = " inside gzip" if inside_gzip and not name.startswith("gzip") else ""
    raise UnsupportedMedia(
        f"received {name}{where}; expected JSON Lines, plain or gzip", hint=hint, param="file"
    )


class LineReader:
    """Iterates over the lines of a file and counts what it has read.

    Raises while iterating:
        UnsupportedMedia: the first bytes are those of another format.
        TooLarge: `decompression_bomb`, or `file_too_large` beyond max_decompressed_bytes.
        InvalidInput: `truncated_gzip`, `corrupt_gzip`.
    """

    def __init__(self, source: Path, *, limits: DataLimits) -> None:
        self._source = source
        self._limits = limits
        self.total_bytes = source.stat().st_size
        self.read_bytes = 0
        self.decompressed_bytes = 0
        self.container = Container.JSONL

    def __iter__(self) -> Iterator[Line]:
        with self._source.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            if head.startswith(_GZIP_MAGIC):
                self.container = Container.JSONL_GZ
                yield from self._lines(self._inflated(file))
            else:
                yield from self._lines(self._plain(file))

    def _plain(self, file: BinaryIO) -> Iterator[bytes]:
        while block := file.read(_BLOCK):
            self.read_bytes += len(block)
            yield block

    def _inflated(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield blocks of at most 64 KiB from all members of a gzip file."""
        inflate = zlib.decompressobj(wbits=_GZIP_WBITS)
        data = b""
        member_bytes = empty_members = 0
        while True:
            if not data:
                data = file.read(_BLOCK)
                self.read_bytes += len(data)
                if not data:
                    raise InvalidInput(
                        "the gzip stream ends before its end mark: the file was cut off",
                        code="truncated_gzip",
                        hint="upload the whole file again; `gzip -t file` checks it",
                        param="file",
                    )
            try:
                block = inflate.decompress(data, _BLOCK)
            except zlib.error as error:
                raise InvalidInput(
                    f"the gzip stream is damaged near byte {self.read_bytes - len(data)}",
                    code="corrupt_gzip",
                    hint="compress the file again; `gzip -t file` checks it",
                    param="file",
                ) from error
            data = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
            member_bytes += len(block)
            if block:
                self._check_ratio(len(block), pending=len(data))
                yield block
            if not inflate.eof:
                continue
            empty_members = 0 if member_bytes else empty_members + 1
            if empty_members > _MAX_EMPTY_MEMBERS:
                raise TooLarge(
                    f"more than {_MAX_EMPTY_MEMBERS} empty gzip members in a row",
                    code="decompression_bomb",
                    hint="compress the file again as one stream",
                    param="file",
                )
            data = self._next_member(file, data)
            if not data:
                return
            inflate = zlib.decompressobj(wbits=_GZIP_WBITS)
            member_bytes = 0

    def _next_member(self, file: BinaryIO, data: bytes) -> bytes:
        """Return the bytes at which the next member begins, empty at the end of the file.

        Zero padding after a member is legal (gzip manual, section 8) and skipped.
        """
        while True:
            data = data.lstrip(b"\x00")
            if data:
                return data
            data = file.read(_BLOCK)
            self.read_bytes += len(data)
            if not data:
                return b""

    def _check_ratio(self, size: int, *, pending: int) -> None:
        self.decompressed_bytes += size
        consumed = max(1, self.read_bytes - pending)
        ratio = self.decompressed_bytes / consumed
        if self.decompressed_bytes > _RATIO_FREE_BYTES and ratio > self._limits.max_ratio:
            raise TooLarge(
                f"the file expands {ratio:.0f}:1 after {consumed} bytes; at most "
                f"{self._limits.max_ratio:g}:1 is read",
                code="decompression_bomb",
                hint="upload the file uncompressed if it really is that repetitive",
                param="file",
            )

    def _lines(self, blocks: Iterator[bytes]) -> Iterator[Line]:
        pending = bytearray()
        number = length = seen = 0
        keep = self._limits.max_line_bytes + 1
        for block in self._checked(blocks):
            seen += len(block)
            if seen > self._limits.max_decompressed_bytes:
                raise TooLarge(
                    f"the text is longer than {self._limits.max_decompressed_bytes} bytes",
                    code="file_too_large",
                    hint="split the file, or raise KDPO_DATA__MAX_DECOMPRESSED_BYTES",
                    param="file",
                )
            start = 0
            while (end := block.find(b"\n", start)) >= 0:
                number += 1
                length += end - start
                pending += block[start : min(end, start + max(0, keep - len(pending)))]
                yield self._line(number, bytes(pending), length)
                pending.clear()
                length = 0
                start = end + 1
            length += len(block) - start
            pending += block[start : start + max(0, keep - len(pending))]
        if length:
            yield self._line(number + 1, bytes(pending), length)

    def _checked(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass blocks through; sniff the first bytes of text and take a UTF-8 BOM off."""
        head = b""
        for block in blocks:
            head += block
            if len(head) >= _HEAD:
                break
        _refuse(head, inside_gzip=self.container is Container.JSONL_GZ)
        if text := head.removeprefix(_BOM):
            yield text
        yield from blocks

    def _line(self, number: int, data: bytes, length: int) -> Line:
        if length == len(data) and data.endswith(b"\r"):
            data, length = data[:-1], length - 1
        oversize = length > self._limits.max_line_bytes
        return Line(number, data[:64] if oversize else data, length, oversize)
