"""Which folders are models: found by name, checked without loading anything."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import InvalidInput
from core.modelref import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    check_model_dir,
    check_safetensors,
    is_hub_id,
    resolve_local,
)
from core.settings import Settings

TINY = Path(__file__).parents[3] / "examples" / "models" / "tiny-lm"


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors({"w": tensor()}, b"\0" * 16))
    return folder


def settings_for(model: Path, *, allow: bool = False) -> Settings:
    return Settings(
        data_dir=model.parents[1] / "data",
        models={"dirs": (model.parent,), "allow_local_paths": allow},
    )


def refused(folder: Path) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        check_model_dir(folder)
    assert caught.value.hint
    assert caught.value.param == "model"
    return caught.value


# --------------------------------------------------------------------- names


def test_name_of_a_sub_folder(model: Path) -> None:
    ref = resolve_local("mine", settings_for(model))
    assert ref is not None
    assert ref.model_dump() == {
        "name": "mine", "source": "local", "path": model, "repo_id": None, "revision": None,
    }  # fmt: skip


def test_name_of_a_nested_folder_beats_the_hub(model: Path) -> None:
    nested = model.parent / "org" / "mine"
    shutil.copytree(model, nested)
    ref = resolve_local("org/mine", settings_for(model))
    assert ref is not None
    assert ref.path == nested


def test_example_model_is_one() -> None:
    check_model_dir(TINY)


def test_hub_ids_are_left_to_the_hub(model: Path) -> None:
    assert resolve_local("Qwen/Qwen2.5-0.5B", settings_for(model)) is None


@pytest.mark.parametrize(
    "name",
    ["nothing", "../models/mine", "a/../mine", "/etc", "~/x", "a/b/c", "mine\0", "é/b", "./.."],
)
def test_other_names_are_not_found(model: Path, name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve_local(name, settings_for(model))
    assert caught.value.code == "model_not_found"
    assert str(model.parent) in caught.value.message


@pytest.mark.parametrize(
    "name", ["~nobody-has-this-name/x", "x" * 500, "a/" * 200, "/" + "x" * 400]
)
def test_impossible_paths_are_not_found(model: Path, name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve_local(name, settings_for(model, allow=True))
    assert caught.value.code == "model_not_found"


def test_paths_only_where_they_are_allowed(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    with pytest.raises(InvalidInput, match="paths on the server may not be named here"):
        resolve_local(str(elsewhere), settings_for(model))
    ref = resolve_local(str(elsewhere), settings_for(model, allow=True))
    assert ref is not None
    assert ref.path == elsewhere
    inside = resolve_local(str(model), settings_for(model))
    assert inside is not None
    assert inside.path == model


def test_links_that_lead_out_of_the_roots_are_not_followed(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    (model.parent / "link").symlink_to(elsewhere)
    with pytest.raises(InvalidInput) as caught:
        resolve_local("link", settings_for(model))
    assert caught.value.code == "model_not_found"


@given(st.text(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leads_out_of_the_roots(model: Path, name: str) -> None:
    try:
        ref = resolve_local(name, settings_for(model))
    except InvalidInput:
        return
    if ref is None:
        assert is_hub_id(name)
    else:
        assert ref.path is not None
        assert ref.path.is_relative_to(model.parent)


# ------------------------------------------------------------------- folders


def test_pickles_are_not_read(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no weights at all" in refused(model).message
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02")
    error = refused(model)
    assert error.code == "model_not_safetensors"
    assert "pytorch_model.bin" in error.message
    assert "save_pretrained" in str(error.hint)


def test_files_that_cannot_be_read_are_named(model: Path) -> None:
    (model / "model-2.safetensors").mkdir()  # reading fails even for root
    with pytest.raises(InvalidInput, match=f"{model} cannot be read: Is a directory") as caught:
        check_model_dir(model)
    assert caught.value.code == "model_not_found"


def test_folder_without_config_or_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(model).message
    (model / "config.json").unlink()
    assert refused(model).code == "model_not_found"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_models_with_code_of_their_own_are_refused(model: Path, name: str) -> None:
    (model / name).write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    assert refused(model).code == "model_needs_remote_code"


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_broken_config(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert refused(model).code == "model_damaged"


@pytest.mark.parametrize(
    "weight_map",
    [
        {"w": "../../secret.safetensors"},
        {"w": "/etc/x.safetensors"},
        {"w": "a\\b.safetensors"},
        {"w": "model.bin"},
        {"w": "missing.safetensors"},
        {"w": 7},
        {},
        [],
    ],
)
def test_index_names_plain_files_that_are_there(model: Path, weight_map: object) -> None:
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert refused(model).code == "model_damaged"


def test_good_index(model: Path) -> None:
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    check_model_dir(model)


# ------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 0),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        safetensors(b"[]"),
        safetensors(b"nope"),
        safetensors({"w": 1}),
        safetensors({"w": {}}),
        safetensors({"w": tensor(dtype="OBJECT")}, b"\0" * 16),
        safetensors({"w": tensor(shape=[-2, -2])}, b"\0" * 16),
        safetensors({"w": tensor(shape=[2.0, 2])}, b"\0" * 16),
        safetensors({"w": tensor(shape=[2, 3])}, b"\0" * 16),
        safetensors({"w": tensor(data_offsets=[0, 16, 32])}, b"\0" * 16),
        safetensors({"w": tensor(data_offsets=[16, 0])}, b"\0" * 16),
        safetensors({"w": tensor(data_offsets=[True, 16])}, b"\0" * 16),
        safetensors({"w": tensor()}, b"\0" * 15),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        check_safetensors(file)
    assert caught.value.code == "model_damaged"


def test_metadata_and_scalars_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = {"__metadata__": {"format": "pt"}, "s": tensor(shape=[], data_offsets=[0, 4])}
    file.write_bytes(safetensors(header, b"\0" * 4))
    check_safetensors(file)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_or_accepted_and_never_crash(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InvalidInput):
        check_safetensors(file)
