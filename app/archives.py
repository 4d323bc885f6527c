"""A folder as one tar: made while it is sent, the same bytes each time, any range of it.

Its size and its every byte follow from the manifest, so that nothing is copied or kept.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from app.downloads import ByteRange, Content, StoredFile, attachment, open_inside, read_range

_END = bytes(2 * tarfile.BLOCKSIZE)
# Part of the ETag: raised when the same files would give other bytes.
_FORM = 1


@dataclass(frozen=True)
class _Piece:
    """Bytes of the archive from `start`: some of its own, or a file."""

    start: int
    size: int
    data: bytes = b""
    file: int | None = None


def tar_of(files: Sequence[StoredFile], *, name: str, created_at: int) -> Content:
    """Return files as an uncompressed tar, in the order of their paths, below a folder `name`."""
    ordered = sorted(files, key=lambda file: file.path)
    pieces = _pieces(ordered, name=name, created_at=created_at)
    about = [_FORM, name, created_at, *([f.path, f.size_bytes, f.sha256] for f in ordered)]
    version = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    headers = {
        "ETag": f'"tar:{version}"',
        "Content-Disposition": attachment(f"{name}.tar"),
        "Content-Type": "application/x-tar",
    }
    size = pieces[-1].start + pieces[-1].size
    return Content(size, headers, lambda: _OpenedTar(_open_all(ordered), pieces))


def _pieces(files: Sequence[StoredFile], *, name: str, created_at: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    start = 0

    def add(size: int, *, data: bytes = b"", file: int | None = None) -> None:
        nonlocal start
        pieces.append(_Piece(start, size, data, file))
        start += size

    for index, file in enumerate(files):
        member = tarfile.TarInfo(f"{name}/{file.path}")
        member.size, member.mtime, member.mode = file.size_bytes, created_at, 0o644
        header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        add(len(header), data=header)
        add(file.size_bytes, file=index)
        padding = -file.size_bytes % tarfile.BLOCKSIZE
        add(padding, data=bytes(padding))
    add(len(_END), data=_END)
    return pieces


def _open_all(files: Sequence[StoredFile]) -> list[int]:
    handles: list[int] = []
    try:
        handles.extend(map(open_inside, files))
    except BaseException:
        for handle in handles:
            os.close(handle)
        raise
    return handles


@dataclass(frozen=True)
class _OpenedTar:
    handles: list[int]
    pieces: list[_Piece]

    def close(self) -> None:
        for handle in self.handles:
            os.close(handle)

    async def chunks(self, part: ByteRange) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            first = max(part.start - piece.start, 0)
            last = min(part.stop - piece.start, piece.size)
            if first >= last:
                continue
            if piece.file is None:
                yield piece.data[first:last]
                continue
            async for chunk in read_range(self.handles[piece.file], ByteRange(first, last)):
                yield chunk
