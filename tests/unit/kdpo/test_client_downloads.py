"""Downloads over a line with faults, by both clients; the server side is a script."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kdpo import AsyncClient, Client, DownloadFailed, DownloadProgress, InvalidArgument
from kdpo.downloads import inside
from kdpo.errors import ConnectionFailed
from kdpo.sending import Policy
from tests.unit.kdpo.faulty import CHECKPOINT, FaultyServer, sha256

FILES = {"model.safetensors": bytes(range(256)) * 40, "sub dir/ü.txt": b"text", "empty": b""}
Download = Callable[..., Path]


def _sync(server: FaultyServer, folder: Path, **options: Any) -> Path:
    with Client("http://test", transport=httpx.MockTransport(server)) as client:
        return client.download(CHECKPOINT, folder, **options)


def _async(server: FaultyServer, folder: Path, **options: Any) -> Path:
    async def run() -> Path:
        async with AsyncClient("http://test", transport=httpx.MockTransport(server)) as client:
            return await client.download(CHECKPOINT, folder, **options)

    return asyncio.run(run())


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def download(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Download:
    monkeypatch.setattr(Policy, "pause_s", lambda *_: 0.0)
    made: Download = request.param
    return made


def check_here(folder: Path, files: dict[str, bytes] = FILES) -> None:
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == files


def test_all_files_arrive(download: Download, tmp_path: Path) -> None:
    said: list[DownloadProgress] = []
    assert download(FaultyServer(FILES), tmp_path / "a", on_progress=said.append) == tmp_path / "a"
    check_here(tmp_path / "a")
    total = sum(map(len, FILES.values()))
    assert {progress.total_bytes for progress in said} == {total}
    assert max(progress.done_bytes for progress in said) == total


def test_a_file_goes_on_where_it_broke(download: Download, tmp_path: Path) -> None:
    files = {"model.safetensors": FILES["model.safetensors"]}
    server = FaultyServer(files, cuts=[1000, 0, 2000])
    download(server, tmp_path)
    check_here(tmp_path, files)
    assert [wanted for _, wanted in server.asked] == [
        None, "bytes=1000-", "bytes=1000-", "bytes=3000-",
    ]  # fmt: skip


def test_a_later_download_goes_on(download: Download, tmp_path: Path) -> None:
    files = {"model.safetensors": FILES["model.safetensors"]}
    with pytest.raises(ConnectionFailed):
        download(FaultyServer(files, cuts=[700, *[0] * 5]), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    server = FaultyServer(files)
    download(server, tmp_path)
    check_here(tmp_path, files)
    assert server.asked == [("model.safetensors", "bytes=700-")]


def test_what_is_here_is_not_asked_for(download: Download, tmp_path: Path) -> None:
    download(FaultyServer(FILES), tmp_path)
    (tmp_path / "sub dir/ü.txt").write_bytes(b"TEXT")
    server = FaultyServer(FILES)
    download(server, tmp_path)
    check_here(tmp_path)
    assert [name for name, _ in server.asked] == ["sub dir/ü.txt"]


def test_a_server_that_ignores_ranges_starts_anew(download: Download, tmp_path: Path) -> None:
    files = {"model.safetensors": FILES["model.safetensors"]}
    download(FaultyServer(files, cuts=[1000], ignores_ranges=True), tmp_path)
    check_here(tmp_path, files)


def test_a_flipped_bit_is_read_again_once(download: Download, tmp_path: Path) -> None:
    files = {"model.safetensors": FILES["model.safetensors"]}
    download(FaultyServer(files, flips=1), tmp_path / "a")
    check_here(tmp_path / "a", files)
    with pytest.raises(DownloadFailed, match="another SHA-256"):
        download(FaultyServer(files, flips=2), tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_the_first_fault_of_one_file_ends_all(download: Download, tmp_path: Path) -> None:
    files = {f"file-{number}": bytes([number]) * 100 for number in range(20)}
    with pytest.raises(DownloadFailed):
        download(FaultyServer(files, flips=1000), tmp_path, parallel=2)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".part"] == []


def manifest(files: dict[str, bytes]) -> bytes:
    listed = [{"path": name, "sha256": sha256(data)} for name, data in files.items()]
    return json.dumps({"files": listed}).encode()


def test_the_manifest_is_the_one_that_was_published(download: Download, tmp_path: Path) -> None:
    content = manifest(FILES)
    files = {**FILES, "manifest.json": content}
    download(FaultyServer(files, manifest_sha256=sha256(content)), tmp_path / "a")
    with pytest.raises(DownloadFailed, match="not the one"):
        download(FaultyServer(files, manifest_sha256="0" * 64), tmp_path / "b")
    other = manifest({**FILES, "empty": b"not empty"})
    with pytest.raises(DownloadFailed, match="differ: empty"):
        download(
            FaultyServer({**FILES, "manifest.json": other}, manifest_sha256=sha256(other)),
            tmp_path / "c",
        )


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "a\\b", "", "C:/x", "a\0b", ".."]
)
def test_names_that_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="leads out"):
        inside(tmp_path, name)


def test_nothing_is_asked_for_when_one_name_leads_out(download: Download, tmp_path: Path) -> None:
    server = FaultyServer({"good": b"1", "../evil": b"2"})
    with pytest.raises(DownloadFailed):
        download(server, tmp_path / "a")
    assert server.asked == []


def test_parallel_is_a_number_of_files(download: Download, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="parallel=0"):
        download(FaultyServer(FILES), tmp_path, parallel=0)
