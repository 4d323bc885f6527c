from pathlib import Path

import pytest
import torch

from worker.training.checkpoint import (
    MANIFEST,
    TENSORS,
    VALUES,
    Identity,
    IdentityMismatch,
    SavedState,
    read_point,
    write_point,
)
from worker.training.folders import FolderDamaged, SealedFolder, open_sealed, seal_folder

IDENTITY: Identity = {"model": "m", "threads": 1}


def state(step: int = 12) -> SavedState:
    return SavedState(
        step=step, epoch=1, offset=4, seconds=2.5, window_steps=3, num_tokens=2**40,
        watch={"best_step": 8, "best_log_loss": 0.1 + 0.2}, ended=False,
        tensors={
            "adapter.a": torch.tensor([[1.0, -2.0], [3.5, 1e-38]]),
            "rng.cpu": torch.arange(5, dtype=torch.uint8),
        },
    )  # fmt: skip


def point(folder: Path, step: int = 12) -> SealedFolder:
    return write_point(
        state(step), folder / f"step-{step:06d}", attempt=1, scope="train", identity=IDENTITY
    )


def test_a_point_comes_back_to_the_bit(tmp_path: Path) -> None:
    sealed = point(tmp_path)
    back = read_point(sealed.path, sha256=sealed.sha256, identity=IDENTITY)
    original = state()
    assert (back.step, back.epoch, back.offset, back.seconds, back.window_steps) == (
        12, 1, 4, 2.5, 3,
    )  # fmt: skip
    assert (back.num_tokens, back.ended) == (2**40, False)
    assert back.watch == {"best_step": 8, "best_log_loss": 0.1 + 0.2}
    assert back.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000012"]
    assert sorted(p.name for p in sealed.path.iterdir()) == [MANIFEST, VALUES, TENSORS]
    assert sealed.size_bytes == sum(p.stat().st_size for p in sealed.path.iterdir())


@pytest.mark.parametrize("name", [TENSORS, VALUES, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    sealed = point(tmp_path)
    file = sealed.path / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(FolderDamaged):
        read_point(sealed.path, sha256=sealed.sha256, identity=IDENTITY)


def test_a_file_too_many_is_noticed(tmp_path: Path) -> None:
    sealed = point(tmp_path)
    (sealed.path / "extra").write_text("?")
    with pytest.raises(FolderDamaged, match="extra"):
        open_sealed(sealed.path, manifest_name=MANIFEST)


def test_points_of_other_runs_are_refused(tmp_path: Path) -> None:
    sealed = point(tmp_path)
    with pytest.raises(IdentityMismatch, match="another threads"):
        read_point(sealed.path, sha256=sealed.sha256, identity={**IDENTITY, "threads": 2})


def test_a_crash_while_writing_leaves_no_folder(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("…")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        seal_folder(tmp_path / "final", token="1", manifest_name="m", about={}, write=write)
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def seal(name: str) -> SealedFolder:
        def write(folder: Path) -> None:
            (folder / name).write_text(name)

        return seal_folder(tmp_path / "f", token="1", manifest_name="m", about={}, write=write)

    seal("old")
    sealed = seal("new")
    assert sorted(p.name for p in sealed.path.iterdir()) == ["m", "new"]
    assert [entry["path"] for entry in sealed.all_files] == ["new", "m"]
    assert open_sealed(sealed.path, manifest_name="m").sha256 == sealed.sha256
