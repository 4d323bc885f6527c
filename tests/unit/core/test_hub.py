"""The hub, played by a server on this machine: pinning, refusals, the cache, and being offline."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from core import hub
from core.errors import InvalidInput, NotPermitted
from core.modelref import ModelRef
from core.settings import Settings

TINY = Path(__file__).parents[3] / "examples" / "models" / "tiny-lm"
SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/tiny-lm"
FILES = {
    "config.json": (TINY / "config.json").read_bytes(),
    "tokenizer.json": b"{}",
    "model.safetensors": (TINY / "model.safetensors").read_bytes(),
    "pytorch_model.bin": b"\x80\x02 a pickle",
    "modeling.py": b"raise SystemExit",
    "onnx/config.json": b"{}",
}


@dataclass
class Hub:
    """What the server says, and what it was asked."""

    info_status: int = 200
    error_code: str = ""
    gated: bool = False
    may_read: bool = True
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        if path == f"/api/models/{REPO}/auth-check":
            return (200, {}, b"{}") if self.may_read else (403, {"X-Error-Code": "GatedRepo"}, b"")
        if path.startswith(f"/api/models/{REPO}/tree/{SHA}"):
            return 200, {}, json.dumps([self._entry(name) for name in self.files]).encode()
        if path.startswith("/api/models/"):
            if self.info_status != 200:
                return self.info_status, {"X-Error-Code": self.error_code}, b""
            info = {
                "_id": "1", "id": REPO, "modelId": REPO, "sha": SHA, "gated": self.gated and "auto",
                "private": False, "siblings": [{"rfilename": name} for name in self.files],
            }  # fmt: skip
            return 200, {}, json.dumps(info).encode()
        name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
        data = self.files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA}  # noqa: S324
        return 200, headers, data

    def _entry(self, name: str) -> dict[str, object]:
        data = self.files[name]
        oid = hashlib.sha1(data).hexdigest()  # noqa: S324 - git's own hash
        return {"type": "file", "path": name, "size": len(data), "oid": oid}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = state.answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{listener.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    listener.shutdown()
    listener.server_close()
    thread.join()


def settings_of(tmp_path: Path, **models: object) -> Settings:
    return Settings(data_dir=tmp_path / "data", models={"allow_local_paths": False, **models})


def cache_snapshot(tmp_path: Path) -> None:
    repo = tmp_path / "cache" / "models--acme--tiny-lm"
    shutil.copytree(TINY, repo / "snapshots" / SHA)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)


def test_commit_is_pinned(server: Hub, tmp_path: Path) -> None:
    ref = hub.resolve(REPO, settings_of(tmp_path))
    assert ref == ModelRef(name=REPO, source="hub", repo_id=REPO, revision=SHA)


def test_fetch_brings_weights_and_nothing_that_runs(server: Hub, tmp_path: Path) -> None:
    made = settings_of(tmp_path)
    folder = hub.fetch(hub.preflight(REPO, made), made)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    server.asked.clear()
    offline = settings_of(tmp_path, hub_enabled=False)
    assert hub.fetch(hub.preflight(REPO, offline), offline) == folder
    assert server.asked == []


def test_gated_model(server: Hub, tmp_path: Path) -> None:
    server.gated, server.may_read = True, False
    with pytest.raises(InvalidInput) as caught:
        hub.preflight(REPO, settings_of(tmp_path))
    assert caught.value.code == "model_gated"
    assert "KDPO_MODELS__HUB_TOKEN" in str(caught.value.hint)
    server.may_read = True
    assert hub.preflight(REPO, settings_of(tmp_path)).revision == SHA


@pytest.mark.parametrize(
    ("status", "error_code", "code"),
    [
        (404, "RepoNotFound", "model_not_found"),
        (401, "RepoNotFound", "model_not_found"),
        (403, "GatedRepo", "model_gated"),
        (500, "", "model_unreachable"),
        (403, "", "model_unreachable"),
    ],
)
def test_refusals(server: Hub, tmp_path: Path, status: int, error_code: str, code: str) -> None:
    server.info_status, server.error_code = status, error_code
    with pytest.raises(InvalidInput) as caught:
        hub.preflight(REPO, settings_of(tmp_path))
    assert caught.value.code == code
    assert caught.value.hint


def test_model_without_safetensors(server: Hub, tmp_path: Path) -> None:
    del server.files["model.safetensors"]
    with pytest.raises(InvalidInput, match=r"pytorch_model\.bin") as caught:
        hub.preflight(REPO, settings_of(tmp_path))
    assert caught.value.code == "model_not_safetensors"


def test_model_with_code_is_refused_when_it_has_come(server: Hub, tmp_path: Path) -> None:
    server.files["config.json"] = b'{"auto_map": {"AutoModel": "modeling.Evil"}}'
    made = settings_of(tmp_path)
    with pytest.raises(InvalidInput) as caught:
        hub.fetch(hub.preflight(REPO, made), made)
    assert caught.value.code == "model_needs_remote_code"


def test_ids_outside_of_the_allow_list(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotPermitted) as caught:
        hub.preflight(REPO, settings_of(tmp_path, hub_allow=("Qwen/*",)))
    assert caught.value.code == "model_not_allowed"
    assert server.asked == []
    assert hub.preflight(REPO, settings_of(tmp_path, hub_allow=("Qwen/*", "acme/*")))


@pytest.mark.parametrize("name", ["a--b/c", "-a/b", "a/b..c"])
def test_ids_that_the_hub_does_not_have(server: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        hub.preflight(name, settings_of(tmp_path))
    assert caught.value.code == "model_not_found"
    assert server.asked == []


def test_offline_says_what_to_do(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match="could not reach the hub") as caught:
        hub.preflight(REPO, settings_of(tmp_path))
    assert caught.value.code == "model_unreachable"
    assert "HF_HUB_OFFLINE" in caught.value.message
    assert "local path" in str(caught.value.hint)
    assert server.asked == []


@pytest.mark.parametrize("how", ["offline", "disabled", "unreachable"])
def test_cached_snapshot_is_enough(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    cache_snapshot(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    if how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    made = settings_of(tmp_path, hub_enabled=how != "disabled")
    ref = hub.preflight(REPO, made)
    assert ref.revision == SHA
    if how != "unreachable":
        assert hub.fetch(ref, made).name == SHA
        assert server.asked == []


def test_unreachable_hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InvalidInput) as caught:
        hub.preflight(REPO, settings_of(tmp_path))
    assert caught.value.code == "model_unreachable"
    assert caught.value.retryable


def test_local_model_is_checked_again_when_the_job_runs(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(TINY, folder)
    ref = ModelRef(name="mine", source="local", path=folder)
    assert hub.fetch(ref, settings_of(tmp_path)) == folder
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidInput, match="header"):
        hub.fetch(ref, settings_of(tmp_path))
    shutil.rmtree(folder)
    with pytest.raises(InvalidInput) as caught:
        hub.fetch(ref, settings_of(tmp_path))
    assert caught.value.code == "model_not_found"
