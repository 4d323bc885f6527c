"""Files that are whole or not there, and a full disk as an error of its own."""

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from core.errors import StorageFull

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# How libraries in Rust (safetensors, tokenizers) end an error of the system: it is no OSError.
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")


def full_disk_reason(error: BaseException) -> str | None:
    """Return why the disk gave no room, when that is what an error says, else None."""
    if isinstance(error, StorageFull):
        return error.message
    if isinstance(error, OSError):
        number = error.errno
    else:
        found = _RUST_NUMBER.search(str(error))
        number = None if found is None else int(found[1])
    return os.strerror(number) if number in _FULL else None


@contextmanager
def full_disk_as_error(folder: Path) -> Iterator[None]:
    """Turn the system's "no space left", however a library says it, into an error that says where.

    Raises:
        StorageFull: writing under `folder` failed for lack of room.
    """
    try:
        yield
    except StorageFull:
        raise
    except Exception as error:
        reason = full_disk_reason(error)
        if reason is None:
            raise
        raise StorageFull(
            f"no room left under {folder} ({reason})", hint="free disk space there"
        ) from error


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name, flushed to disk, only when the block ends well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
