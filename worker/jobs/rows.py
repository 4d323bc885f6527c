"""The rows that a job reads: where they are, and whether they are still what was validated."""

from pathlib import Path

from core.errors import FailureCode, RunAborted
from models.dataset import Dataset
from worker.context import JobContext
from worker.ingest.files import file_sha256
from worker.ingest.pipeline import CANONICAL_NAME


def canonical_path(context: JobContext, dataset: Dataset) -> Path:
    """Where ingest has put the dataset's canonical rows."""
    return context.settings.artifact_dir / "datasets" / dataset.id / CANONICAL_NAME


def check_canonical(path: Path, dataset: Dataset) -> None:
    """Make sure that the rows are those that were validated.

    Raises:
        RunAborted: the file is gone or was changed (`dataset_invalid`).
    """
    if not path.is_file():
        raise RunAborted(
            f"the rows of dataset {dataset.id} are not on this server",
            failure=FailureCode.DATASET_INVALID,
            hint="upload it again; API and workers must share one data folder",
        )
    found = file_sha256(path)
    if found != dataset.canonical_sha256:
        raise RunAborted(
            f"the rows of dataset {dataset.id} have sha256 {found}, expected "
            f"{dataset.canonical_sha256}",
            failure=FailureCode.DATASET_INVALID,
            hint="the file was changed after validation; upload the data again",
        )
