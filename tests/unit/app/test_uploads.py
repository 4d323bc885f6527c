"""A form becomes a file however it is cut; what killed uploads leave behind is removed."""

import asyncio
import hashlib
import os
import random
import time
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.types import Message

from app.uploads import STALE_S, WRITE_BYTES, Upload, receive_upload, remove_stale_parts

BOUNDARY = "a-boundary"


def received(target: Path, content: bytes, *, piece: int) -> Upload:
    """Upload a form whose body comes in pieces of so many bytes."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    begins = iter(range(0, len(body), piece))

    async def receive() -> Message:
        begin = next(begins)
        part = body[begin : begin + piece]
        return {"type": "http.request", "body": part, "more_body": begin + piece < len(body)}

    kind = f"multipart/form-data; boundary={BOUNDARY}".encode()
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"",
             "headers": [(b"content-type", kind)]}  # fmt: skip
    request = Request(scope, receive)
    return asyncio.run(
        receive_upload(request, target, max_bytes=2**30, fields=frozenset({"purpose"}))
    )


@pytest.mark.parametrize(
    ("size", "piece"),
    [(5_000, 1), (5_000, 7), (3 * WRITE_BYTES + 5, 200_000), (WRITE_BYTES, 2 * WRITE_BYTES)],
)
def test_file_is_the_same_however_its_body_is_cut(tmp_path: Path, size: int, piece: int) -> None:
    # With what looks like the beginning of a boundary in all places.
    content = random.Random(0).randbytes(size // 2).replace(b"\x00", b"\r\n--a-bound")
    upload = received(tmp_path / "file", content, piece=piece)
    assert (tmp_path / "file").read_bytes() == content
    assert upload.size_bytes == len(content)
    assert upload.sha256 == hashlib.sha256(content).hexdigest()


def test_only_old_parts_are_removed(tmp_path: Path) -> None:
    old, young, whole = (tmp_path / n for n in (".ds_a.part", ".ds_b.part", "ds_c"))
    for path in (old, young, whole):
        path.write_bytes(b"x")
    long_ago = time.time() - STALE_S - 60
    for path in (old, whole):
        os.utime(path, (long_ago, long_ago))
    assert remove_stale_parts(tmp_path) == [old]
    assert sorted(tmp_path.iterdir()) == [young, whole]


def test_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert remove_stale_parts(tmp_path / "uploads") == []
