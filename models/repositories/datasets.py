"""Datasets."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.errors import Conflict, NotFound
from core.lifecycle import DatasetStatus
from models.dataset import Dataset
from models.repositories.paging import Page, PageQuery, fetch_page
from models.types import db_now


class DatasetRepository:
    """Reads and writes of datasets in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(
        self,
        *,
        dataset_id: str,
        owner_id: str,
        job_id: str,
        name: str,
        size_bytes: int,
        sha256: str,
        policy: dict[str, Any],
    ) -> Dataset:
        """Insert a dataset that is still to be validated."""
        dataset = Dataset(
            id=dataset_id,
            owner_id=owner_id,
            job_id=job_id,
            name=name,
            status=DatasetStatus.VALIDATING,
            bytes=size_bytes,
            sha256=sha256,
            policy=policy,
        )
        self._session.add(dataset)
        self._session.flush()
        return dataset

    def get(self, owner_id: str, dataset_id: str) -> Dataset:
        """Return the owner's dataset.

        Raises:
            NotFound: no such dataset, or somebody else's.
        """
        dataset = self._session.get(Dataset, dataset_id)
        if dataset is None or dataset.owner_id != owner_id:
            raise NotFound(
                f"no dataset {dataset_id!r}", hint="POST /v1/datasets makes one", param="dataset_id"
            )
        return dataset

    def get_usable(self, owner_id: str, dataset_id: str) -> Dataset:
        """Return the owner's dataset if jobs can be made from it.

        Raises:
            NotFound: no such dataset.
            Conflict: it is still being validated, it is invalid, or it was a dry run.
        """
        dataset = self.get(owner_id, dataset_id)
        if not dataset.status.is_usable:
            raise Conflict(
                f"dataset {dataset_id} is {dataset.status.value}, expected ready",
                code="dataset_not_ready",
                param="dataset_id",
                hint="upload the file again without dry_run"
                if dataset.status is DatasetStatus.CHECKED
                else f"read GET /v1/datasets/{dataset_id}/report",
                retryable=dataset.status is DatasetStatus.VALIDATING,
            )
        return dataset

    def page(self, owner_id: str, query: PageQuery) -> Page[Dataset]:
        """Return one page of the owner's datasets."""
        statement = select(Dataset).where(Dataset.owner_id == owner_id)
        return fetch_page(self._session, statement, Dataset.id, query)

    def load(self, dataset_id: str) -> Dataset:
        """Return a dataset for the job that works on it."""
        return self._session.get_one(Dataset, dataset_id)

    def record_result(
        self,
        dataset_id: str,
        *,
        status: DatasetStatus,
        report: dict[str, Any],
        counts: dict[str, Any],
        canonical_sha256: str | None,
        failure: dict[str, Any] | None,
    ) -> None:
        """Store what validation found."""
        dataset = self._session.get_one(Dataset, dataset_id)
        dataset.status = status
        dataset.report = report
        dataset.counts = counts
        dataset.canonical_sha256 = canonical_sha256
        dataset.failure = failure
        if status.is_usable:
            dataset.ready_at = db_now()
        self._session.flush()
