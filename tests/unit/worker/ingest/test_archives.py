"""Zip and tar: which members are data, in which order, and which archives are refused."""

import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile

import pytest
import zstandard

from core.errors import Category
from tests.unit.worker.ingest.test_tables import as_csv, as_parquet
from worker.ingest import archives


def as_zip(files, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def as_tar(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


PACK = {
    "zip": as_zip,
    "tar": as_tar,
    "tar.gz": lambda files: gzip.compress(as_tar(files)),
    "tar.zst": lambda files: zstandard.compress(as_tar(files)),
    "tar.xz": lambda files: lzma.compress(as_tar(files)),
}


@pytest.mark.parametrize("form", PACK)
def test_data_members_are_read_in_name_order(run, lines, good, form):
    rows = good(40)
    files = {
        "data/c.parquet": as_parquet(rows[30:]),
        "README.md": b"# Facts\n\nHelpful, harmless and honest, since 2020.\n",
        "LICENSE": b"Copyright (c) 2020, Somebody\n",
        "data/a.jsonl.gz": gzip.compress(lines(rows[:10])),
        "dataset_info.json": b'{\n  "description": "facts"\n}\n',
        "picture.png": b"\x89PNG\r\n\x1a\n\x00\x00",
        "data/b1.csv": as_csv(rows[10:20]),
        "data/b2.json": b"[" + lines(rows[20:30]).strip().replace(b"\n", b",") + b"]",
        "__MACOSX/._a.jsonl": b"\x00\x05\x16\x07\x00\x02\x00\x00",
        "empty.txt": b"",
    }
    outcome = run(PACK[form](files))
    assert outcome.result.failure is None
    assert [r.prompt[0].content for r in outcome.rows] == [row["prompt"] for row in rows]
    detected = outcome.report["detected"]
    assert detected["container"] == form
    # The header is the first line of the table.
    assert detected["members"] == [
        {"name": "data/a.jsonl.gz", "container": "jsonl.gz", "first_line": 1},
        {"name": "data/b1.csv", "container": "csv", "first_line": 11},
        {"name": "data/b2.json", "container": "json", "first_line": 22},
        {"name": "data/c.parquet", "container": "parquet", "first_line": 32},
    ]
    assert detected["ignored_members"] == sorted(
        set(files) - {m["name"] for m in detected["members"]}
    )
    assert [row.line for row in outcome.rows][9:12] == [10, 12, 13]
    assert outcome.progress[-1][0] == outcome.progress[-1][1]
    assert outcome.progress == sorted(outcome.progress)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_of_zip(run, lines, good, compression):
    assert run(as_zip({"a.jsonl": lines(good(12))}, compression)).result.num_pairs == 12


def refused(outcome, code):
    failure = outcome.result.failure
    assert (failure.code, outcome.result.status) == (code, "invalid")
    assert failure.hint
    return failure


@pytest.mark.parametrize("form", PACK)
@pytest.mark.parametrize(
    "name", ["../a.jsonl", "/etc/a.jsonl", "x/../../a.jsonl", "..\\a", "C:\\a"]
)
def test_names_that_lead_out(run, lines, good, form, name):
    failure = refused(run(PACK[form]({name: lines(good(12))})), "unsafe_archive")
    assert "leads out of the archive" in failure.message


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_of_tar(run, lines, good, kind):
    buffer = io.BytesIO(as_tar({"a.jsonl": lines(good(12))}))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        info = tarfile.TarInfo("b.jsonl")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    refused(run(buffer.getvalue()), "unsafe_archive")


def test_links_of_zip(run, lines, good):
    buffer = io.BytesIO(as_zip({"a.jsonl": lines(good(12))}))
    with zipfile.ZipFile(buffer, "a") as archive:
        info = zipfile.ZipInfo("b.jsonl")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    refused(run(buffer.getvalue()), "unsafe_archive")


def test_encrypted_zip(run, lines, good):
    data = bytearray(as_zip({"a.jsonl": lines(good(12))}))
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(magic) + at
        struct.pack_into("<H", data, place, 1)
    refused(run(bytes(data)), "encrypted_archive")


@pytest.mark.parametrize("form", PACK)
def test_archives_without_data_and_in_archives(run, lines, good, form):
    failure = refused(run(PACK[form]({"README": b"hello\n"})), "unsupported_media_type")
    assert "it has 'README'" in failure.message
    inner = {"a.jsonl": lines(good(12))}
    for name, nested in PACK.items():
        failure = run(PACK[form]({f"x.{name}": nested(inner)})).result.failure
        assert failure.category is Category.UNSUPPORTED_MEDIA


def test_damaged_archives(run, lines, good):
    files = {"a.jsonl": lines(good(2000))}
    whole = as_zip(files)
    refused(run(whole[: len(whole) // 2]), "corrupt_zip")
    refused(run(whole[:200] + bytes(50) + whole[250:]), "corrupt_zip")
    whole = as_tar(files)
    refused(run(whole[: len(whole) // 2]), "corrupt_tar")
    refused(run(b"PK\x03\x04" + b"x" * 100), "corrupt_zip")


def test_archive_bombs(run, lines, good, monkeypatch):
    row = lines(good(1))
    bomb = as_zip({"a.jsonl": row * 100_000})
    assert refused(run(bomb), "decompression_bomb").category is Category.TOO_LARGE
    refused(run(PACK["tar.gz"]({"a.jsonl": row * 100_000})), "decompression_bomb")
    many = {f"{n}.jsonl": lines(good(1)) for n in range(20)}
    large = {"a.jsonl": lines(good(2000))}
    for form in PACK.values():
        refused(run(form(large), max_decompressed_bytes=10_000), "file_too_large")
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 19)
    for form in PACK.values():
        refused(run(form(many)), "too_many_members")


@pytest.mark.parametrize("form", PACK)
def test_progress_moves_inside_a_member(run, lines, good, form):
    rows = [{**row, "chosen": os.urandom(3000).hex()} for row in good(1200)]
    data = PACK[form]({"a.jsonl": lines(rows), "b.parquet": as_parquet(good(11_000))})
    outcome = run(data)
    assert (outcome.result.num_pairs, outcome.result.num_prompts) == (12_200, 11_000)
    parts = [done / total for done, total in outcome.progress]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    assert len({round(part, 1) for part in parts}) >= 3


def test_rejected_rows_of_archives_have_numbers_over_all_files(run, lines, good):
    files = {"a.jsonl": lines(good(60)), "b.jsonl": b"\n" + lines(good(70)[60:]) + b"junk\n"}
    outcome = run(as_zip(files))
    assert outcome.rejected[0]["line"] == 60 + 12
    assert outcome.report["detected"]["members"][1]["first_line"] == 61
