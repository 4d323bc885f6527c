"""One file out of pieces that come over a network: within limits, resumed, checked.

Several remote files become one tar, whose layout is known before the first byte arrives: the length
of what is there says where to go on.
"""

import fcntl
import hashlib
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, Protocol

from core.errors import InvalidInput, TooLarge, Unavailable
from worker.ingest.files import full_disk_as_error

BLOCK = 256 * 1024
_TAR_BLOCK = 512
_WAIT_S = 0.1


@dataclass(frozen=True)
class Checksum:
    """What the bytes of a piece must hash to; `prefix` is hashed before them."""

    algorithm: str
    value: str
    prefix: bytes = b""


@dataclass(frozen=True)
class Limits:
    """Of all pieces together."""

    max_bytes: int
    deadline_s: float


class Gauge:
    """Counts bytes, and stops a transfer that is too large, too slow or not wanted any more.

    `on_bytes(done, total)` may raise to stop; `total` is None while it is not known.
    """

    def __init__(self, limits: Limits, on_bytes: Callable[[int, int | None], None]) -> None:
        self.limits = limits
        self.total: int | None = None
        self._on_bytes = on_bytes
        self._ends_at = time.monotonic() + limits.deadline_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline.

        Raises:
            InvalidInput: code `source_too_slow`: it has passed.
        """
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise self._too_slow()
        return left

    def late(self) -> InvalidInput | None:
        """Return the error of a transfer that has passed its deadline; None before it."""
        return None if time.monotonic() < self._ends_at else self._too_slow()

    def _too_slow(self) -> InvalidInput:
        return InvalidInput(
            f"the source took more than {self.limits.deadline_s:g} s",
            code="source_too_slow",
            param="source",
            hint="upload the file, or raise KDPO_SOURCES__DEADLINE_S",
        )

    def expect(self, total: int) -> None:
        """Say how many bytes there will be.

        Raises:
            TooLarge: more than the limit.
        """
        self.total = total
        self._check_size(total)

    def count(self, done: int) -> None:
        """Say how many bytes there are.

        Raises:
            TooLarge: more than the limit.
            InvalidInput: the deadline has passed.
        """
        self._check_size(done)
        if self.left_s > 0:
            self._on_bytes(done, self.total)

    def _check_size(self, size: int) -> None:
        if size > self.limits.max_bytes:
            raise TooLarge(
                f"the source has more than {self.limits.max_bytes} bytes, the limit here",
                code="file_too_large",
                param="source",
                hint="take a smaller split or file, or raise KDPO_SOURCES__MAX_BYTES and "
                "KDPO_DATA__MAX_DECOMPRESSED_BYTES",
            )


class Sink:
    """Where a remote file's bytes go: behind those of the pieces before it."""

    def __init__(self, file: BinaryIO, *, folder: Path, start: int, gauge: Gauge) -> None:
        self._file = file
        self._folder = folder
        self._start = start
        self.gauge = gauge

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self.gauge.count(self._file.tell() + len(data))
        # Here already: who reads from a network takes any other OSError for a fault of it.
        with full_disk_as_error(self._folder):
            self._file.write(data)

    def restart(self) -> None:
        """Drop what is there of this piece."""
        self._file.seek(self._start)
        self._file.truncate()


class Remote(Protocol):
    """A file elsewhere."""

    @property
    def size(self) -> int | None:
        """Its size, where it is known before it is asked for."""

    @property
    def checksum(self) -> Checksum | None:
        """What its bytes hash to, where that is known."""

    def copy(self, sink: Sink, *, offset: int) -> None:
        """Write the bytes from `offset` to the end; may `restart` the sink and write all."""


Piece = bytes | Remote


def as_tar(files: Sequence[tuple[str, Remote]]) -> list[Piece]:
    """Return the pieces of a tar with these files; the same files give the same bytes.

    Every size must be known.
    """
    pieces: list[Piece] = []
    for name, remote in files:
        assert remote.size is not None
        info = tarfile.TarInfo(name)
        info.size = remote.size
        pieces.append(info.tobuf(format=tarfile.GNU_FORMAT, encoding="utf-8"))
        pieces.append(remote)
        pieces.append(b"\0" * (-remote.size % _TAR_BLOCK))
    pieces.append(b"\0" * (2 * _TAR_BLOCK))
    return pieces


def assemble(
    pieces: Sequence[Piece], file: BufferedRandom, *, folder: Path, gauge: Gauge
) -> tuple[int, str]:
    """Complete a file, from wherever an earlier attempt left it; return size and SHA-256.

    `folder` is where it lies.

    Raises:
        Unavailable: a piece came damaged (it is dropped), or did not come.
        TooLarge: a limit is passed.
        StorageFull: the disk has no room.
    """
    sizes = [len(p) if isinstance(p, bytes) else p.size for p in pieces]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        gauge.expect(sum(known))
    with full_disk_as_error(folder):
        there = file.seek(0, os.SEEK_END)
        start = 0
        for piece, size in zip(pieces, sizes, strict=True):
            # A file of unknown size is the only piece: what is there belongs to it.
            if size is None or there <= start + size:
                sink = Sink(file, folder=folder, start=start, gauge=gauge)
                start = _complete(piece, file, sink, start=start, there=there)
            else:
                start += size
        file.truncate(start)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return start, hashlib.file_digest(file, "sha256").hexdigest()


def _complete(piece: Piece, file: BinaryIO, sink: Sink, *, start: int, there: int) -> int:
    """Write what is missing of a piece; return where it ends."""
    offset = max(0, there - start)
    if isinstance(piece, bytes):
        file.seek(start)
        file.write(piece)
        sink.gauge.count(file.tell())
        return file.tell()
    file.seek(start + offset)
    if piece.size is None or offset < piece.size:
        piece.copy(sink, offset=offset)
    end = file.tell()
    if piece.checksum is not None and _hash(file, start, end, piece.checksum) != (
        piece.checksum.value
    ):
        file.seek(start)
        file.truncate()
        raise damaged(piece.checksum)
    file.seek(end)
    return end


def damaged(checksum: Checksum) -> Unavailable:
    """Return the error of a piece that came damaged; asking again may help."""
    return Unavailable(
        f"what arrived does not have the {checksum.algorithm} that its server names",
        code="source_unreachable",
        param="source",
        hint="it is fetched again in the next attempt",
    )


def check_sha256(found: str, wanted: str | None) -> None:
    """Check the checksum that the request names.

    Raises:
        InvalidInput: code `source_changed`.
    """
    if wanted is not None and found != wanted:
        raise InvalidInput(
            f"the file has the SHA-256 {found}, expected {wanted}",
            code="source_changed",
            param="source.sha256",
            hint="the file has changed, or the checksum is of another one",
        )


def _hash(file: BinaryIO, start: int, end: int, checksum: Checksum) -> str:
    digest = hashlib.new(checksum.algorithm, checksum.prefix, usedforsecurity=False)
    file.seek(start)
    while start < end:
        block = file.read(min(BLOCK, end - start))
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


@contextmanager
def sole_writer(part: Path, *, on_wait: Callable[[], None]) -> Iterator[BufferedRandom]:
    """Open a file that only this process writes to, or renames, until the block ends.

    While another process has it, `on_wait` is called, which may raise to stop.

    Raises:
        StorageFull: the disk has no room.
    """
    with full_disk_as_error(part.parent):
        part.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "r+b") as file:
                if _is_locked(file) and _is_at(part, file):
                    yield file
                    return
            on_wait()
            time.sleep(_WAIT_S)


def _is_locked(file: BufferedRandom) -> bool:
    """Lock a file if nobody else has; closing it ends that, and so does the end of a process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: BufferedRandom) -> bool:
    """Whether a file still has its name: who had it before may have put it in its place."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False
