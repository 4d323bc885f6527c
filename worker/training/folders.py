"""Folders that are whole or not there: every file hashed, the manifest last, then one rename."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from core.errors import KdpoError
from worker.ingest.files import file_sha256, full_disk_as_error
from worker.ingest.files import sync_folder as sync_folder


class FolderDamaged(KdpoError):
    """A folder is not what its manifest says."""

    default_code = "checkpoint_corrupt"


@dataclass(frozen=True)
class SealedFolder:
    """A folder whose files were hashed; `sha256` is that of its manifest."""

    path: Path
    sha256: str
    size_bytes: int
    manifest: dict[str, Any]
    manifest_name: str

    @property
    def files(self) -> list[dict[str, Any]]:
        """Path, bytes and sha256 of each file, the manifest excluded."""
        files: list[dict[str, Any]] = self.manifest["files"]
        return files

    @property
    def all_files(self) -> list[dict[str, Any]]:
        """The same with the manifest itself."""
        size = (self.path / self.manifest_name).stat().st_size
        manifest = {"path": self.manifest_name, "bytes": size, "sha256": self.sha256}
        return [*self.files, manifest]


def write_json(path: Path, value: object) -> None:
    """Write canonical, indented JSON; the same value gives the same bytes."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    path.write_bytes(orjson.dumps(value, option=options))


def seal_folder(
    final: Path,
    *,
    token: str,
    manifest_name: str,
    about: dict[str, Any],
    write: Callable[[Path], None],
) -> SealedFolder:
    """Let `write` fill a temporary sibling `.tmp-<token>`, hash and flush it, rename it to `final`.

    The manifest is written last and holds `about` and the files' sizes and hashes. A `final` that
    is already there is replaced: the caller owns it. A crash leaves only the temporary folder.

    Raises:
        StorageFull: the disk has no room.
    """
    temporary = final.parent / f".tmp-{token}"
    with full_disk_as_error(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            files = [_flushed(path, temporary) for path in _files(temporary)]
            manifest = {**about, "files": files}
            write_json(temporary / manifest_name, manifest)
            _flushed(temporary / manifest_name, temporary)
            sync_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return SealedFolder(
        path=final,
        sha256=file_sha256(final / manifest_name),
        size_bytes=sum(path.stat().st_size for path in _files(final)),
        manifest=manifest,
        manifest_name=manifest_name,
    )


def open_sealed(path: Path, *, manifest_name: str, sha256: str | None = None) -> SealedFolder:
    """Read a folder's manifest and check every byte of its files against it.

    Raises:
        FolderDamaged: a file is missing, added or changed, or the manifest is not `sha256`.
    """
    manifest_path = path / manifest_name
    try:
        content = manifest_path.read_bytes()
        manifest = orjson.loads(content)
        expected = {entry["path"]: (entry["bytes"], entry["sha256"]) for entry in manifest["files"]}
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise FolderDamaged(f"{path} has no readable {manifest_name}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise FolderDamaged(f"{manifest_path} has sha256 {digest}, expected {sha256}")
    found = {str(file.relative_to(path)) for file in _files(path)} - {manifest_name}
    if found != set(expected):
        raise FolderDamaged(f"{path} holds {sorted(found)}, expected {sorted(expected)}")
    for name, (size, file_digest) in expected.items():
        file = path / name
        if file.stat().st_size != size or file_sha256(file) != file_digest:
            raise FolderDamaged(f"{file} is not the file that was written")
    return SealedFolder(
        path=path,
        sha256=digest,
        size_bytes=len(content) + sum(size for size, _ in expected.values()),
        manifest=manifest,
        manifest_name=manifest_name,
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flushed(path: Path, root: Path) -> dict[str, Any]:
    path.chmod(0o644)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {
        "path": str(path.relative_to(root)),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }
