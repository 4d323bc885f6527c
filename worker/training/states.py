"""The reference's last hidden states before every response token, in a file that is mapped.

Penalties and drift need them. Shapes: n pairs, T response tokens of all of them, H width, B pairs
and N tokens of one batch; answers are numbered [0, 2n), chosen ones first.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import FailureCode, RunAborted
from worker.training.batches import PairBatch
from worker.training.model import Policy
from worker.training.tokenize import TokenizedPair

log = logging.getLogger("kdpo.training")

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ReferenceStates:
    """`mapped` (T, bytes of H numbers) is read-only; answer a begins at `starts[a]`, (2n,)."""

    mapped: Bytes
    dtype: torch.dtype
    starts: Ints
    lengths: Ints
    path: Path
    """The file that is mapped; it may have lost this name since."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.mapped.nbytes

    def of(self, batch: PairBatch) -> Tensor:
        """Return the states of a batch in the order of its labels, (N, H), on its device.

        The one copy that is made is the batch's; a GPU is not waited for.
        """
        answers = _answers(batch, pairs=self.starts.size // 2)
        starts, lengths = self.starts[answers].tolist(), self.lengths[answers].tolist()
        device, width = batch.labels.device, self.mapped.shape[1] // self.dtype.itemsize
        states = torch.empty(
            sum(lengths), width, dtype=self.dtype, pin_memory=device.type == "cuda"
        )
        rows = states.view(torch.uint8).numpy()
        end = 0
        for start, length in zip(starts, lengths, strict=True):
            rows[end : end + length] = self.mapped[start : start + length]
            end += length
        return states.to(device, non_blocking=True)


class StatesWriter:
    """Writes states to a file in the order in which batches come, and remembers where they are."""

    def __init__(
        self, file: BinaryIO, pairs: Sequence[TokenizedPair], *, dtype: torch.dtype
    ) -> None:
        self.starts: Ints = np.zeros(2 * len(pairs), dtype=np.int64)
        self._file = file
        self._dtype = dtype
        self._lengths = answer_lengths(pairs)
        self._written = 0

    def take(self, batch: PairBatch, states: Tensor) -> None:
        """Append the states of a batch, (N, H)."""
        answers = _answers(batch, pairs=self.starts.size // 2)
        lengths = self._lengths[answers]
        self.starts[answers] = self._written + lengths.cumsum() - lengths
        self._written += int(lengths.sum())
        self._file.write(states.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)


def answer_lengths(pairs: Sequence[TokenizedPair]) -> Ints:
    """Response tokens of every answer, (2n,), chosen ones first."""
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return np.array([len(answer) for answer in answers], dtype=np.int64)


def map_states(
    path: Path, *, starts: Ints, lengths: Ints, width: int, dtype: torch.dtype
) -> ReferenceStates:
    """Map a file of states without reading it; the mapping outlives the file's name."""
    shape = (int(lengths.sum()), width * dtype.itemsize)
    mapped = np.memmap(path, dtype=np.uint8, mode="r", shape=shape).view(np.ndarray)
    return ReferenceStates(mapped, dtype=dtype, starts=starts, lengths=lengths, path=path)


def states_dtype(policy: Policy) -> torch.dtype:
    """Type of the policy's last hidden states, which the output layer takes."""
    return policy.head.weight.dtype


def states_fit(policy: Policy, pairs: Sequence[TokenizedPair], *, budget_bytes: int) -> bool:
    """Whether the states of these pairs keep within the budget; the log says what follows."""
    tokens = int(answer_lengths(pairs).sum())
    needed = tokens * policy.hidden_size * states_dtype(policy).itemsize
    fit = needed <= budget_bytes
    log.info(
        "reference states of %d tokens need %d bytes, the budget is %d: %s",
        tokens, needed, budget_bytes, "kept" if fit else "the base is run again at every step",
    )  # fmt: skip
    return fit


def states_missing(use: str) -> RunAborted:
    """The error for a reference that has to be run again while the policy is trained in full."""
    return RunAborted(
        f"{use} the hidden states of the reference; those of the data do not fit into "
        "KDPO_TRAINING__REFERENCE_STATES_BYTES, and with adaptation `full` the base is no more "
        "there to compute them again",
        failure=FailureCode.OUT_OF_MEMORY,
        hint="raise KDPO_TRAINING__REFERENCE_STATES_BYTES (the worker's log says to how much), "
        "train a low-rank adapter, or use less data",
    )


def _answers(batch: PairBatch, *, pairs: int) -> Ints:
    """Numbers of a batch's answers in the order of its labels, (2B,)."""
    order = np.array(batch.order, dtype=np.int64)
    return np.concatenate([order, order + pairs])
