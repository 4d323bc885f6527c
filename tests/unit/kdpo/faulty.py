"""A checkpoint behind a line with faults: answers break, lie, or belong to a proxy."""

import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import httpx

CHECKPOINT = "ckpt_1"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off after its last byte, as when a connection is lost."""

    def __init__(self, data: bytes, *, breaks: bool) -> None:
        self._data, self._breaks = data, breaks

    def __iter__(self) -> Iterator[bytes]:
        yield self._data
        if self._breaks:
            raise httpx.ReadError("connection reset")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


@dataclass
class FaultyServer:
    """Serves files; `cuts` says after how many bytes the next answers break."""

    files: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)
    flips: int = 0
    ignores_ranges: bool = False
    manifest_sha256: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == f"/v1/checkpoints/{CHECKPOINT}":
            body = {"id": CHECKPOINT, "job_id": "ftjob-1", "manifest_sha256": self.manifest_sha256}
            return httpx.Response(200, json=body)
        if path.endswith("/files"):
            listed = [
                {"path": name, "bytes": len(data), "sha256": sha256(data)}
                for name, data in self.files.items()
            ]
            return httpx.Response(200, json={"data": listed, "has_more": False})
        return self._send(request, path.partition("/files/")[2])

    def _send(self, request: httpx.Request, name: str) -> httpx.Response:
        data, status, headers, start = self.files[name], 200, {}, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        self.asked.append((name, request.headers.get("range")))
        if wanted is not None and not self.ignores_ranges:
            assert request.headers["if-range"] == f'"sha256:{sha256(data)}"'
            start = int(wanted.group(1))
            status = 206
            headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = data[start:]
        if self.flips and sent:
            self.flips -= 1
            sent = bytes([sent[0] ^ 1]) + sent[1:]
        cut = self.cuts.pop(0) if self.cuts else len(sent)
        return httpx.Response(
            status, headers=headers, stream=_Cut(sent[:cut], breaks=cut < len(sent))
        )
