"""A folder of entries that are costly to make: one lock each, a cap on bytes, the unused go first.

Torch-free, as workers tidy it. Names in the folder: `<key>` an entry, `<key>.lock` its lock,
`.tmp-<key>` an entry that is being written or removed by whoever holds the lock.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from worker.ingest.files import full_disk_as_error

_log = logging.getLogger("kdpo.entries")

POLL_S = 0.1
_LOCK, _TEMPORARY = ".lock", ".tmp-"


@dataclass(frozen=True)
class EntryFolder:
    """Entries are sub-folders; a locked one is never removed by others."""

    path: Path

    def entry(self, key: str) -> Path:
        """Where the entry of `key` is, or would be."""
        return self.path / key

    @contextmanager
    def locked(self, key: str, *, waiting: Callable[[], None]) -> Iterator[Path]:
        """Hold the lock of `key`, which dies with its process; give the entry's path.

        `waiting` is called every 0.1 s while another process or thread holds it, and may raise.

        Raises:
            StorageFull: the disk has no room for the lock.
        """
        with full_disk_as_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        handle = self._try_lock(key)
        if handle is None:
            _log.info("%s is in the hands of another process: waiting for it", self.entry(key))
        while handle is None:
            waiting()
            time.sleep(POLL_S)
            handle = self._try_lock(key)
        try:
            yield self.entry(key)
        finally:
            os.close(handle)

    def touch(self, key: str) -> None:
        """Note that an entry is used now; the caller holds its lock."""
        os.utime(self.entry(key))

    def remove(self, key: str) -> None:
        """Remove an entry whose lock the caller holds; processes that have mapped it keep it."""
        entry, temporary = self.entry(key), self.path / f"{_TEMPORARY}{key}"
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(FileNotFoundError):
            entry.rename(temporary)
            shutil.rmtree(temporary)

    def evict(self, *, max_bytes: int) -> None:
        """Remove entries that nobody has locked, oldest use first, until all fit the cap."""
        found = []
        for entry in self._names(lambda name: not name.startswith(".")):
            with suppress(FileNotFoundError):  # somebody else evicts, too
                if entry.is_dir():
                    found.append((entry.stat().st_mtime_ns, entry.name, _size(entry)))
        excess = sum(size for _, _, size in found) - max_bytes
        for _, key, size in sorted(found):
            if excess <= 0:
                return
            if self._if_free(key, partial(self.remove, key)):
                _log.info("%s was evicted: %d bytes", self.entry(key), size)
                excess -= size

    def remove_leftovers(self) -> None:
        """Remove what dead processes have left: half-written entries, and locks of no entry."""
        for path in self._names(lambda name: name.startswith(_TEMPORARY)):
            key = path.name.removeprefix(_TEMPORARY)
            self._if_free(key, partial(shutil.rmtree, path))
        for path in self._names(lambda name: name.endswith(_LOCK)):
            key = path.name.removesuffix(_LOCK)
            if not self.entry(key).exists():
                self._if_free(key, lambda: None)

    def _names(self, wanted: Callable[[str], bool]) -> list[Path]:
        try:
            return sorted(path for path in self.path.iterdir() if wanted(path.name))
        except FileNotFoundError:
            return []

    def _if_free(self, key: str, action: Callable[[], None]) -> bool:
        """Do something with the lock of `key` held, unless another holds it; say if it was done."""
        handle = self._try_lock(key)
        if handle is None:
            return False
        try:
            with suppress(FileNotFoundError):
                action()
            if not self.entry(key).exists():
                self._lock_path(key).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s cannot be removed: %s", self.entry(key), error.strerror)
            return False
        finally:
            os.close(handle)
        return True

    def _lock_path(self, key: str) -> Path:
        return self.path / f"{key}{_LOCK}"

    def _try_lock(self, key: str) -> int | None:
        path = self._lock_path(key)
        with full_disk_as_error(self.path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever removes an entry unlinks its lock; a lock without that name excludes nobody.
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
