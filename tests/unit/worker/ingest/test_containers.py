"""What a file may be, and everything that it may claim to be."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pytest
import zstandard

from core.errors import Category
from core.settings import MIB
from worker.ingest.texts import split_array

UNSUPPORTED = {
    "bzip2": bz2.compress(b'{"prompt": 1}\n'),
    "feather version 1": b"FEA1" + b"\x00" * 40,
    "encrypted parquet": b"PARE" + b"\x00" * 40,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\x00" * 20,
    "sqlite": b"SQLite format 3\x00" + b"\x00" * 20,
    "pdf": b"%PDF-1.7\n",
    "pickle": b"\x80\x04\x95" + b"\x00" * 20,
    "7z": b"7z\xbc\xaf\x27\x1c\x00\x04",
    "rar": b"Rar!\x1a\x07\x01\x00",
    "utf-32 text": b"\xff\xfe\x00\x00" + '{"a": 1}'.encode("utf-32-le"),
    "utf-16 text": '{"prompt": "a"}\n'.encode("utf-16"),
}
COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress}
NAMES = {"gz": "gzip", "zst": "zstd", "xz": "xz"}


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


@pytest.mark.parametrize("outer", COMPRESS)
def test_only_one_layer_is_read(run, lines, good, outer):
    data = lines(good(12))
    for inner, name in ((zipped, "zip"), *((COMPRESS[k], NAMES[k]) for k in COMPRESS)):
        failure = refused(run(COMPRESS[outer](inner(data))))
        assert f"received {name} inside {NAMES[outer]}" in failure.message


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(run, lines, good, encoding):
    failure = refused(run(lines(good(12)).decode().encode(encoding)))
    assert "utf-16" in failure.message
    assert "iconv" in failure.hint


ARRAYS = ["[\n  %s\n]", "[%s]", "  [ %s ]\n", "\n[\n\n%s]", "[%s,]", "\ufeff[%s]"]


@pytest.mark.parametrize("layout", ARRAYS)
@pytest.mark.parametrize("wrap", [bytes, *COMPRESS.values()])
def test_json_array(run, lines, good, layout, wrap):
    plain = run(lines(good(12)))
    rows = lines(good(12)).decode().strip().replace("\n", ",\n")
    outcome = run(wrap((layout % rows).encode()))
    assert outcome.rows == plain.rows
    assert outcome.report["detected"]["container"].startswith("json")
    assert not outcome.report["detected"]["container"].startswith("jsonl")


def test_array_elements_keep_their_brackets_and_quotes(run):
    rows = [
        {"prompt": f'{n} ]}}", \\"[{{', "chosen": 'a\\\\" ], [', "rejected": "]," * n + "\\"}
        for n in range(12)
    ]
    outcome = run(json.dumps(rows, indent=3).encode())
    assert [row.chosen[0].content for row in outcome.rows] == ['a\\\\" ], ['] * 12
    assert [row.line for row in outcome.rows] == list(range(1, 13))
    assert outcome.rows[3].rejected[0].content == "],],],\\"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_array_cut_into_blocks_anywhere(size):
    rows = [{"a": 'q"\\', "b": ["[", {"c": "]"}]}, {"a": '\\"'}, {}, {"a": "ü"}]
    data = json.dumps(rows, ensure_ascii=False).encode()
    blocks = (data[n : n + size] for n in range(0, len(data), size))
    assert [json.loads(line.data) for line in split_array(blocks, max_bytes=100)] == rows


def test_broken_arrays(run, lines, good):
    rows = lines(good(12)).decode().strip().replace("\n", ",\n")
    refused(run(f"[{rows}".encode()), "truncated_json")
    refused(run(f"[{rows}] more".encode()), "corrupt_json")
    refused(run(f"[{rows}]\n[{rows}]".encode()), "corrupt_json")
    bad = run(f'[{rows}, {{"prompt": }}, 3, [1]]'.encode(), max_errors=10)
    assert bad.codes == {"not_json": 1, "not_an_object": 2}
    assert bad.result.num_pairs == 12


def test_array_element_beyond_the_line_limit(run, lines, good):
    rows = lines(good(12)).decode().strip().replace("\n", ",")
    long = '{"prompt": "' + "x" * 5000 + '"}'
    outcome = run(f"[{rows},{long},{rows}]".encode(), max_line_bytes=1000)
    assert outcome.codes == {"line_too_long": 1}
    assert outcome.rejected[0]["line"] == 13


def test_one_object_over_several_lines(run):
    failure = refused(run(b'{\n  "train": [\n    {"prompt": "x"}\n  ]\n}\n'))
    assert "one JSON object over several lines" in failure.message


@pytest.mark.parametrize("name", ["", *COMPRESS])
def test_plain_and_compressed_give_the_same(run, lines, good, name):
    outcome = run(COMPRESS.get(name, bytes)(lines(good(3000))))
    assert outcome.result.failure is None
    assert outcome.result.num_pairs == 3000
    assert outcome.rows[-1].line == 3000
    container = f"jsonl.{name}" if name else "jsonl"
    assert outcome.report["detected"]["container"] == container


@pytest.mark.parametrize("wrap", [bytes, *COMPRESS.values()])
def test_byte_order_mark_and_windows_line_ends(run, lines, good, wrap):
    data = lines(good(12))
    plain = run(wrap(data))
    assert run(wrap(b"\xef\xbb\xbf" + data)).rows == plain.rows
    assert run(wrap(data.replace(b"\n", b"\r\n"))).rows == plain.rows
    assert run(wrap(data.rstrip(b"\n"))).rows == plain.rows


@pytest.mark.parametrize("compress", COMPRESS.values())
def test_concatenated_members_and_padding(run, lines, good, compress):
    data = lines(good(40))
    cut = len(data) // 3 + 5
    members = compress(data[:cut]) + compress(b"") + compress(data[cut:])
    assert run(members).rows == run(data).rows
    assert run(members + b"\x00" * 100_000).rows == run(data).rows


def test_frames_to_be_skipped(run, lines, good):
    data = lines(good(40))
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    frames = skipped + zstandard.compress(data[:999]) + skipped + zstandard.compress(data[999:])
    assert run(frames + skipped).rows == run(data).rows


@pytest.mark.parametrize("keep", [9, 15, 0.5, -9, -1])
@pytest.mark.parametrize("name", COMPRESS)
def test_truncated_streams(run, lines, good, name, keep):
    whole = COMPRESS[name](lines(good(2000)))
    end = int(len(whole) * keep) if isinstance(keep, float) else keep
    failure = refused(run(whole[:end]), f"truncated_{NAMES[name]}")
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


@pytest.mark.parametrize("name", ["zst", "xz"])
def test_damaged_zstd_and_xz(run, lines, good, name):
    whole = COMPRESS[name](lines(good(2000)))
    for damaged in (
        whole + b"trailing garbage",
        whole[: len(whole) // 2] + bytes(200) + whole[len(whole) // 2 + 200 :],
    ):
        refused(run(damaged), f"corrupt_{NAMES[name]}")


@pytest.mark.parametrize("compress", COMPRESS.values())
def test_bomb(run, tmp_path, compress):
    bomb = compress(b"\x00" * (64 * MIB))
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


@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
def test_empty_file(run, data):
    outcome = run(data)
    failure = outcome.result.failure
    assert (failure.code, failure.category) == ("empty_file", Category.INVALID)
    assert outcome.report["counts"]["rows"] == 0


@pytest.mark.parametrize("data", [b"\x00" * 1000, bytes(range(256)) * 4, b"some words\nand more\n"])
def test_not_json_at_all(run, data):
    outcome = run(data)
    assert outcome.result.failure.code == "dataset_invalid"
    assert outcome.report["counts"]["converted"] == 0
    assert outcome.result.failure.errors
