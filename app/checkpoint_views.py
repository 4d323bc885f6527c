"""What a checkpoint looks like from outside."""

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import Field

from app.deps import ID_PATTERN
from app.downloads import StoredFile
from app.responses import Schema, unix
from core.errors import NotFound
from core.settings import Settings
from models.experiment import Checkpoint

CheckpointId = Annotated[str, Path(pattern=ID_PATTERN)]
FilePath = Annotated[str, Path(max_length=512)]


class CheckpointView(Schema):
    """OpenAI's `fine_tuning.job.checkpoint` and what kdpo adds to it."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]
    job_id: str
    attempt: int
    kind: str
    label: str = Field(description="the owner's; without one what the job calls it")
    role: str = Field(description="what the job calls it: final, baseline, merged")
    pinned: bool = Field(description="a pinned one never expires")
    expires_at: int | None
    step: int
    bytes: int
    num_files: int
    manifest_sha256: str
    files_url: str


class FileView(Schema):
    """One file of a checkpoint."""

    object: Literal["checkpoint.file"] = "checkpoint.file"
    path: str
    bytes: int
    sha256: str
    url: str


def checkpoint_view(row: Checkpoint) -> CheckpointView:
    """Return the view of a checkpoint."""
    return CheckpointView(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuning_job_id=row.job_id,
        fine_tuned_model_checkpoint=row.id,
        step_number=row.step,
        metrics=row.metrics,
        job_id=row.job_id,
        attempt=row.attempt,
        kind=row.kind,
        label=row.title or row.label,
        role=row.label,
        pinned=row.pinned,
        expires_at=unix(row.expires_at),
        step=row.step,
        bytes=row.bytes,
        num_files=len(row.files),
        manifest_sha256=row.manifest_sha256,
        files_url=f"/v1/checkpoints/{row.id}/files",
    )


def stored_files(row: Checkpoint, settings: Settings) -> list[StoredFile]:
    """Return the files of a checkpoint as they lie on the disk."""
    folder = settings.artifact_dir / row.path
    return [
        StoredFile(folder, str(file["path"]), int(file["bytes"]), str(file["sha256"]))
        for file in row.files
    ]


def stored_file(row: Checkpoint, path: str, settings: Settings) -> StoredFile:
    """Return one file of a checkpoint.

    Raises:
        NotFound: it has no such file.
    """
    for file in stored_files(row, settings):
        if file.path == path:
            return file
    raise NotFound(
        f"checkpoint {row.id} has no file {path!r}",
        hint=f"GET /v1/checkpoints/{row.id}/files lists them",
    )
