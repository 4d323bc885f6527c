"""Pushes to a hub, by the real client to a server of the test's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from core.errors import InvalidInput, NotPermitted, Unavailable
from core.hub_push import PushTarget, push, push_token
from core.settings import Settings
from tests.unit.core.writable_hub import COMMIT, TOKEN, WritableHub, writable_hub

TARGET = PushTarget(repo_id="acme/aligned", token_secret="writer")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with writable_hub(monkeypatch) as state:
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "README.md").write_text("---\nlibrary_name: peft\n---\n# aligned\n")
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    return made


def settings_of(tmp_path: Path, *allowed: str, **secrets: str) -> Settings:
    return Settings(
        data_dir=tmp_path / "data", models={"push_allow": allowed},
        sources={"secrets": {"writer": TOKEN, **secrets}},
    )  # fmt: skip


def test_all_files_come_in_one_commit(hub: WritableHub, folder: Path, tmp_path: Path) -> None:
    pushed = push(folder, TARGET, settings_of(tmp_path, "acme/*"), message="from kdpo")
    assert (pushed.repo_id, pushed.commit) == ("acme/aligned", COMMIT)
    assert pushed.url.endswith(f"/acme/aligned/commit/{COMMIT}")
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.message == "from kdpo"
    assert (hub.made[0]["name"], hub.made[0]["organization"]) == ("aligned", "acme")
    assert hub.made[0].get("private", hub.made[0].get("visibility")) in (True, "private")


def test_what_the_settings_do_not_allow_is_not_tried(hub: WritableHub, tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="may not push") as refused:
        push_token(TARGET, settings_of(tmp_path))
    assert refused.value.code == "push_not_allowed"
    with pytest.raises(NotPermitted):
        push_token(TARGET, settings_of(tmp_path, "other/*"))
    with pytest.raises(InvalidInput, match="no secret named 'nobody'") as unknown:
        push_token(
            PushTarget(repo_id="acme/aligned", token_secret="nobody"), settings_of(tmp_path, "*")
        )
    assert unknown.value.code == "unknown_secret"
    off = Settings(data_dir=tmp_path, models={"push_allow": ("*",), "hub_enabled": False})
    with pytest.raises(InvalidInput) as switched_off:
        push_token(TARGET, off)
    assert switched_off.value.code == "hub_off"
    assert not hub.made


def test_a_hub_that_says_no_or_nothing(
    hub: WritableHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = PushTarget(repo_id="acme/aligned", token_secret="reader")
    settings = settings_of(tmp_path, "*", reader="hf_mayread")
    with pytest.raises(InvalidInput, match="answered 403") as refused:
        push(folder, stranger, settings, message="m")
    assert refused.value.code == "push_refused"
    assert "hf_mayread" not in str(refused.value)
    hub.status = 429
    with pytest.raises(Unavailable, match="broke off"):
        push(folder, TARGET, settings, message="m")
    hub.status, hub.card_errors = 200, ["base_model is no id"]
    with pytest.raises(InvalidInput, match="front matter"):
        push(folder, TARGET, settings, message="m")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="broke off"):
        push(folder, TARGET, settings, message="m")
    assert hub.files == {}
