"""What a file is, told from its first bytes and never from its name."""

import csv
import re
from dataclasses import dataclass
from enum import StrEnum

from core.errors import UnsupportedMedia

HEAD_BYTES = 4096
BOM = b"\xef\xbb\xbf"
ACCEPTED = (
    "JSON Lines, a JSON array, CSV or TSV in UTF-8, plain or as gzip, zstd or xz; Parquet; Arrow; "
    "a zip or tar of these"
)
_HINT_JSONL = "upload JSON Lines: one JSON object a line, UTF-8, plain or gzip (.jsonl, .jsonl.gz)"
_ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*(?:[{\]]|$)")
_TAR_AT, _TAR_MAGIC = 257, b"ustar"
_PLAIN_NAME = re.compile(r"[\w.\-]{1,100}")


class Format(StrEnum):
    """What can be read, with one layer of compression around text and tar."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    CSV_SEMICOLON = "csv-semicolon"
    TSV = "tsv"
    PARQUET = "parquet"
    ARROW = "arrow"
    ARROW_STREAM = "arrow-stream"
    GZIP = "gz"
    ZSTD = "zst"
    XZ = "xz"
    ZIP = "zip"
    TAR = "tar"


COMPRESSIONS = frozenset({Format.GZIP, Format.ZSTD, Format.XZ})
ARCHIVES = frozenset({Format.ZIP, Format.TAR})
TABLES = frozenset({Format.PARQUET, Format.ARROW, Format.ARROW_STREAM})
# By these marks, and where a header has several of them, in this order.
DELIMITERS = {Format.TSV: "\t", Format.CSV: ",", Format.CSV_SEMICOLON: ";"}
TEXTS = frozenset({Format.JSONL, Format.JSON, *DELIMITERS})

_READ: tuple[tuple[bytes, Format], ...] = (
    (b"\x1f\x8b", Format.GZIP),
    (b"\x28\xb5\x2f\xfd", Format.ZSTD),
    # A frame to be skipped, with which pzstd begins.
    (b"\x50\x2a\x4d\x18", Format.ZSTD),
    (b"\xfd7zXZ\x00", Format.XZ),
    (b"PAR1", Format.PARQUET),
    (b"ARROW1", Format.ARROW),
    # The mark of a message of Arrow's stream form.
    (b"\xff\xff\xff\xff", Format.ARROW_STREAM),
    (b"PK\x03\x04", Format.ZIP),
    (b"PK\x05\x06", Format.ZIP),
)
_REFUSED: tuple[tuple[bytes, str, str], ...] = (
    (b"BZh", "bzip2", "decompress it first: bzip2 -d file.bz2"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "unpack it and upload the file inside"),
    (b"Rar!\x1a\x07", "rar", "unpack it and upload the file inside"),
    (b"FEA1", "feather version 1", "write it again: pyarrow.feather.write_feather(table, file)"),
    (b"PARE", "encrypted parquet", "write it without encryption"),
    (b"\x89HDF\r\n", "hdf5", _HINT_JSONL),
    (b"SQLite format 3\x00", "sqlite", _HINT_JSONL),
    (b"%PDF", "pdf", _HINT_JSONL),
    (b"\x80\x04\x95", "pickle", _HINT_JSONL),
    (b"\xff\xfe\x00\x00", "utf-32 text", "convert it: iconv -f UTF-32 -t UTF-8 in > out"),
    (b"\x00\x00\xfe\xff", "utf-32 text", "convert it: iconv -f UTF-32 -t UTF-8 in > out"),
    (b"\xff\xfe", "utf-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
    (b"\xfe\xff", "utf-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
)


@dataclass(frozen=True)
class Unreadable:
    """A known format that is not read, and what to do."""

    name: str
    hint: str


def sniff(
    head: bytes, *, columns: frozenset[str] = frozenset(), only_known: bool = False
) -> Format | Unreadable:
    """Return what a file is; text that is nothing else is taken for JSON Lines.

    `columns` are names that make a first line the header of a CSV file; with `only_known` no other
    names do.
    """
    for magic, format_ in _READ:
        if head.startswith(magic):
            return format_
    if head[_TAR_AT : _TAR_AT + len(_TAR_MAGIC)] == _TAR_MAGIC:
        return Format.TAR
    for magic, name, hint in _REFUSED:
        if head.startswith(magic):
            return Unreadable(name, hint)
    # Of ASCII text in UTF-16 every other byte is zero.
    if len(head) >= 4 and any(head[:512:2]) != any(head[1:512:2]):
        return Unreadable("utf-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out")
    text = head.removeprefix(BOM)
    if _ARRAY_OF_OBJECTS.match(text):
        return Format.JSON
    return _delimited(text, columns, only_known=only_known) or Format.JSONL


def _delimited(text: bytes, columns: frozenset[str], *, only_known: bool) -> Format | None:
    """Return CSV or TSV when the first line is a header: names, all different, more than one.

    One of them must be known, or all be plain words and the second line be no JSON object.
    """
    first, _, rest = text.lstrip(b"\r\n").partition(b"\n")
    if first.lstrip()[:1] in (b"{", b"[", b""):
        return None
    format_ = next((f for f, mark in DELIMITERS.items() if mark.encode() in first), None)
    if format_ is None:
        return None
    try:
        names = next(csv.reader([first.decode("utf-8").strip("\r")], delimiter=DELIMITERS[format_]))
    except (UnicodeDecodeError, csv.Error):
        return None
    if len(names) < 2 or len(set(names)) != len(names) or not all(map(str.strip, names)):
        return None
    if set(names) & columns:
        return format_
    plain = not only_known and all(_PLAIN_NAME.fullmatch(name) for name in names)
    return format_ if plain and not rest.lstrip().startswith(b"{") else None


def unsupported(name: str, hint: str) -> UnsupportedMedia:
    """Return the refusal of a format."""
    return UnsupportedMedia(f"received {name}; expected {ACCEPTED}", hint=hint, param="file")
