"""A file below one of the folders that the administrator has listed."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from core.errors import InvalidInput
from core.sources import PathSource
from worker.ingest.sources.assembly import BLOCK, Checksum, Sink


class LocalFile:
    """A copy of it is what is read: the dataset does not change when the file does."""

    size: int | None = None
    checksum: Checksum | None = None

    def __init__(self, source: PathSource, roots: Sequence[Path]) -> None:
        self._source = source
        self._roots = roots

    def copy(self, sink: Sink, *, offset: int) -> None:
        """Write the whole file, whatever an earlier attempt has copied.

        Raises:
            InvalidInput: `source_not_found`, `source_unreadable`, `source_changed`.
        """
        if offset:
            sink.restart()
        with opened(self._source.path, self._roots) as file:
            before = os.fstat(file.fileno())
            sink.gauge.expect(before.st_size)
            while block := file.read(BLOCK):
                sink.write(block)
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InvalidInput(
                f"the file {self._source.path!r} changed while it was copied",
                code="source_changed",
                param="source.path",
                hint="try again when nothing writes to it",
            )


@contextmanager
def opened(path: str, roots: Sequence[Path]) -> Iterator[BinaryIO]:
    """Open a plain file that lies, after all links, below one of the folders.

    The resolved path is walked from the folder on without following links, so that a link that
    is put in its way meanwhile is refused too.

    Raises:
        InvalidInput: `source_not_found` (also of what lies elsewhere), `source_unreadable`.
    """
    for root in roots:
        real_root = Path(os.path.realpath(root.expanduser()))
        real = Path(os.path.realpath(real_root / path))
        if real != real_root and real.is_relative_to(real_root):
            with _walked(real_root, real.relative_to(real_root).parts, path) as file:
                if file is not None:
                    yield file
                    return
    raise InvalidInput(
        f"there is no file {path!r} below the folders that this server may read",
        code="source_not_found",
        param="source.path",
        hint=f"folders: {', '.join(map(str, roots))} (KDPO_SOURCES__PATHS)",
    )


@contextmanager
def _walked(root: Path, parts: Sequence[str], shown: str) -> Iterator[BinaryIO | None]:
    """Open a file below a folder, link by no link; None where it is not there."""
    try:
        handle = _descend(root, parts)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    except OSError as error:
        raise _unreadable(shown, error.strerror or type(error).__name__) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _unreadable(shown, "it is no plain file")
    with os.fdopen(handle, "rb") as file:
        yield file


def _descend(root: Path, parts: Sequence[str]) -> int:
    # A pipe without a writer must not hang the open.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)


def _unreadable(path: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"the file {path!r} cannot be read: {why}",
        code="source_unreadable",
        param="source.path",
        hint="name a plain file that the user that kdpo runs as may read",
    )
