"""Downloads a checkpoint: files beside each other, resumed where they broke, every hash checked."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

from kdpo.errors import ApiError, ConnectionFailed, DownloadFailed
from kdpo.flows import Close, Flow, Request, Sleep, read_stream, run, together
from kdpo.sending import Policy, json_body, opened, sent
from kdpo.types import Checkpoint, CheckpointFile

MANIFEST = "manifest.json"
WRITE_BYTES = 1024 * 1024
_PART = re.compile(r"bytes (\d+)-")


@dataclass(frozen=True)
class DownloadProgress:
    """How much of a checkpoint is here; files that were here before count from the start."""

    done_bytes: int
    total_bytes: int
    path: str


@dataclass
class _Meter:
    """Adds up what the files say, which may come from several threads."""

    total_bytes: int
    tell: Callable[[DownloadProgress], None] | None
    _done: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def at(self, path: str, position: int) -> None:
        """Note how much of a file is here."""
        with self._lock:
            self._done[path] = position
            if self.tell is not None:
                self.tell(DownloadProgress(sum(self._done.values()), self.total_bytes, path))


def downloaded(
    checkpoint: Checkpoint,
    folder: Path,
    policy: Policy,
    *,
    parallel: int,
    tell: Callable[[DownloadProgress], None] | None,
) -> Flow[Path]:
    """Bring all files of a checkpoint to a folder and return the folder.

    Files that are there with the right hash are kept, and begun ones go on where they are.

    Raises:
        DownloadFailed: a name leads out of the folder, or a file is not what its manifest says.
    """
    reply = yield from sent(Request("GET", f"/v1/checkpoints/{checkpoint.id}/files"), policy)
    files = [CheckpointFile.model_validate(item) for item in json_body(reply.content)["data"]]
    targets = [inside(folder, file.path) for file in files]
    meter = _Meter(sum(file.bytes for file in files), tell)
    yield from together(
        [
            _one(checkpoint.id, file, target, policy, meter)
            for file, target in zip(files, targets, strict=True)
        ],
        limit=parallel,
    )
    yield from run(lambda: check_manifest(checkpoint, files, folder))
    return folder


def inside(folder: Path, path: str) -> Path:
    """Return where a file goes.

    Raises:
        DownloadFailed: its name leads out of the folder.
    """
    parts = PurePosixPath(path).parts
    strange = not parts or path.startswith("/") or "\\" in path or "\0" in path
    if strange or any(part in ("..", ".") or ":" in part for part in parts):
        raise DownloadFailed(f"the server names a file {path!r}, which leads out of the folder")
    return folder.joinpath(*parts)


def check_manifest(checkpoint: Checkpoint, files: list[CheckpointFile], folder: Path) -> None:
    """Compare the manifest in the folder with the checkpoint and with the list of files.

    Raises:
        DownloadFailed: they differ.
    """
    if checkpoint.manifest_sha256 is None or MANIFEST not in {file.path for file in files}:
        return
    content = (folder / MANIFEST).read_bytes()
    if hashlib.sha256(content).hexdigest() != checkpoint.manifest_sha256:
        raise DownloadFailed(
            f"{MANIFEST} is not the one that checkpoint {checkpoint.id} was published with",
            hint="the server's list of files and its checkpoint differ: export or train again",
        )
    listed = {item["path"]: item["sha256"] for item in json.loads(content)["files"]}
    wrong = [f.path for f in files if f.path != MANIFEST and listed.get(f.path) != f.sha256]
    missing = sorted(set(listed) - {file.path for file in files})
    if wrong or missing:
        raise DownloadFailed(
            f"{MANIFEST} and the server's list of files differ: {', '.join([*wrong, *missing])}"
        )


def _one(
    checkpoint_id: str, file: CheckpointFile, target: Path, policy: Policy, meter: _Meter
) -> Flow[None]:
    """Bring one file, with a second try from the start when its hash is wrong."""
    if (yield from run(lambda: _is_here(target, file))):
        meter.at(file.path, file.bytes)
        return
    part = target.with_name(f".{target.name}.{file.sha256[:12]}.part")
    for last in (False, True):
        yield from _fill(checkpoint_id, file, part, policy, meter)
        if (yield from run(lambda: _publish(part, target, file))):
            return
        if last:
            raise DownloadFailed(
                f"{file.path} has another SHA-256 than its manifest says, twice",
                hint="something between the server and here changes files; nothing was kept of it",
            )
        meter.at(file.path, 0)


def _fill(
    checkpoint_id: str, file: CheckpointFile, part: Path, policy: Policy, meter: _Meter
) -> Flow[None]:
    """Read until all bytes are there; a try that brings some counts as no failure."""
    position = yield from run(lambda: _begin(part, file.bytes))
    meter.at(file.path, position)
    failures = 0
    while position < file.bytes:
        reached = yield from _read_some(checkpoint_id, file, part, position, meter)
        if reached.broken is not None:
            failures = 1 if reached.position > position else failures + 1
            if failures > policy.max_retries:
                raise reached.broken
            yield Sleep(policy.pause_s(failures))
        elif reached.position < file.bytes:
            raise DownloadFailed(
                f"{file.path} ends after {reached.position} bytes, its manifest says {file.bytes}"
            )
        position = reached.position


@dataclass(frozen=True)
class _Reached:
    position: int
    broken: ConnectionFailed | ApiError | None = None


def _read_some(
    checkpoint_id: str, file: CheckpointFile, part: Path, position: int, meter: _Meter
) -> Flow[_Reached]:
    """Read from a position on, until the end or until the connection breaks."""
    headers = {"Accept-Encoding": "identity"}
    if position:
        # If the file were another one, the answer would be the whole of it.
        headers |= {"Range": f"bytes={position}-", "If-Range": f'"sha256:{file.sha256}"'}
    path = f"/v1/checkpoints/{checkpoint_id}/files/{quote(file.path)}"
    try:
        stream = yield from opened(Request("GET", path, headers=headers))
    except ConnectionFailed as broken:
        return _Reached(position, broken)
    except ApiError as refused:
        if refused.status not in (429, 502, 503, 504):
            raise
        return _Reached(position, refused)
    position = _starts_at(stream.status, stream.headers.get("content-range"), position)
    out = yield from run(lambda: _open(part, position))
    pending = bytearray()
    lost: ConnectionFailed | None = None
    try:
        while lost is None:
            try:
                chunk = yield from read_stream(stream)
            except ConnectionFailed as broken:
                lost, chunk = broken, b""
            pending += chunk
            if len(pending) < WRITE_BYTES and chunk:
                continue
            # What came before the connection broke is kept as well.
            position = yield from run(partial(_write, out, pending))
            if position > file.bytes:
                raise DownloadFailed(f"{file.path} is longer than its manifest says")
            meter.at(file.path, position)
            if not chunk:
                break
    finally:
        out.close()
    yield Close(stream)
    return _Reached(position, lost)


def _starts_at(status: int, content_range: str | None, asked: int) -> int:
    """Return where the answer begins: 206 says it, anything else is the whole file."""
    if status != 206:
        return 0
    match = _PART.match(content_range or "")
    if match is None or int(match.group(1)) != asked:
        raise DownloadFailed(
            f"asked for bytes from {asked} on and received {content_range!r}",
            hint="a proxy answers ranges wrongly; download without it",
        )
    return asked


def _is_here(target: Path, file: CheckpointFile) -> bool:
    return target.is_file() and target.stat().st_size == file.bytes and _hash(target) == file.sha256


def _begin(part: Path, size: int) -> int:
    """Return how much of a file an earlier download has left."""
    part.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists():
        part.touch()
    left = part.stat().st_size
    if left > size:
        part.write_bytes(b"")
        return 0
    return left


def _open(part: Path, position: int) -> BinaryIO:
    out = part.open("r+b")
    out.seek(position)
    out.truncate()
    return out


def _write(out: BinaryIO, pending: bytearray) -> int:
    """Write and forget what is pending, and return where that ends."""
    out.write(pending)
    pending.clear()
    return out.tell()


def _publish(part: Path, target: Path, file: CheckpointFile) -> bool:
    """Move a whole file to its name; a wrong one is removed."""
    if _hash(part) != file.sha256:
        part.unlink()
        return False
    os.replace(part, target)
    return True


def _hash(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
