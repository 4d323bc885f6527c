"""What a checkpoint looks like from outside."""

from typing import Any, Literal

from app.responses import Schema
from models.experiment import Checkpoint


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
    label: str
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
        label=row.label,
        step=row.step,
        bytes=row.bytes,
        num_files=len(row.files),
        manifest_sha256=row.manifest_sha256,
        files_url=f"/v1/checkpoints/{row.id}/files",
    )
