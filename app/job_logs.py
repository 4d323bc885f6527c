"""What an attempt has written: as text with ranges, or as JSON lines with offsets."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request, Response
from starlette.responses import StreamingResponse

from app.downloads import RANGE_RESPONSES, ByteRange, Unsatisfiable, parse_range
from app.errors import problem_response
from core.errors import InvalidInput, NotFound
from core.logs import LOG_NAME, mask
from core.settings import Settings
from models.job import Job

CHUNK_BYTES = 256 * 1024
TEXT = "text/plain; charset=utf-8"
JSON_LINES = "application/jsonl"
LOG_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The log, or the part of it that `tail` and `after` name",
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            JSON_LINES: {
                "schema": {"type": "string"},
                "example": '{"attempt":1,"offset":120,"line":"…"}\n',
            },
        },
    },
    206: RANGE_RESPONSES[206],
    416: {"description": "The range begins behind the end: nothing new was written"},
}


@dataclass(frozen=True)
class LogQuery:
    """Which attempt, and which part of its log in which form."""

    attempt: int | None
    tail: int | None
    after: int | None
    form: Literal["text", "jsonl"]


async def log_query(
    attempt: Annotated[
        int | None, Query(ge=1, lt=2**31, description="counts from 1; default: the last one")
    ] = None,
    tail: Annotated[int | None, Query(ge=1, le=100_000, description="last lines")] = None,
    after: Annotated[
        int | None, Query(ge=0, lt=2**63, description="bytes of the log that the client has")
    ] = None,
    form: Annotated[
        Literal["text", "jsonl"],
        Query(alias="format", description="jsonl: each line with the offset behind it"),
    ] = "text",
) -> LogQuery:
    """Return what is asked for.

    Raises:
        InvalidInput: two options contradict each other.
    """
    if tail is not None and after is not None:
        raise InvalidInput(
            "tail counts from the end and after from the start: give one of them", param="after"
        )
    return LogQuery(attempt, tail, after, form)


LogQueryOf = Annotated[LogQuery, Depends(log_query)]


def log_response(request: Request, settings: Settings, job: Job, query: LogQuery) -> Response:
    """Return the log of an attempt; it is empty until the attempt writes.

    Raises:
        NotFound: the job has no such attempt.
    """
    attempt = job.attempt if query.attempt is None else query.attempt
    if attempt > job.attempt:
        raise NotFound(
            f"job {job.id} has no attempt {attempt}", hint=f"it has {job.attempt}", param="attempt"
        )
    path = settings.artifact_dir / "jobs" / job.id / f"a{attempt}" / LOG_NAME
    size = path.stat().st_size if path.is_file() else 0
    part = ByteRange(0, size)
    headers = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    if query.tail is not None:
        part = ByteRange(_tail_start(path, size, query.tail), size)
    elif query.after is not None:
        part = ByteRange(min(query.after, size), size)
    elif query.form == "text":
        headers["Accept-Ranges"] = "bytes"
        try:
            asked = parse_range(request.headers.get("range"), size)
        except Unsatisfiable as error:
            return problem_response(
                request, status=416, code="range_not_satisfiable", detail=error.message,
                headers={"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"},
            )  # fmt: skip
        if asked is not None:
            headers["Content-Range"] = f"bytes {asked.start}-{asked.stop - 1}/{size}"
            headers["Content-Length"] = str(asked.stop - asked.start)
            return StreamingResponse(
                _masked(path, asked), status_code=206, headers=headers, media_type=TEXT
            )
    if query.form == "text":
        headers["Content-Length"] = str(part.stop - part.start)
        return StreamingResponse(_masked(path, part), headers=headers, media_type=TEXT)
    return StreamingResponse(
        _json_lines(path, part, attempt), headers=headers, media_type=JSON_LINES
    )


def _masked(path: Path, part: ByteRange) -> Iterator[bytes]:
    """Read a part of a file without secrets; whole lines are masked, then cut."""
    for start, lines in _lines(path, part):
        low = max(part.start - start, 0)
        high = min(part.stop - start, len(lines))
        yield lines[low:high]


def _json_lines(path: Path, part: ByteRange, attempt: int) -> Iterator[bytes]:
    """Read the whole lines that begin in a part of a file."""
    for start, lines in _lines(path, part):
        offset = start
        for line in lines.splitlines(keepends=True):
            begins, offset = offset, offset + len(line)
            if part.start <= begins and line.endswith(b"\n"):
                entry = {
                    "attempt": attempt,
                    "offset": offset,
                    "line": line.rstrip(b"\r\n").decode(errors="replace"),
                }
                yield json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _lines(path: Path, part: ByteRange) -> Iterator[tuple[int, bytes]]:
    """Read masked blocks of whole lines that cover a part, each with its offset."""
    if part.start >= part.stop:
        return
    with path.open("rb") as file:
        handle = file.fileno()
        position = _line_start(handle, part.start)
        while position < part.stop:
            block = os.pread(handle, CHUNK_BYTES, position)
            whole = block.rfind(b"\n") + 1 or len(block)
            if not whole:
                return
            yield position, mask(block[:whole])
            position += whole


def _line_start(handle: int, offset: int) -> int:
    """Return where the line of an offset begins, or a chunk before it in a longer line."""
    begin = max(0, offset - CHUNK_BYTES // 2)
    before = os.pread(handle, offset - begin, begin)
    return begin + before.rfind(b"\n") + 1


def _tail_start(path: Path, size: int, lines: int) -> int:
    """Return where the last lines of a file begin."""
    if not size:
        return 0
    stop, missing = size, lines
    with path.open("rb") as file:
        handle = file.fileno()
        if os.pread(handle, 1, size - 1) == b"\n":
            stop -= 1
        while stop > 0:
            begin = max(0, stop - CHUNK_BYTES)
            block = os.pread(handle, stop - begin, begin)
            while (found := block.rfind(b"\n")) >= 0:
                missing -= 1
                if not missing:
                    return begin + found + 1
                block = block[:found]
            stop = begin
    return 0
