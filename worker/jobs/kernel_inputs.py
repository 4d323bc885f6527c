"""What kernels see: the embeddings of a job's pairs, and the frames that are fitted on them."""

from collections.abc import Callable, Sequence

import torch

from core.hub import fetch
from core.modelref import ModelRef
from core.settings import Settings
from core.spec import KernelTerm
from objectives import Geometry, PairEmbeddings, fit_geometry
from worker.ingest.canonical import CanonicalRow
from worker.training.encoder import encode_rows
from worker.training.reference import Progress


class KernelInputs:
    """Embeddings and frames of one training split, each made once."""

    def __init__(
        self, settings: Settings, *, encoder: ModelRef | None, seed: int, device: torch.device
    ) -> None:
        self.encoder = encoder
        self._settings = settings
        self._seed = seed
        self._device = device
        self._encodings: PairEmbeddings | None = None
        self._geometries: dict[str, Geometry] = {}

    def of(
        self,
        term: KernelTerm,
        *,
        reference: Callable[[], PairEmbeddings],
        rows: Sequence[CanonicalRow],
        progress: Progress,
    ) -> tuple[PairEmbeddings | None, Geometry]:
        """Frozen embeddings where the kernel sees those, and the frame fitted on what it sees."""
        source = self._source(term)
        if source == "encoder":
            assert self.encoder is not None
            embeddings = self._encoded(self.encoder, rows, progress)
        else:
            embeddings = reference()
        if source not in self._geometries:
            self._geometries[source] = fit_geometry(embeddings, seed=self._seed)
        return (embeddings if term.embedding == "encoder" else None), self._geometries[source]

    def geometry(self, term: KernelTerm | None) -> Geometry | None:
        """The frame that `of` has fitted for a term."""
        return None if term is None else self._geometries[self._source(term)]

    def _source(self, term: KernelTerm) -> str:
        """Whose embeddings the kernel's frame is fitted on."""
        return "encoder" if term.embedding == "encoder" and self.encoder else "reference"

    def _encoded(
        self, encoder: ModelRef, rows: Sequence[CanonicalRow], progress: Progress
    ) -> PairEmbeddings:
        if self._encodings is None:
            self._encodings = encode_rows(
                fetch(encoder, self._settings), rows, device=self._device, progress=progress
            )
        return self._encodings
