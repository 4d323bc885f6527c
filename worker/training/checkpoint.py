"""Points from which a killed run goes on exactly: safetensors and JSON, verified, never pickled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import KdpoError
from worker.training.folders import (
    FolderDamaged,
    SealedFolder,
    open_sealed,
    seal_folder,
    write_json,
)
from worker.training.watch import Values

MANIFEST = "MANIFEST.json"
TENSORS = "state.safetensors"
VALUES = "state.json"

Identity = dict[str, str | int | float | None]


class IdentityMismatch(KdpoError):
    """A point was written by a run of something else; going on from it would not be exact."""

    default_code = "identity_mismatch"


@dataclass(frozen=True)
class SavedState:
    """A run at a step boundary. `tensors`: adapter, optimizer, mixture logits, RNG, open window,
    best weights so far.

    `epoch` and `offset` say where in the data the next step begins; they follow from `step` and
    are there to be checked. `watch` are the scores on validation, `ended` that no step follows.
    """

    step: int
    epoch: int
    offset: int
    seconds: float
    tensors: dict[str, Tensor]
    window_steps: int
    num_tokens: int
    watch: Values
    ended: bool


class ResumeStore(Protocol):
    """Where a run keeps its points; the job's implementation records them in the database."""

    def save(self, state: SavedState) -> None:
        """Keep a point."""
        ...

    def load(self) -> SavedState | None:
        """Return the furthest point that can be trusted, or None."""
        ...

    def is_due(self) -> bool:
        """Whether enough time has passed since the last point."""
        ...


def write_point(
    state: SavedState, final: Path, *, attempt: int, scope: str, identity: Identity
) -> SealedFolder:
    """Write a point as a folder that is whole or not there.

    Raises:
        StorageFull: the disk has no room.
    """

    def write(folder: Path) -> None:
        save_file({n: t.contiguous().cpu() for n, t in state.tensors.items()}, folder / TENSORS)
        write_json(
            folder / VALUES,
            {
                "step": state.step,
                "epoch": state.epoch,
                "offset": state.offset,
                "seconds": state.seconds,
                "window_steps": state.window_steps,
                "num_tokens": state.num_tokens,
                "watch": state.watch,
                "ended": state.ended,
            },
        )

    return seal_folder(
        final,
        token=f"{attempt}-{state.step}",
        manifest_name=MANIFEST,
        about={"step": state.step, "attempt": attempt, "scope": scope, "identity": identity},
        write=write,
    )


def read_point(path: Path, *, sha256: str | None, identity: Identity) -> SavedState:
    """Read a point back.

    Raises:
        FolderDamaged: the folder is not what its manifest (of hash `sha256`) says.
        IdentityMismatch: model, data, reference, spec, versions or threads are others.
    """
    sealed = open_sealed(path, manifest_name=MANIFEST, sha256=sha256)
    found = sealed.manifest.get("identity")
    if found != identity:
        known = found if isinstance(found, dict) else {}
        differing = sorted(k for k in {*known, *identity} if known.get(k) != identity.get(k))
        raise IdentityMismatch(f"{path} was written with another {', '.join(differing)}")
    try:
        values = orjson.loads((path / VALUES).read_bytes())
        return SavedState(
            step=values["step"],
            epoch=values["epoch"],
            offset=values["offset"],
            seconds=values["seconds"],
            tensors=load_file(path / TENSORS),
            window_steps=values["window_steps"],
            num_tokens=values["num_tokens"],
            watch=values["watch"],
            ended=values["ended"],
        )
    except (OSError, orjson.JSONDecodeError, KeyError, SafetensorError) as error:
        raise FolderDamaged(f"{path} cannot be read: {error}") from error
