"""Compressed streams in small blocks, and the limits on what they may expand to."""

import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import zstandard

from core.errors import InvalidInput, TooLarge
from core.settings import MIB, DataLimits
from worker.ingest.formats import Format

BLOCK = 64 * 1024
_RATIO_FREE_BYTES = MIB
_MAX_EMPTY_MEMBERS = 1000
_GZIP_WBITS = 31
_XZ_MEMORY = 256 * MIB
_ZSTD_WINDOW = 128 * MIB
# The library bounds no output. A block of 128 KiB needs at least 4 bytes: this gives 32 MiB.
_ZSTD_STEP = 1024


@dataclass
class Budget:
    """Counts what was read and what it became."""

    limits: DataLimits
    consumed: int = 0
    produced: int = 0

    def expand(self, size: int, *, pending: int = 0) -> None:
        """Count bytes that came out of compression; `pending` were read and not yet used.

        Raises:
            TooLarge: `decompression_bomb`, or `file_too_large`.
        """
        self.produced += size
        consumed = max(1, self.consumed - pending)
        ratio = self.produced / consumed
        if self.produced > _RATIO_FREE_BYTES and ratio > self.limits.max_ratio:
            raise TooLarge(
                f"the file expands {ratio:.0f}:1 after {consumed} bytes; at most "
                f"{self.limits.max_ratio:g}:1 is read",
                code="decompression_bomb",
                hint="upload the file uncompressed if it really is that repetitive",
                param="file",
            )
        self.check_size(self.produced)

    def check_size(self, size: int) -> None:
        """Compare the size of a text or file with the limit.

        Raises:
            TooLarge: `file_too_large`.
        """
        if size > self.limits.max_decompressed_bytes:
            raise TooLarge(
                f"the text is longer than {self.limits.max_decompressed_bytes} bytes",
                code="file_too_large",
                hint="split the file, or raise KDPO_DATA__MAX_DECOMPRESSED_BYTES",
                param="file",
            )


class _Stream(Protocol):
    """One compressed stream; a file may have several behind each other."""

    eof: bool

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        """Take input; return a block of output and the input that is left."""

    @property
    def hungry(self) -> bool:
        """Whether there is no more output without more input."""


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=_GZIP_WBITS)
        self.eof = False
        self.hungry = True

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        block = self._inner.decompress(data, BLOCK)
        self.eof = self._inner.eof
        return block, self._inner.unused_data if self.eof else self._inner.unconsumed_tail


class _Xz:
    def __init__(self) -> None:
        self._inner = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        self.eof = False
        self.hungry = True

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        block = self._inner.decompress(data, max_length=BLOCK)
        self.eof = self._inner.eof
        self.hungry = not self.eof and self._inner.needs_input
        return block, self._inner.unused_data if self.eof else b""


class _Zstd:
    def __init__(self) -> None:
        self._inner = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
        self.eof = False
        self.hungry = True

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        head, left = data[:_ZSTD_STEP], data[_ZSTD_STEP:]
        block = self._inner.decompress(head)
        self.eof = self._inner.eof
        return block, self._inner.unused_data + left if self.eof else left


_NAMES = {Format.GZIP: "gzip", Format.ZSTD: "zstd", Format.XZ: "xz"}
_ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError)


def _open(compression: Format) -> _Stream:
    match compression:
        case Format.GZIP:
            return _Gzip()
        case Format.ZSTD:
            return _Zstd()
        case Format.XZ:
            return _Xz()
        case _:
            raise AssertionError(f"{compression} is no compression")


def decompressed(
    file: BinaryIO, compression: Format, *, budget: Budget, on_read: Callable[[int], None]
) -> Iterator[bytes]:
    """Yield small blocks from all streams of a compressed file; `on_read` counts its bytes.

    Raises:
        TooLarge: `decompression_bomb`, or `file_too_large`.
        InvalidInput: `truncated_<compression>`, `corrupt_<compression>`.
    """
    name = _NAMES[compression]
    stream = _open(compression)
    data = b""
    stream_bytes = empty_streams = 0

    def read() -> bytes:
        found = file.read(BLOCK)
        budget.consumed += len(found)
        on_read(len(found))
        return found

    while True:
        if not data and stream.hungry:
            data = read()
            if not data:
                raise InvalidInput(
                    f"the {name} stream ends before its end mark: the file was cut off",
                    code=f"truncated_{name}",
                    hint=f"upload the whole file again; `{name} -t file` checks it",
                    param="file",
                )
        try:
            block, data = stream.step(data)
        except _ERRORS as error:
            raise InvalidInput(
                f"the {name} stream is damaged near byte {budget.consumed - len(data)}",
                code=f"corrupt_{name}",
                hint=f"compress the file again; `{name} -t file` checks it",
                param="file",
            ) from error
        stream_bytes += len(block)
        if block:
            budget.expand(len(block), pending=len(data))
            yield block
        if not stream.eof:
            continue
        empty_streams = 0 if stream_bytes else empty_streams + 1
        if empty_streams > _MAX_EMPTY_MEMBERS:
            raise TooLarge(
                f"more than {_MAX_EMPTY_MEMBERS} empty {name} members in a row",
                code="decompression_bomb",
                hint="compress the file again as one stream",
                param="file",
            )
        # Zero padding after a stream is legal (gzip manual, section 8; xz format, section 2.2).
        data = data.lstrip(b"\x00")
        while not data:
            found = read()
            if not found:
                return
            data = found.lstrip(b"\x00")
        stream = _open(compression)
        stream_bytes = 0
