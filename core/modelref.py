"""A base model as a job names it: resolved once by the API, checked again by the worker."""

import json
import os
import re
import struct
from math import prod
from pathlib import Path
from typing import Literal, TypeGuard

from pydantic import Field

from core.errors import InvalidInput
from core.settings import MIB, Settings
from core.spec import SpecModel

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
MAX_HEADER_BYTES = 10 * MIB
MAX_JSON_BYTES = 64 * MIB
MAX_TENSORS = 100_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
INDEX_FILE = "model.safetensors.index.json"
CONVERT_HINT = (
    "kdpo reads safetensors only, because a pickle can run code; convert with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)

# Bits of one element; 4-bit types share bytes.
_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class ModelRef(SpecModel):
    """Which weights exactly: a folder on the server, or a hub repository at one commit."""

    name: str = Field(description="what the user wrote")
    source: Literal["local", "hub"]
    path: Path | None = Field(default=None, description="folder, when local")
    repo_id: str | None = Field(default=None, description="repository, when on the hub")
    revision: str | None = Field(default=None, description="commit hash, when on the hub")


def resolve_local(name: str, settings: Settings) -> ModelRef | None:
    """Return the model of that name on this machine, or None when it can only be a hub id.

    A name is a sub-folder of one of `settings.model_dirs`; where `settings.local_paths_allowed`,
    any folder by its path, too. What is found is checked by `check_model_dir`.

    Raises:
        InvalidInput: code `model_not_found` when the name is neither, or what `check_model_dir`
            raises.
    """
    folder = _in_roots(name, settings.model_dirs)
    if folder is None and settings.local_paths_allowed:
        folder = _existing_folder(Path(os.path.expanduser(name)))
    if folder is not None:
        check_model_dir(folder)
        return ModelRef(name=name, source="local", path=folder)
    if is_hub_id(name):
        return None
    raise not_found(name, settings)


def is_hub_id(name: str) -> bool:
    """Whether the text has the form `organisation/name` of a hub repository."""
    return HUB_ID.fullmatch(name) is not None and not {".", ".."} & set(name.split("/"))


def not_found(name: str, settings: Settings) -> InvalidInput:
    """Return the error that says where the model was looked for."""
    searched = ", ".join(str(root) for root in settings.model_dirs)
    paths = "" if settings.local_paths_allowed else " (paths on the server may not be named here)"
    return InvalidInput(
        f"no model {name!r}: searched the folders {searched}{paths}",
        code="model_not_found",
        param="model",
        hint="give the name of a sub-folder of these folders, or a hub id such as "
        "Qwen/Qwen2.5-0.5B; KDPO_MODELS__DIRS adds folders",
    )


def check_model_dir(folder: Path) -> None:
    """Check that a folder holds a model that can be loaded without running code of its own.

    Needed: `config.json` without `auto_map`, at least one `*.safetensors` with a sound header, an
    index (if there is one) that names plain files that are there, and a tokenizer.

    Raises:
        InvalidInput: code `model_not_found`, `model_not_safetensors`, `model_needs_remote_code`
            or `model_damaged`.
    """
    try:
        _check_files(folder)
    except OSError as error:
        raise InvalidInput(
            f"the model folder {folder} cannot be read: {error.strerror or error}",
            code="model_not_found",
            param="model",
            hint="let the user that kdpo runs as read the folder and its files",
        ) from error


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"{folder} has no config.json, so it is not a model folder",
            code="model_not_found",
            param="model",
            hint="name the folder that save_pretrained wrote",
        )
    for config in ("config.json", "tokenizer_config.json"):
        _refuse_remote_code(folder / config)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        found = f"only {', '.join(pickles[:3])}" if pickles else "no weights at all"
        raise InvalidInput(
            f"{folder} has {found}, expected *.safetensors",
            code="model_not_safetensors",
            param="model",
            hint=CONVERT_HINT,
        )
    for shard in shards:
        check_safetensors(shard)
    _check_index(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise _damaged(folder, f"no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}")


def check_safetensors(file: Path) -> None:
    """Check the header of a safetensors file: size, form, and that every tensor lies inside.

    Raises:
        InvalidInput: code `model_damaged`.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
            raise _damaged(
                file, f"a header of {length} bytes in a file of {size} (limit {MAX_HEADER_BYTES})"
            )
        header = _json_object(file, stream.read(length))
    if len(header) > MAX_TENSORS:
        raise _damaged(file, f"{len(header)} tensors; at most {MAX_TENSORS} are read")
    for name, entry in header.items():
        if name != "__metadata__":
            _check_tensor(file, name, entry, data_bytes=size - 8 - length)


def _in_roots(name: str, roots: tuple[Path, ...]) -> Path | None:
    """Return the folder `name` below one of the roots; `..` and links that lead out are refused."""
    if ".." in Path(name).parts:
        return None
    for root in roots:
        folder = _existing_folder(root / name)
        if folder is not None and folder.is_relative_to(Path(os.path.realpath(root))):
            return folder
    return None


def _existing_folder(path: Path) -> Path | None:
    if "\0" in str(path):
        return None
    real = Path(os.path.realpath(path))
    return real if os.path.isdir(real) else None


def _refuse_remote_code(config: Path) -> None:
    if not config.is_file():
        return
    if config.stat().st_size > MAX_JSON_BYTES:
        raise _damaged(config, f"larger than {MAX_JSON_BYTES} bytes")
    if "auto_map" in _json_object(config, config.read_bytes()):
        raise InvalidInput(
            f"{config.name} of {config.parent} has `auto_map`: the model brings its own code, "
            "which kdpo never runs",
            code="model_needs_remote_code",
            param="model",
            hint="choose a model whose architecture transformers has built in",
        )


def _check_index(folder: Path) -> None:
    index = folder / INDEX_FILE
    if not index.is_file():
        return
    if index.stat().st_size > MAX_JSON_BYTES:
        raise _damaged(index, f"larger than {MAX_JSON_BYTES} bytes")
    weight_map = _json_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "no `weight_map`")
    for name in set(map(str, weight_map.values())):
        plain = name == os.path.basename(name) and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise _damaged(index, f"names {name!r}, expected a plain *.safetensors file name")
        if not (folder / name).is_file():
            raise _damaged(index, f"names {name}, which is not there; copy the missing shard")


def _check_tensor(file: Path, name: str, entry: object, *, data_bytes: int) -> None:
    if not isinstance(entry, dict):
        raise _damaged(file, f"tensor {name!r} has no description")
    bits = _DTYPE_BITS.get(str(entry.get("dtype")))
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if bits is None or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(file, f"tensor {name!r} has a malformed description")
    begin, end = offsets
    if not begin <= end <= data_bytes or (end - begin) * 8 != prod(shape) * bits:
        raise _damaged(
            file, f"tensor {name!r} at bytes {begin} to {end} does not fit {data_bytes} bytes of "
            f"data or its shape {shape}; copy the file again"
        )  # fmt: skip


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _json_object(file: Path, data: bytes) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "not valid JSON") from error
    if not isinstance(value, dict):
        raise _damaged(file, "not a JSON object")
    return value


def _damaged(path: Path, what: str) -> InvalidInput:
    return InvalidInput(
        f"{path}: {what}",
        code="model_damaged",
        param="model",
        hint="copy or download the model again",
    )
