"""What a dataset looks like from outside, and why one was refused."""

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import ConfigDict, Field, TypeAdapter

from app.deps import ID_PATTERN
from app.responses import Schema, unix
from core.data_report import PreviewPair, TokenStatistics
from core.errors import Category, ErrorDetail
from core.lifecycle import DatasetStatus
from core.run_spec import DatasetPolicy
from core.sources import DatasetSource, shown
from models.dataset import Dataset

MAX_ERRORS = 100

DatasetId = Annotated[str, Path(pattern=ID_PATTERN)]


class FailureItem(Schema):
    """One kind of fault in the rows, with its first place."""

    code: str
    detail: str
    pointer: str | None = None
    line: int | None = None
    count: int | None = None
    hint: str | None = None


class Failure(Schema):
    """Why a dataset is invalid, or why its validation is paused, as it was stored."""

    category: Category = Category.INVALID
    code: str = "dataset_invalid"
    message: str = "the dataset is invalid"
    hint: str | None = None
    param: str | None = "file"
    retryable: bool = False
    errors: tuple[FailureItem, ...] = ()

    def details(self) -> list[ErrorDetail]:
        """Return the faults for the problem body."""
        return [ErrorDetail(**item.model_dump()) for item in self.errors[:MAX_ERRORS]]


class DatasetFile(Schema):
    """A file of rows that can be downloaded."""

    path: str
    bytes: int
    sha256: str
    url: str


class DatasetView(Schema):
    """One reading of an upload under one policy."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    version: int = Field(description="counts the readings of one upload from 1")
    parent: str | None = Field(description="the dataset that this was made from as a new version")
    status: DatasetStatus
    created_at: int
    ready_at: int | None
    bytes: int | None = Field(description="of the upload; of a source, set when it was fetched")
    sha256: str | None
    source: DatasetSource | None = Field(
        description="where the server fetches it from; null of an upload"
    )
    commit: str | None = Field(description="that the revision of a hub source was resolved to")
    canonical_sha256: str | None
    policy: DatasetPolicy
    counts: dict[str, Any] | None = Field(description="rows, pairs, prompts; set when validated")
    error: Failure | None
    job_id: str
    report_url: str
    files: list[DatasetFile] = Field(description="set when validated")


class ReportView(Schema):
    """The validation report; while the dataset is validated, only its status."""

    model_config = ConfigDict(extra="allow", frozen=True)

    object: Literal["dataset.report"] = "dataset.report"
    dataset_id: str
    status: DatasetStatus
    tokens: TokenStatistics | None = Field(
        default=None, description="as the policy's model counts them; null without one"
    )
    preview: tuple[PreviewPair, ...] = ()


class RowView(Schema):
    """One line of the canonical or of the rejected rows."""

    object: Literal["dataset.row"] = "dataset.row"
    number: int = Field(description="counts from 1 in this view; the cursor of `after`")
    row: dict[str, Any]


def dataset_view(dataset: Dataset) -> DatasetView:
    """Return the view of a dataset."""
    return DatasetView(
        id=dataset.id,
        name=dataset.name,
        version=dataset.version,
        parent=dataset.parent_id,
        status=dataset.status,
        created_at=int(dataset.created_at),
        ready_at=unix(dataset.ready_at),
        bytes=dataset.bytes,
        sha256=dataset.sha256,
        source=_source_of(dataset),
        commit=None if dataset.origin is None else dataset.origin.get("commit"),
        canonical_sha256=dataset.canonical_sha256,
        policy=DatasetPolicy.model_validate(dataset.policy),
        counts=dataset.counts,
        error=failure_of(dataset),
        job_id=dataset.job_id,
        report_url=report_url(dataset.id),
        files=[
            DatasetFile(**file, url=_rows_url(dataset.id, file["path"])) for file in dataset.files
        ],
    )


def _rows_url(dataset_id: str, path: str) -> str:
    view, _, form = path.rpartition(".")
    return f"/v1/datasets/{dataset_id}/rows?view={view}&format={form}"


def _source_of(dataset: Dataset) -> DatasetSource | None:
    if dataset.source is None:
        return None
    return shown(TypeAdapter[DatasetSource](DatasetSource).validate_python(dataset.source))


def report_url(dataset_id: str) -> str:
    """Return where the report of a dataset is."""
    return f"/v1/datasets/{dataset_id}/report"


def report_view(dataset: Dataset) -> ReportView:
    """Return the stored report of a dataset."""
    stored = {
        **(dataset.report or {}),
        "dataset_id": dataset.id,
        "status": dataset.status,
        "rejected_rows_url": f"/v1/datasets/{dataset.id}/rows?view=rejected&format=jsonl",
    }
    return ReportView.model_validate(stored)


def failure_of(dataset: Dataset) -> Failure | None:
    """Return why the dataset is invalid or its validation paused, if one of these is so."""
    if dataset.failure is not None:
        return Failure.model_validate(dataset.failure)
    return Failure() if dataset.status is DatasetStatus.INVALID else None
