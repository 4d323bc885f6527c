"""Datasets."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session, defer

from core.errors import Category, Conflict, NotFound
from core.lifecycle import DatasetStatus, JobKind, JobStatus
from core.run_spec import DatasetPolicy
from models.dataset import Dataset
from models.job import Job
from models.repositories.jobs import JobRepository
from models.repositories.paging import Page, PageQuery, fetch_page
from models.repositories.quotas import QuotaRepository
from models.types import db_now

_ENDED = [status for status in JobStatus if status.is_terminal]
# What the bytes and the policy decide; anything else may pass when it is tried again.
_FOR_GOOD = frozenset({Category.INVALID.value, Category.UNSUPPORTED_MEDIA.value})


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
        size_bytes: int | None,
        sha256: str | None,
        policy: dict[str, Any],
        source: dict[str, Any] | None = None,
    ) -> Dataset:
        """Insert version 1 of an upload, which lies under the dataset's id; it is not read yet.

        Of a `source` size and hash are not known before its job has fetched it.

        Raises:
            QuotaExceeded: the owner may not upload or store so much.
        """
        QuotaRepository(self._session).admit_bytes(owner_id, size_bytes or 0)
        dataset = Dataset(
            id=dataset_id,
            upload_id=dataset_id,
            version=1,
            parent_id=None,
            owner_id=owner_id,
            job_id=job_id,
            name=name,
            status=DatasetStatus.VALIDATING,
            bytes=size_bytes,
            sha256=sha256,
            source=source,
            policy=policy,
        )
        self._session.add(dataset)
        self._session.flush()
        return dataset

    def add_version(
        self, parent: Dataset, *, dataset_id: str, job_id: str, name: str, policy: dict[str, Any]
    ) -> Dataset:
        """Insert another reading of the parent's upload; its bytes are shared.

        Call `lock_versions` first: two callers must not count the same number.
        """
        newest = select(func.max(Dataset.version)).where(Dataset.upload_id == parent.upload_id)
        dataset = Dataset(
            id=dataset_id,
            upload_id=parent.upload_id,
            version=self._session.execute(newest).scalar_one() + 1,
            parent_id=parent.id,
            owner_id=parent.owner_id,
            job_id=job_id,
            name=name,
            status=DatasetStatus.VALIDATING,
            bytes=parent.bytes,
            sha256=parent.sha256,
            source=parent.source,
            origin=parent.origin,
            policy=policy,
        )
        self._session.add(dataset)
        self._session.flush()
        return dataset

    def queue_validation(self, dataset: Dataset) -> None:
        """Insert the job that reads the dataset, under the id that the dataset names."""
        JobRepository(self._session).create(
            owner_id=dataset.owner_id,
            kind=JobKind.DATASET,
            spec={"dataset_id": dataset.id},
            job_id=dataset.job_id,
            dataset_id=dataset.id,
        )

    def lock_versions(self, owner_id: str, dataset_id: str) -> Dataset:
        """Return the owner's dataset; its upload gets no other version in this transaction.

        Raises:
            NotFound: no such dataset, or somebody else's.
        """
        dataset = self.get(owner_id, dataset_id)
        self._session.get(Dataset, dataset.upload_id, with_for_update=True, populate_existing=True)
        # After the lock: it may have been deleted meanwhile, and its upload with it.
        return self.get(owner_id, dataset_id, lock=True)

    def version_with(self, dataset: Dataset, policy: DatasetPolicy) -> Dataset | None:
        """Return the version of the dataset's upload that has this policy.

        One whose reading ended for another reason than its data is none: reading again may help.
        """
        versions = select(Dataset).where(
            Dataset.upload_id == dataset.upload_id, Dataset.status != DatasetStatus.DELETED
        )
        versions = versions.order_by(Dataset.version).options(defer(Dataset.report))
        for row in self._session.execute(versions).scalars():
            if _may_pass(row):
                continue
            if DatasetPolicy.model_validate(row.policy) == policy:
                return row
        return None

    def delete(self, owner_id: str, dataset_id: str) -> None:
        """Forget a dataset: nobody is shown it, and the cleanup removes its files.

        Its row stays for the jobs that name it. The upload stays as long as a version has it.

        Raises:
            NotFound: no such dataset, or somebody else's.
            Conflict: a job that has not ended names it.
        """
        dataset = self.lock(owner_id, dataset_id)
        using = select(Job.id).where(Job.dataset_id == dataset_id, Job.status.not_in(_ENDED))
        job_id = self._session.execute(using.order_by(Job.id).limit(1)).scalar_one_or_none()
        if job_id is not None:
            raise Conflict(
                f"dataset {dataset_id} is in use: job {job_id} has not ended",
                code="dataset_in_use",
                param="dataset_id",
                hint=f"wait for it, or POST /v1/jobs/{job_id}/cancel",
            )
        dataset.status = DatasetStatus.DELETED
        dataset.report = dataset.failure = None
        dataset.files = []
        self._session.flush()

    def lock(self, owner_id: str, dataset_id: str) -> Dataset:
        """Return the owner's dataset, which nobody else changes or names in this transaction.

        Raises:
            NotFound: no such dataset, or somebody else's, or a deleted one.
        """
        self._session.get(Dataset, dataset_id, with_for_update=True, populate_existing=True)
        return self.get(owner_id, dataset_id)

    def get(self, owner_id: str, dataset_id: str, *, lock: bool = False) -> Dataset:
        """Return the owner's dataset; `lock` keeps it from being deleted in this transaction.

        Raises:
            NotFound: no such dataset, or somebody else's, or a deleted one.
        """
        dataset = (
            self._session.get(
                Dataset, dataset_id, with_for_update={"read": True}, populate_existing=True
            )
            if lock
            else self._session.get(Dataset, dataset_id)
        )
        if (
            dataset is None
            or dataset.owner_id != owner_id
            or dataset.status is DatasetStatus.DELETED
        ):
            raise NotFound(
                f"no dataset {dataset_id!r}", hint="POST /v1/datasets makes one", param="dataset_id"
            )
        return dataset

    def get_usable(self, owner_id: str, dataset_id: str, *, lock: bool = False) -> Dataset:
        """Return the owner's dataset if jobs can be made from it; `lock` as in `get`.

        Raises:
            NotFound: no such dataset.
            Conflict: it is still being validated, it is invalid, or it was a dry run.
        """
        dataset = self.get(owner_id, dataset_id, lock=lock)
        if not dataset.status.is_usable:
            raise Conflict(
                f"dataset {dataset_id} is {dataset.status.value}, expected ready",
                code="dataset_not_ready",
                param="dataset_id",
                hint=f"POST /v1/datasets/{dataset_id}/versions without dry_run"
                if dataset.status is DatasetStatus.CHECKED
                else f"read GET /v1/datasets/{dataset_id}/report",
                retryable=dataset.status is DatasetStatus.VALIDATING,
            )
        return dataset

    def page(self, owner_id: str, query: PageQuery) -> Page[Dataset]:
        """Return one page of the owner's datasets, each version a dataset of its own."""
        return fetch_page(self._session, _shown_to(owner_id), Dataset.id, query)

    def version_page(self, owner_id: str, dataset_id: str, query: PageQuery) -> Page[Dataset]:
        """Return one page of the versions of a dataset's upload, that dataset among them.

        Raises:
            NotFound: no such dataset, or somebody else's.
        """
        upload_id = self.get(owner_id, dataset_id).upload_id
        statement = _shown_to(owner_id).where(Dataset.upload_id == upload_id)
        return fetch_page(self._session, statement, Dataset.id, query)

    def load(self, dataset_id: str) -> Dataset:
        """Return a dataset for the job that works on it."""
        return self._session.get_one(Dataset, dataset_id)

    def record_source(
        self,
        upload_id: str,
        *,
        size_bytes: int | None = None,
        sha256: str | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        """Store what a source was resolved to, or what came of it, in all of its versions."""
        versions = select(Dataset).where(Dataset.upload_id == upload_id).order_by(Dataset.id)
        for dataset in self._session.execute(versions.with_for_update()).scalars():
            dataset.origin = dataset.origin if origin is None else origin
            dataset.bytes = dataset.bytes if size_bytes is None else size_bytes
            dataset.sha256 = dataset.sha256 if sha256 is None else sha256
        self._session.flush()

    def record_result(
        self,
        dataset_id: str,
        *,
        status: DatasetStatus,
        report: dict[str, Any],
        counts: dict[str, Any],
        canonical_sha256: str | None,
        failure: dict[str, Any] | None,
        files: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Store what validation found, and the files that it has published."""
        dataset = self._session.get_one(Dataset, dataset_id)
        dataset.status = status
        dataset.report = report
        dataset.counts = counts
        dataset.canonical_sha256 = canonical_sha256
        dataset.failure = failure
        dataset.files = list(files)
        if status.is_usable:
            dataset.ready_at = db_now()
        self._session.flush()


def _may_pass(dataset: Dataset) -> bool:
    """Whether a dataset is invalid for a reason that is neither in its bytes nor in its policy."""
    if dataset.status is not DatasetStatus.INVALID or dataset.failure is None:
        return False
    was_fetched = dataset.source is None or dataset.sha256 is not None
    is_of_model = dataset.failure.get("param") == "policy.model"
    return dataset.failure.get("category") not in _FOR_GOOD or is_of_model or not was_fetched


def _shown_to(owner_id: str) -> Select[Dataset]:
    """Select the owner's datasets without their reports: of a page these are many megabytes."""
    shown = Dataset.status != DatasetStatus.DELETED
    return select(Dataset).where(Dataset.owner_id == owner_id, shown).options(defer(Dataset.report))
