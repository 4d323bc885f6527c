"""Receives a multipart upload straight to its final disk, hashed while it is written."""

import asyncio
import errno
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import anyio
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.limits import admit_upload
from core.errors import InvalidInput, MalformedRequest, StorageFull, TooLarge, UnsupportedMedia
from core.settings import MIB

# What is written and hashed at once; below, handing it to threads costs as much as hashing it.
WRITE_BYTES = 4 * MIB
# Each piece of a body is an object of its own, however small its sender makes them.
WRITE_PIECES = 1024
MAX_FIELD_BYTES = 64 * 1024
PART_SUFFIX = ".part"
STALE_S = 86_400.0
# Room that an upload must leave on the disk for the database.
SPARE_BYTES = 64 * MIB
FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Upload:
    """A file that lies under its final name."""

    path: Path
    size_bytes: int
    sha256: str
    filename: str | None
    fields: dict[str, str]


@dataclass
class _Part:
    """The part that is being read."""

    name: str = ""
    data: bytearray = field(default_factory=bytearray)


@dataclass
class _Form:
    """Turns the parser's callbacks into fields and into chunks of the one file."""

    allowed: frozenset[str]
    file: str = "file"
    pending: list[memoryview] = field(default_factory=list)
    pending_bytes: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    has_file: bool = False
    is_complete: bool = False
    _names: set[str] = field(default_factory=set)
    _part: _Part = field(default_factory=_Part)
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _disposition: bytes = b""

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )

    def _begin(self) -> None:
        self._part = _Part()
        self._disposition = b""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", errors="replace")
        known = ", ".join(sorted(self.allowed | {self.file}))
        if name not in self.allowed | {self.file}:
            raise InvalidInput(
                f"unknown field {name[:100]!r}; this endpoint takes {known}",
                code="unknown_parameter", param=name[:100],
            )  # fmt: skip
        if name in self._names:
            raise InvalidInput(f"the field {name!r} came twice; send it once", param=name)
        self._names.add(name)
        self._part.name = name
        if name == self.file:
            self.has_file = True
            filename = options.get(b"filename", b"").decode("utf-8", errors="replace")
            self.filename = filename.replace("\\", "/").rpartition("/")[2] or None

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == self.file:
            # A view, as a copy of all that comes would cost more than the parsing.
            self.pending.append(memoryview(data)[start:end])
            self.pending_bytes += end - start
            return
        self._part.data += data[start:end]
        if len(self._part.data) > MAX_FIELD_BYTES:
            raise TooLarge(
                f"the field {self._part.name!r} is longer than {MAX_FIELD_BYTES} bytes",
                param=self._part.name,
            )

    def take(self) -> list[memoryview]:
        """Return what has come of the file since the last call."""
        taken, self.pending, self.pending_bytes = self.pending, [], 0
        return taken

    def _end(self) -> None:
        if self._part.name == self.file:
            return
        try:
            self.fields[self._part.name] = self._part.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput(
                f"the field {self._part.name!r} is not UTF-8", param=self._part.name
            ) from error

    def _complete(self) -> None:
        self.is_complete = True


async def receive_upload(
    request: Request,
    target: Path,
    *,
    max_bytes: int,
    fields: frozenset[str],
    file_part: str = "file",
) -> Upload:
    """Write the part `file_part` of a multipart body to `target` (0600, fsync, rename).

    The other parts must be among `fields`. When anything fails, no file is left.

    Raises:
        UnsupportedMedia: the body is not multipart/form-data.
        MalformedRequest: it breaks off or is not well formed.
        InvalidInput: there is no file, the file is empty, or a field is unknown.
        TooLarge: the file is larger than `max_bytes`.
        StorageFull: the disk has no room.
        QuotaExceeded: the owner may not upload or store so much, or has too many jobs waiting.
    """
    boundary = _boundary(request)
    await run_in_threadpool(admit_upload, request, _told_bytes(request))
    temporary = target.with_name(f".{target.name}{PART_SUFFIX}")
    try:
        await run_in_threadpool(make_room, target.parent, _told_bytes(request))
        form = _Form(allowed=fields, file=file_part)
        with await run_in_threadpool(create_private, temporary) as file:
            size, sha256 = await _copy(
                request.stream(), form.parser(boundary), form, file, max_bytes=max_bytes
            )
            await run_in_threadpool(sync, file)
        if not form.is_complete:
            raise MalformedRequest(
                "the multipart body ends before its last boundary; send it again"
            )
        if not form.has_file:
            raise InvalidInput(
                f"the form has no part named `{file_part}`", code="missing_file", param=file_part,
                hint=f"curl -F {file_part}=@data.jsonl sends one",
            )  # fmt: skip
        if size == 0:
            raise InvalidInput(
                "the file is empty", code="empty_file", param=file_part,
                hint="upload JSON Lines with one preference pair a line",
            )  # fmt: skip
        await run_in_threadpool(publish, temporary, target)
    except FormParserError as error:
        raise MalformedRequest(f"the multipart body is not well formed: {error}") from error
    except ClientDisconnect as error:
        raise MalformedRequest("the client went away before the body was complete") from error
    except OSError as error:
        if error.errno not in FULL_ERRORS:
            raise
        raise no_room() from error
    finally:
        await run_in_threadpool(temporary.unlink, missing_ok=True)
    return Upload(target, size, sha256, form.filename, form.fields)


def remove_stale_parts(folder: Path) -> list[Path]:
    """Remove what uploads left when their process was killed, a day after the last byte."""
    oldest = time.time() - STALE_S
    stale = [p for p in folder.glob(f".*{PART_SUFFIX}") if p.stat().st_mtime < oldest]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


async def _copy(
    stream: AsyncIterator[bytes],
    parser: MultipartParser,
    form: _Form,
    file: BinaryIO,
    *,
    max_bytes: int,
) -> tuple[int, str]:
    """Feed the body to the parser and keep what it finds; the next comes meanwhile."""
    size = 0
    async with _keeping(file) as kept:
        async for chunk in stream:
            parser.write(chunk)
            if size + form.pending_bytes > max_bytes:
                raise TooLarge(
                    f"the file is larger than {max_bytes} bytes, which is the limit here",
                    param="file",
                    hint="upload a sample, compress it with gzip, or raise "
                    "KDPO_API__MAX_UPLOAD_BYTES",
                )
            if form.pending_bytes >= WRITE_BYTES or len(form.pending) >= WRITE_PIECES:
                size += form.pending_bytes
                await kept.add(form.take())
        parser.finalize()
        size += form.pending_bytes
        await kept.add(form.take())
    return size, kept.digest.hexdigest()


class _Kept:
    """A file that is written and hashed in two threads beside the event loop."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self._file = file
        self._running: list[asyncio.Task[None]] = []

    async def add(self, pieces: list[memoryview]) -> None:
        """Begin to keep what comes next, when all before it is kept."""
        await self.done()
        self._running = [
            asyncio.create_task(run_in_threadpool(do, pieces)) for do in (self._write, self._hash)
        ]

    async def done(self) -> None:
        """Wait until all is kept."""
        running, self._running = self._running, []
        if running:
            # Both end before either's error is raised: nobody may write to a file that is closed.
            await asyncio.wait(running)
            for task in running:
                task.result()

    def _write(self, pieces: list[memoryview]) -> None:
        self._file.writelines(pieces)

    def _hash(self, pieces: list[memoryview]) -> None:
        for piece in pieces:
            self.digest.update(piece)


@asynccontextmanager
async def _keeping(file: BinaryIO) -> AsyncIterator[_Kept]:
    """Give what keeps a file; when the block ends, however it ends, no thread uses it any more."""
    kept = _Kept(file)
    try:
        yield kept
    finally:
        with anyio.CancelScope(shield=True):
            await kept.done()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedMedia(
            f"received content type {kind.decode('latin-1') or 'none'!r}, expected "
            "multipart/form-data with a boundary",
            hint="curl -F file=@data.jsonl sends it; a dataset can also be JSON with a `source`",
        )
    return boundary


def _told_bytes(request: Request) -> int:
    told = request.headers.get("content-length", "")
    return int(told) if told.isascii() and told.isdigit() else 0


def make_room(folder: Path, needed: int) -> None:
    """Make the folder, and see that its disk has room for so many bytes.

    Raises:
        StorageFull: it has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed + SPARE_BYTES:
        raise no_room()


def create_private(path: Path) -> BinaryIO:
    """Make a file that only this user reads; it must not be there yet."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    return os.fdopen(handle, "wb")


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, for good."""
    temporary.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def no_room() -> StorageFull:
    """Return the error of a disk that is full."""
    return StorageFull(
        "the server's disk has no room for the upload",
        hint="free space on the server and send it again",
    )
