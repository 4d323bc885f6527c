"""Files over HTTP: strong ETags, one byte range, no path that leads out of its folder."""

import base64
import os
import re
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.errors import problem_response
from app.responses import etag_matches
from core.errors import FailureCode, NotFound, RunAborted
from core.settings import MIB

CHUNK_BYTES = MIB
RANGE_RESPONSES: dict[int | str, dict[str, Any]] = {
    206: {"description": "The range that was asked for"},
    304: {"description": "The client has this file already"},
    416: {"description": "The range begins behind the end of the file"},
}
"""What `file_response` answers besides 200, for the OpenAPI description."""
HEAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Size, hash and ETag in the headers, as of a GET"},
    304: {"description": "The client has this file already"},
}
"""What it answers to HEAD, which knows no ranges."""
_TYPES = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".parquet": "application/vnd.apache.parquet",
}
FILE_CONTENT: dict[str, dict[str, Any]] = {
    kind: {} for kind in ("application/octet-stream", *_TYPES.values())
}
"""As what a file of any name is sent, for the OpenAPI description."""
_STANDING = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "private, max-age=31536000, immutable",
    "X-Content-Type-Options": "nosniff",
}
_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class StoredFile:
    """A file of a published folder, as its manifest describes it."""

    folder: Path
    path: str
    size_bytes: int
    sha256: str
    filename: str | None = None

    @property
    def etag(self) -> str:
        """The strong ETag: the content's own hash."""
        return f'"sha256:{self.sha256}"'

    @property
    def name(self) -> str:
        """What it is called where it is saved."""
        return self.filename or self.path.rpartition("/")[2]


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop`, without `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Content:
    """What can be sent whole or in part; `open` raises what is wrong before a status is sent."""

    size_bytes: int
    headers: dict[str, str]
    open: Callable[[], "Opened"]


class Opened(Protocol):
    """Content that is ready to be sent; whoever has it closes it, once."""

    def chunks(self, part: ByteRange) -> AsyncIterator[bytes]:
        """Give the bytes of a part."""

    def close(self) -> None:
        """Close its files."""


class Unsatisfiable(RunAborted):
    """A range begins behind the end of the file."""


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Return the one range that is asked for; None for the whole file (RFC 9110, 14.1.2).

    A header of another form, or with several ranges, is ignored as the RFC allows.

    Raises:
        Unsatisfiable: the range has no byte of the file.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or not (match.group(1) or match.group(2)):
        return None
    first, last = match.group(1), match.group(2)
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), size if not last else min(int(last) + 1, size)
        if last and int(last) < start:
            return None
    if start >= stop:
        raise Unsatisfiable(
            f"range {header!r} has no byte of a file of {size} bytes", failure=FailureCode.INTERNAL
        )
    return ByteRange(start, stop)


def open_inside(file: StoredFile) -> int:
    """Open a file for reading and return its descriptor; links are not followed.

    Raises:
        NotFound: the path leads out of the folder, or is not a regular file.
        RunAborted: the file is not the one that was published.
    """
    folder = Path(os.path.realpath(file.folder))
    target = folder / file.path
    if not Path(os.path.realpath(target)).is_relative_to(folder):
        raise NotFound(f"no file {file.path!r}")
    try:
        handle = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise NotFound(f"the file {file.path!r} is gone from the server's disk") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size != file.size_bytes:
        os.close(handle)
        raise RunAborted(
            f"{file.path!r} has {status.st_size} bytes, published were {file.size_bytes}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="the file on the server's disk has changed: export, train or validate again",
        )
    return handle


@dataclass(frozen=True)
class _OpenedFile:
    handle: int

    def close(self) -> None:
        os.close(self.handle)

    def chunks(self, part: ByteRange) -> AsyncIterator[bytes]:
        return read_range(self.handle, part)


class _Sending(StreamingResponse):
    """Sends a part of opened content and closes it, also when the client left before it began."""

    def __init__(
        self, opened: Opened, part: ByteRange, *, status: int, headers: dict[str, str]
    ) -> None:
        super().__init__(opened.chunks(part), status_code=status, headers=headers)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._opened.close()


async def file_response(request: Request, file: StoredFile) -> Response:
    """Return the file, a range of it, 304 or 416, as the request's conditions say."""
    content = Content(file.size_bytes, _headers(file), lambda: _OpenedFile(open_inside(file)))
    return await content_response(request, content)


async def content_response(request: Request, content: Content) -> Response:
    """Return the content, a range of it, 304 or 416, as the request's conditions say."""
    headers = {**content.headers, **_STANDING}
    etag = headers["ETag"]
    if etag_matches(request.headers.get("if-none-match"), etag):
        kept = ("ETag", "Cache-Control")
        return Response(status_code=304, headers={name: headers[name] for name in kept})
    wanted = request.headers.get("range")
    # Ranges are for GET only (RFC 9110, 14.2).
    if request.method != "GET" or request.headers.get("if-range", etag) != etag:
        wanted = None
    try:
        part = parse_range(wanted, content.size_bytes)
    except Unsatisfiable as error:
        return problem_response(
            request,
            status=416,
            code="range_not_satisfiable",
            detail=error.message,
            headers={"Content-Range": f"bytes */{content.size_bytes}", "Accept-Ranges": "bytes"},
        )
    opened = await run_in_threadpool(content.open)
    sent = part or ByteRange(0, content.size_bytes)
    headers["Content-Length"] = str(sent.stop - sent.start)
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{content.size_bytes}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        opened.close()
        return Response(headers=headers)
    return _Sending(opened, sent, status=status, headers=headers)


async def read_range(handle: int, part: ByteRange) -> AsyncIterator[bytes]:
    """Give the bytes of an open file from `start` to `stop`.

    Raises:
        RunAborted: the file ends before.
    """
    position = part.start
    while position < part.stop:
        size = min(CHUNK_BYTES, part.stop - position)
        chunk = await run_in_threadpool(os.pread, handle, size, position)
        if not chunk:
            raise RunAborted(
                "the file became shorter while it was sent",
                failure=FailureCode.CHECKPOINT_CORRUPT,
            )
        position += len(chunk)
        yield chunk


def attachment(name: str) -> str:
    """Return the `Content-Disposition` under which a client saves it (RFC 6266, 5)."""
    return f"attachment; filename*=utf-8''{quote(name)}"


def _headers(file: StoredFile) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    return {
        "ETag": file.etag,
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": attachment(file.name),
        "Content-Type": _TYPES.get(Path(file.name).suffix, "application/octet-stream"),
    }
