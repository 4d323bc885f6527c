"""Merges a published adapter into its base and publishes the full model."""

from pathlib import Path
from typing import Any

from core.errors import FailureCode, RunAborted
from core.hub import fetch
from core.ids import IdPrefix, new_id
from core.lifecycle import Phase
from core.modelref import ModelRef
from models.experiment import Checkpoint
from models.repositories.experiments import ExperimentRepository
from worker.context import JobContext
from worker.jobs.publish import publish_folder
from worker.training.export import MANIFEST, export_merged
from worker.training.folders import FolderDamaged, SealedFolder, open_sealed
from worker.training.resolve import apply_threads

_LABEL = "merged"


def run(context: JobContext) -> dict[str, Any]:
    """Do one export job; the result names the new checkpoint.

    Raises:
        RunAborted: the checkpoint is damaged or not an adapter, or its base cannot be used.
        StorageFull: the disk has no room.
        CancelRequested, Preempted: the attempt was asked to stop.
        LeaseLost: another attempt owns the job.
    """
    apply_threads(context.settings.training)
    context.plan(["draw_id", "merge"])
    done = context.step_result("merge")
    if done is not None:
        return done
    drawn = context.step_result("draw_id")
    if drawn is None:
        with context.step("draw_id") as drawn:
            drawn["checkpoint_id"] = new_id(IdPrefix.CHECKPOINT)
    source = _source(context)
    adapter = _verified(context.settings.artifact_dir / source.path)
    base = ModelRef.model_validate(adapter.manifest["base_model"])
    if base.source == "hub":
        context.phase(Phase.DOWNLOADING_MODEL)
    folder = fetch(base, context.settings)
    context.raise_if_stopped()
    context.phase(Phase.SAVING)
    with context.step("merge") as result:
        sealed = export_merged(
            folder,
            adapter.path,
            context.attempt_dir / "checkpoints" / _LABEL,
            token=f"{context.fence.attempt}-{_LABEL}",
            about={**adapter.manifest, "label": _LABEL, "merged_from": source.id},
        )
        context.raise_if_stopped()
        publish_folder(
            context,
            sealed,
            checkpoint_id=drawn["checkpoint_id"],
            kind=_LABEL,
            label=_LABEL,
            step=source.step,
            metrics=source.metrics,
        )
        result["checkpoint_id"] = drawn["checkpoint_id"]
    return dict(result)


def _source(context: JobContext) -> Checkpoint:
    with context.database.reading() as session:
        row = ExperimentRepository(session).checkpoint(
            context.job.owner_id, str(context.job.spec["checkpoint_id"])
        )
    if row.kind != "adapter":
        raise RunAborted(
            f"checkpoint {row.id} is of kind {row.kind!r}, expected an adapter to merge",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="name the checkpoint `final` or `baseline` of a fine-tuning job",
        )
    return row


def _verified(path: Path) -> SealedFolder:
    try:
        return open_sealed(path, manifest_name=MANIFEST)
    except FolderDamaged as error:
        raise RunAborted(
            f"the checkpoint does not verify: {error}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="restore the folder from a backup, or run the fine-tuning job again",
        ) from error
