"""What files and uploads look like from outside: OpenAI's objects and what kdpo adds."""

from typing import Annotated, Literal

from fastapi import Path
from pydantic import Field

from app.deps import ID_PATTERN
from app.responses import Schema, unix
from core.files import FilePurpose, UploadStatus
from core.lifecycle import DatasetStatus
from core.spec import SpecModel
from models.dataset import Dataset
from models.file import StoredFileRow, UploadPart, UploadSession

HOUR_S = 3600
MONTH_S = 30 * 24 * HOUR_S

FileId = Annotated[str, Path(pattern=ID_PATTERN)]
UploadId = Annotated[str, Path(pattern=ID_PATTERN)]


class ExpiresAfter(SpecModel):
    """When a file expires, counted from when it was made."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=HOUR_S, le=MONTH_S)


class FileView(Schema):
    """OpenAI's `file`; `status` says what became of the dataset that was made of it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: FilePurpose
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    sha256: str
    dataset_id: str | None = Field(description="made of files for training")


class FileDeleted(Schema):
    """The answer to a deletion, as OpenAI has it."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadView(Schema):
    """OpenAI's `upload`."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: FilePurpose
    status: UploadStatus
    file: FileView | None


class PartView(Schema):
    """OpenAI's `upload.part`, with what is needed to go on with an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int
    sha256: str


def file_view(row: StoredFileRow, dataset: Dataset | None) -> FileView:
    """Return the view of a file and of what was made of it."""
    status, details = _status(row, dataset)
    return FileView(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=unix(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
        status=status,
        status_details=details,
        sha256=row.sha256,
        dataset_id=row.dataset_id,
    )


def _status(
    row: StoredFileRow, dataset: Dataset | None
) -> tuple[Literal["uploaded", "processed", "error"], str | None]:
    if row.dataset_id is None:
        return "processed", None
    if dataset is None or dataset.status is DatasetStatus.DELETED:
        return "error", "the dataset that was made of it has been deleted"
    if dataset.status is DatasetStatus.VALIDATING:
        return "uploaded", None
    if dataset.status is DatasetStatus.INVALID:
        message = (dataset.failure or {}).get("message") or "the dataset is invalid"
        return "error", f"{message}; read GET /v1/datasets/{dataset.id}/report"
    return "processed", None


def upload_view(row: UploadSession, file: FileView | None) -> UploadView:
    """Return the view of an upload and, when it is complete, of its file."""
    return UploadView(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=int(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,
        file=file,
    )


def part_view(row: UploadPart) -> PartView:
    """Return the view of a part."""
    return PartView(
        id=row.id,
        created_at=int(row.created_at),
        upload_id=row.upload_id,
        bytes=row.bytes,
        sha256=row.sha256,
    )
