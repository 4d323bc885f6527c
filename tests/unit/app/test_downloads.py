"""Byte ranges of RFC 9110, section 14.1.2."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.downloads import ByteRange, Unsatisfiable, parse_range


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
