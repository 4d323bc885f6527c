"""What the files of a data folder belong to, asked by those who clean it."""

from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.lifecycle import DatasetStatus, JobStatus
from models.dataset import Dataset
from models.experiment import Checkpoint
from models.job import Job

# SQLite allows some thousand parameters; callers with more ids ask several times.
MAX_IDS = 500


class LeftoverRepository:
    """Reads of many rows by id; each call takes at most `MAX_IDS`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def deleted_datasets(self, dataset_ids: Collection[str]) -> set[str]:
        """Return those of the datasets that were deleted."""
        statement = select(Dataset.id).where(
            Dataset.id.in_(dataset_ids), Dataset.status == DatasetStatus.DELETED
        )
        return set(self._session.execute(statement).scalars())

    def uploads(self, upload_ids: Collection[str]) -> dict[str, bool]:
        """Return, of those uploads that any dataset names, whether one has not been deleted."""
        named = select(Dataset.upload_id, Dataset.status).where(Dataset.upload_id.in_(upload_ids))
        found: dict[str, bool] = {}
        for row in self._session.execute(named.distinct()):
            kept = row.status is not DatasetStatus.DELETED
            found[row.upload_id] = found.get(row.upload_id, False) or kept
        return found

    def ended_jobs(self, job_ids: Collection[str]) -> set[str]:
        """Return those of the jobs that have ended for good."""
        ended = [status for status in JobStatus if status.is_terminal]
        statement = select(Job.id).where(Job.id.in_(job_ids), Job.status.in_(ended))
        return set(self._session.execute(statement).scalars())

    def checkpoint_paths(self, job_ids: Collection[str]) -> set[str]:
        """Return the folders, relative to the artifact folder, that the jobs have published."""
        statement = select(Checkpoint.path).where(Checkpoint.job_id.in_(job_ids))
        return set(self._session.execute(statement).scalars())
