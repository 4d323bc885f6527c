"""Data files in zip and tar archives. Nothing is ever written under a name from an archive."""

import errno
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from core.errors import InvalidInput, KdpoError, TooLarge, UnsupportedMedia
from worker.ingest.decompress import BLOCK, Budget
from worker.ingest.formats import HEAD_BYTES, Format

_MAX_MEMBERS = 10_000
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class _Member:
    """One file of an archive."""

    name: str
    packed_bytes: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Unpacked:
    """One file of an archive as a temporary file of `size` bytes.

    `done` is the part of the archive that is behind us when it is read, in [0, 1].
    """

    name: str
    copy: BinaryIO
    size: int
    done: float


def members(file: BinaryIO, format_: Format, *, folder: Path, budget: Budget) -> Iterator[Unpacked]:
    """Yield the files of an archive in the order of their names, each as a temporary file.

    Raises:
        InvalidInput: `unsafe_archive` for a name that leads out of the archive, a link or a device;
            `encrypted_archive`; `corrupt_zip`, `corrupt_tar`.
        TooLarge: `too_many_members`, `decompression_bomb`, `file_too_large`.
    """
    with _damage_as_error(format_):
        found = _zip_members(file) if format_ is Format.ZIP else _tar_members(file)
    packed = max(1, sum(member.packed_bytes for member in found))
    done = 0
    for member in sorted(found, key=lambda member: member.name):
        done += member.packed_bytes
        with tempfile.TemporaryFile(dir=folder) as copy:
            size = 0
            for block in _blocks(member, format_, budget=budget):
                size += len(block)
                budget.check_size(size)
                copy.write(block)
            copy.seek(0)
            yield Unpacked(member.name, copy, size, done / packed)


@contextmanager
def _damage_as_error(format_: Format) -> Iterator[None]:
    """Turn what the libraries raise into one error: they stumble over damage in many ways.

    Raises:
        InvalidInput: `corrupt_zip`, `corrupt_tar`.
    """
    try:
        yield
    except (KdpoError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise InvalidInput(
            f"the {format_} archive is damaged or of a kind that is not read "
            f"({type(error).__name__})",
            code=f"corrupt_{format_}",
            hint="pack the files again, with the usual compression",
            param="file",
        ) from error


def _blocks(member: _Member, format_: Format, *, budget: Budget) -> Iterator[bytes]:
    """Yield the contents of a member; what comes out of compression is counted."""
    if format_ is Format.ZIP:
        budget.consumed += member.packed_bytes
    with _damage_as_error(format_), member.open() as source:
        while block := source.read(BLOCK):
            if format_ is Format.ZIP:
                budget.expand(len(block))
            yield block


def _zip_members(file: BinaryIO) -> list[_Member]:
    archive = zipfile.ZipFile(file)
    found: list[_Member] = []
    for info in archive.infolist():
        _check_count(len(found))
        mode = info.external_attr >> 16
        if info.is_dir():
            continue
        _check_name(info.filename)
        if info.flag_bits & _ENCRYPTED:
            raise InvalidInput(
                f"the member {info.filename[:100]!r} is encrypted",
                code="encrypted_archive",
                hint="pack the files without a password",
                param="file",
            )
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _unsafe(info.filename, "is a link or a device")
        found.append(
            _Member(info.filename, info.compress_size, lambda info=info: archive.open(info))  # type: ignore[misc]
        )
    return found


def _tar_members(file: BinaryIO) -> list[_Member]:
    archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (closed with the file)
    found: list[_Member] = []
    for info in archive:
        _check_count(len(found))
        if info.isdir():
            continue
        _check_name(info.name)
        if not info.isreg() or info.issparse():
            raise _unsafe(info.name, "is a link, a device or sparse")
        found.append(_Member(info.name, info.size, lambda info=info: _extracted(archive, info)))  # type: ignore[misc]
    return found


def _extracted(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    found = archive.extractfile(info)
    assert found is not None
    return found


def _check_count(count: int) -> None:
    if count >= _MAX_MEMBERS:
        raise TooLarge(
            f"the archive has more than {_MAX_MEMBERS} files",
            code="too_many_members",
            hint="join them to fewer files",
            param="file",
        )


def _check_name(name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
        raise _unsafe(name, "has a name that leads out of the archive")


def _unsafe(name: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"the member {name[:100]!r} {why}",
        code="unsafe_archive",
        hint="pack plain files under plain names",
        param="file",
    )


def no_data(ignored: list[str]) -> UnsupportedMedia:
    """Return the refusal of an archive in which nothing is data."""
    names = ", ".join(repr(name[:60]) for name in ignored[:10]) or "no files"
    return UnsupportedMedia(
        f"no file of the archive is preference data; it has {names}",
        hint="pack JSON Lines, a JSON array, CSV, Parquet or Arrow files",
        param="file",
    )


def looks_like_data(head: bytes, format_: Format) -> bool:
    """Return whether a member is read: tables, compressed files, arrays, CSV with known columns,
    and text whose first line is a whole JSON object. Everything else (README, licence, pictures,
    metadata over several lines) is left aside and named in the report.
    """
    if format_ is not Format.JSONL:
        return True
    first = head.lstrip().partition(b"\n")[0].strip()
    complete = b"\n" in head.lstrip() or len(head) < HEAD_BYTES
    return first.startswith(b"{") and (not complete or first.endswith(b"}"))
