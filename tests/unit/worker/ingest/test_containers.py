"""What a file may be, and everything that it may claim to be."""

import bz2
import gzip
import io
import lzma
import zipfile

import pytest

from core.errors import Category
from core.settings import MIB

UNSUPPORTED = {
    "zstd": b"\x28\xb5\x2f\xfd" + b"\x00" * 40,
    "xz": lzma.compress(b'{"prompt": 1}\n'),
    "bzip2": bz2.compress(b'{"prompt": 1}\n'),
    "parquet": b"PAR1" + b"\x15\x04" * 20,
    "arrow": b"ARROW1\x00\x00" + b"\xff" * 20,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\x00" * 20,
    "sqlite": b"SQLite format 3\x00" + b"\x00" * 20,
    "pdf": b"%PDF-1.7\n",
    "7z": b"7z\xbc\xaf\x27\x1c\x00\x04",
    "tar": b"data.jsonl".ljust(257, b"\x00") + b"ustar\x0000".ljust(255, b"\x00"),
    "utf-32 text": b"\xff\xfe\x00\x00" + '{"a": 1}'.encode("utf-32-le"),
    "utf-16 text": '{"prompt": "a"}\n'.encode("utf-16"),
}


def zipped(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", data)
    return buffer.getvalue()


def refused(outcome, code="unsupported_media_type"):
    failure = outcome.result.failure
    assert outcome.result.status == "invalid"
    assert outcome.report["status"] == "invalid"
    assert not outcome.report["complete"]
    assert (failure.code, failure.errors[0].code) == (code, code)
    assert failure.hint
    assert outcome.result.canonical_sha256 is None
    return failure


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
def test_known_formats_are_named(run, name, wrap):
    failure = refused(run(wrap(UNSUPPORTED[name])))
    assert failure.category is Category.UNSUPPORTED_MEDIA
    assert f"received {name}" in failure.message


def test_zip_and_gzip_in_gzip(run, lines, good):
    data = lines(good(12))
    assert "received zip" in refused(run(zipped(data))).message
    twice = gzip.compress(gzip.compress(data))
    assert "received gzip inside gzip" in refused(run(twice)).message


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(run, lines, good, encoding):
    failure = refused(run(lines(good(12)).decode().encode(encoding)))
    assert "utf-16" in failure.message
    assert "iconv" in failure.hint


@pytest.mark.parametrize("layout", ["[\n  %s\n]", "[%s]", "  [ %s ]\n", "\n[\n\n%s]"])
def test_json_array(run, lines, good, layout):
    rows = lines(good(12)).decode().strip().replace("\n", ",\n")
    failure = refused(run((layout % rows).encode()))
    assert "JSON array" in failure.message
    assert "jq -c" in failure.hint


def test_one_line_array_beyond_the_line_limit(run):
    failure = refused(run(b'[{"prompt": "' + b"x" * 5000 + b'"}]', max_line_bytes=1000))
    assert "JSON array" in failure.message


@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
def test_plain_and_gzip_give_the_same(run, lines, good, wrap):
    outcome = run(wrap(lines(good(3000))))
    assert outcome.result.failure is None
    assert outcome.result.num_pairs == 3000
    assert outcome.rows[-1].line == 3000
    container = "jsonl" if wrap is bytes else "jsonl.gz"
    assert outcome.report["detected"]["container"] == container


@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
def test_byte_order_mark_and_windows_line_ends(run, lines, good, wrap):
    data = lines(good(12))
    plain = run(wrap(data))
    assert run(wrap(b"\xef\xbb\xbf" + data)).rows == plain.rows
    assert run(wrap(data.replace(b"\n", b"\r\n"))).rows == plain.rows
    assert run(wrap(data.rstrip(b"\n"))).rows == plain.rows


def test_concatenated_members_and_padding(run, lines, good):
    data = lines(good(40))
    cut = len(data) // 3 + 5
    members = gzip.compress(data[:cut]) + gzip.compress(b"") + gzip.compress(data[cut:])
    assert run(members).rows == run(data).rows
    assert run(members + b"\x00" * 100_000).rows == run(data).rows


@pytest.mark.parametrize("keep", [2, 9, 15, 0.5, -9, -1])
def test_truncated_gzip(run, lines, good, keep):
    whole = gzip.compress(lines(good(2000)))
    end = int(len(whole) * keep) if isinstance(keep, float) else keep
    failure = refused(run(whole[:end]), "truncated_gzip")
    assert failure.category is Category.INVALID


def test_truncated_gzip_counts_what_was_read(run, lines, good):
    whole = gzip.compress(lines(good(2000)))
    outcome = run(whole[: len(whole) // 2])
    assert 100 < outcome.report["counts"]["pairs"] < 2000
    assert outcome.report["preview"]


def test_damaged_gzip(run, lines, good):
    whole = bytearray(gzip.compress(lines(good(2000))))
    whole[len(whole) // 2] ^= 0xFF
    refused(run(bytes(whole)), "corrupt_gzip")
    whole = gzip.compress(lines(good(12)))
    refused(run(whole[:-8] + b"\x00\x00\x00\x00" + whole[-4:]), "corrupt_gzip")
    refused(run(whole + b"trailing garbage"), "corrupt_gzip")


def test_gzip_bomb(run, tmp_path):
    bomb = gzip.compress(b"\x00" * (64 * MIB), compresslevel=9)
    assert len(bomb) < 70_000
    outcome = run(bomb)
    failure = refused(outcome, "decompression_bomb")
    assert failure.category is Category.TOO_LARGE
    assert outcome.report["counts"]["rows"] == 0


def test_gzip_bomb_of_good_rows_and_of_many_members(run, lines, good):
    row = lines(good(1))
    refused(run(gzip.compress(row * 100_000)), "decompression_bomb")
    member = gzip.compress(b" " * 50_000 + b"\n")
    refused(run(member * 100), "decompression_bomb")
    refused(run(gzip.compress(b"") * 2000), "decompression_bomb")


def test_repetitive_rows_below_the_ratio_are_read(run, lines, good):
    data = lines(good(12)) + lines(good(1)) * 5_000
    outcome = run(gzip.compress(data))
    assert outcome.result.failure is None
    assert outcome.report["counts"]["duplicates"] == 5_000


def test_absolute_limit(run, lines, good):
    data = lines(good(2000))
    for upload in (data, gzip.compress(data)):
        failure = refused(run(upload, max_decompressed_bytes=len(data) - 1), "file_too_large")
        assert failure.category is Category.TOO_LARGE
        assert run(upload, max_decompressed_bytes=len(data)).result.num_pairs == 2000


def test_all_lines_too_long(run):
    outcome = run(b"x" * 5000, max_line_bytes=100)
    failure = outcome.result.failure
    assert (failure.code, failure.category) == ("line_too_long", Category.TOO_LARGE)
    assert failure.errors[0].code == "line_too_long"


@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xef\xbb\xbf", gzip.compress(b"")])
def test_empty_file(run, data):
    outcome = run(data)
    failure = outcome.result.failure
    assert (failure.code, failure.category) == ("empty_file", Category.INVALID)
    assert outcome.report["counts"]["rows"] == 0


@pytest.mark.parametrize("data", [b"\x00" * 1000, bytes(range(256)) * 4, b"prompt,chosen\na,b\n"])
def test_not_json_at_all(run, data):
    outcome = run(data)
    assert outcome.result.failure.code == "dataset_invalid"
    assert outcome.report["counts"]["converted"] == 0
    assert outcome.result.failure.errors
