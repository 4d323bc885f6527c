"""Making a sealed folder visible as a checkpoint, once."""

import shutil
from typing import Any

from models.repositories.experiments import ExperimentRepository
from worker.context import JobContext
from worker.training.folders import SealedFolder


def publish_folder(
    context: JobContext,
    sealed: SealedFolder,
    *,
    checkpoint_id: str,
    kind: str,
    label: str,
    step: int,
    metrics: dict[str, Any],
) -> None:
    """Record the folder under the fence; a folder that an earlier attempt recorded stays.

    Raises:
        LeaseLost: another attempt owns the job.
    """
    path = str(sealed.path.relative_to(context.settings.artifact_dir))
    with context.transaction() as session:
        row = ExperimentRepository(session).publish_checkpoint(
            context.fence,
            owner_id=context.job.owner_id,
            checkpoint_id=checkpoint_id,
            kind=kind,
            label=label,
            step=step,
            path=path,
            files=sealed.all_files,
            manifest_sha256=sealed.sha256,
            size_bytes=sealed.size_bytes,
            metrics=metrics,
        )
    if row.path != path:
        shutil.rmtree(sealed.path)
