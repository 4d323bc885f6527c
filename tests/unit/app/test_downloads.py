"""Byte ranges of RFC 9110, section 14.1.2; files are closed whatever becomes of the client."""

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Scope

from app.archives import tar_of
from app.downloads import (
    ByteRange,
    StoredFile,
    Unsatisfiable,
    content_response,
    file_response,
    parse_range,
)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        # The examples of the RFC, for a representation of 10,000 bytes.
        ("bytes=0-499", ByteRange(0, 500)),
        ("bytes=500-999", ByteRange(500, 1000)),
        ("bytes=-500", ByteRange(9500, 10_000)),
        ("bytes=9500-", ByteRange(9500, 10_000)),
        ("bytes=0-", ByteRange(0, 10_000)),
        ("bytes=0-20000", ByteRange(0, 10_000)),
        ("bytes=-20000", ByteRange(0, 10_000)),
        ("Bytes= 1-1 ", ByteRange(1, 2)),
        (None, None),
        ("", None),
        ("bytes=0-0,-1", None),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=+1-2", None),
        ("bytes=١-٢", None),
        ("lines=1-2", None),
        ("bytes=1-" + "9" * 30, None),
    ],
)
def test_forms(header: str | None, expected: ByteRange | None) -> None:
    assert parse_range(header, 10_000) == expected


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-0", 0), ("bytes=-1", 0)]
)
def test_no_byte(header: str, size: int) -> None:
    with pytest.raises(Unsatisfiable, match=str(size)):
        parse_range(header, size)


@given(st.text(max_size=30), st.integers(0, 1000))
def test_any_header_gives_bytes_of_the_file_or_nothing(header: str, size: int) -> None:
    try:
        found = parse_range(header, size)
    except Unsatisfiable:
        return
    assert found is None or 0 <= found.start < found.stop <= size


def open_files(folder: Path) -> list[str]:
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("this system does not show which files are open")
    targets = (os.readlink(link) for link in handles.iterdir() if link.is_symlink())
    return [target for target in targets if target.startswith(str(folder))]


@pytest.mark.parametrize("form", ["file", "tar"])
def test_a_client_that_has_left_leaves_no_file_open(tmp_path: Path, form: str) -> None:
    data = b"x" * 1000
    (tmp_path / "a").write_bytes(data)
    file = StoredFile(tmp_path, "a", len(data), hashlib.sha256(data).hexdigest())
    scope: Scope = {
        "type": "http", "method": "GET", "path": "/a", "query_string": b"", "headers": [],
        "app": FastAPI(), "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        # Nobody reads; the server's buffer is full of what was asked for before.
        await asyncio.sleep(0.01)

    async def ask() -> None:
        if form == "file":
            response = await file_response(Request(scope), file)
        else:
            content = tar_of([file], name="c", created_at=0)
            response = await content_response(Request(scope), content)
        assert open_files(tmp_path)
        await response(scope, gone, send)

    asyncio.run(ask())
    assert open_files(tmp_path) == []
