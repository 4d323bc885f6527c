"""What the reference says, kept on disk: one pass for all trials, jobs and workers of a machine.

An entry is a sealed folder named by `reference_key`: the table, and where they were wanted and
within the budget the hidden states, mapped and never loaded. Whether a caller gets states depends
on what it asks for, never on what lies on the disk.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save

from worker.training.entries import EntryFolder
from worker.training.folders import FolderDamaged, open_sealed, seal_folder
from worker.training.model import Policy
from worker.training.reference import FORMAT, Progress, ReferenceTable, compute_reference
from worker.training.states import (
    ReferenceStates,
    StatesWriter,
    answer_lengths,
    map_states,
    states_dtype,
    states_fit,
)
from worker.training.tokenize import TokenizedPair

log = logging.getLogger("kdpo.training")

MANIFEST = "MANIFEST.json"
TABLE, STATES, STARTS = "table.safetensors", "states.bin", "starts.bin"
_STARTS_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class Reference:
    """What the reference says about some pairs; no `states` where they were not asked for or would
    pass the budget.
    """

    table: ReferenceTable
    states: ReferenceStates | None


class ReferenceStore:
    """Entries under `folder`, at most `max_bytes` of them; `states_bytes` is for one split."""

    def __init__(self, folder: Path, *, max_bytes: int, states_bytes: int) -> None:
        self._entries = EntryFolder(folder)
        self._max_bytes = max_bytes
        self._states_bytes = states_bytes

    def get(
        self,
        policy: Policy,
        pairs: Sequence[TokenizedPair],
        *,
        key: str,
        states: bool,
        progress: Progress,
    ) -> Reference:
        """Return the reference of `key`, every byte checked; computed if it is missing or damaged.

        While another process computes it, this one waits. `progress(pairs done, pairs in all)` may
        raise to stop either.

        Raises:
            StorageFull: the disk has no room.
        """
        wanted = states and states_fit(policy, pairs, budget_bytes=self._states_bytes)
        entry = _Entry(policy, pairs, key=key, states=wanted)
        with self._entries.locked(key, waiting=lambda: progress(0, len(pairs))) as path:
            found = self._read(entry, path)
            if found is None:
                size = entry.write(path, progress=progress)
                if size > self._max_bytes:
                    log.warning(
                        "the reference in %s takes %d bytes, the whole store may take %d: it is "
                        "used, and removed when another one is written",
                        path, size, self._max_bytes,
                    )  # fmt: skip
                found = entry.open(path)
                self._entries.evict(max_bytes=self._max_bytes)
            self._entries.touch(key)
        progress(len(pairs), len(pairs))
        return found

    def _read(self, entry: "_Entry", path: Path) -> Reference | None:
        """Read what verifies; None when there is nothing, too little, or only a damaged entry."""
        if not path.exists():
            return None
        try:
            if entry.is_whole(path):
                return entry.open(path)
        except FolderDamaged as error:
            log.warning("a damaged reference is removed and computed again: %s", error.message)
            self._entries.remove(entry.key)
        else:
            log.info("the reference in %s has no hidden states: it is computed again", path)
        return None


@dataclass(frozen=True)
class _Entry:
    """An entry as it must be for these pairs under this policy."""

    policy: Policy
    pairs: Sequence[TokenizedPair]
    key: str
    states: bool

    def is_whole(self, path: Path) -> bool:
        """Check every byte; return whether all that is wanted is there.

        Raises:
            FolderDamaged: the folder is not what was written for this key.
        """
        about = dict(open_sealed(path, manifest_name=MANIFEST).manifest)
        about.pop("files")
        has_states = about == self._about(states=True)
        if not has_states and about != self._about(states=False):
            raise FolderDamaged(
                f"{path} is described as {about}, expected {self._about(states=self.states)}"
            )
        return has_states or not self.states

    def write(self, path: Path, *, progress: Progress) -> int:
        """Run the reference and seal what it says; return the entry's size in bytes."""

        def write(folder: Path) -> None:
            if self.states:
                with (folder / STATES).open("wb") as file:
                    writer = StatesWriter(file, self.pairs, dtype=states_dtype(self.policy))
                    table = compute_reference(
                        self.policy, self.pairs, progress=progress, take_states=writer.take
                    )
                (folder / STARTS).write_bytes(writer.starts.astype(_STARTS_DTYPE).tobytes())
            else:
                table = compute_reference(self.policy, self.pairs, progress=progress)
            # Not `save_file`: it hides a full disk behind an error of its own.
            (folder / TABLE).write_bytes(save(table.tensors()))

        return seal_folder(
            path,
            token=self.key,
            manifest_name=MANIFEST,
            about=self._about(states=self.states),
            write=write,
        ).size_bytes

    def open(self, path: Path) -> Reference:
        """Load the table and map the states of an entry that is whole."""
        tensors = load_file(path / TABLE)
        table = ReferenceTable(
            **{field.name: tensors[field.name] for field in fields(ReferenceTable)}
        )
        if not self.states:
            return Reference(table, states=None)
        starts = np.fromfile(path / STARTS, dtype=_STARTS_DTYPE).astype(np.int64)
        mapped = map_states(
            path / STATES,
            starts=starts,
            lengths=answer_lengths(self.pairs),
            width=self.policy.hidden_size,
            dtype=states_dtype(self.policy),
        )
        return Reference(table, states=mapped)

    def _about(self, *, states: bool) -> dict[str, Any]:
        kept = {
            "dtype": str(states_dtype(self.policy)).removeprefix("torch."),
            "tokens": int(answer_lengths(self.pairs).sum()),
        }
        return {
            "format": FORMAT,
            "key": self.key,
            "pairs": len(self.pairs),
            "hidden_size": self.policy.hidden_size,
            "states": kept if states else None,
        }
