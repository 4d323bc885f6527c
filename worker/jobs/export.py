"""Merges a published adapter into its base and publishes the full model."""

from pathlib import Path
from typing import Any

from core.errors import FailureCode, NotFound, RunAborted
from core.hub import fetch
from core.ids import ULID_LENGTH, IdPrefix
from core.lifecycle import Phase
from core.modelref import ModelRef
from models.experiment import Checkpoint
from models.repositories.experiments import ExperimentRepository
from worker.context import JobContext
from worker.jobs.publish import publish_folder
from worker.training.export import MANIFEST, export_merged
from worker.training.folders import FolderDamaged, SealedFolder, open_sealed
from worker.training.reference import model_hashes
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
    context.plan(["save"])
    done = context.step_result("save")
    if done is not None:
        return done
    # A job exports one checkpoint, so its id follows from the job's: attempts agree on it.
    checkpoint_id = IdPrefix.CHECKPOINT + context.fence.job_id[-ULID_LENGTH:]
    source = adapter_row(context, to="merge")
    adapter = verified(context.settings.artifact_dir / source.path, sha256=source.manifest_sha256)
    base = ModelRef.model_validate(adapter.manifest["base_model"])
    if base.source == "hub":
        context.phase(Phase.DOWNLOADING_MODEL)
    folder = fetch(base, context.settings)
    check_base(folder, adapter.manifest)
    context.raise_if_stopped()
    context.phase(Phase.SAVING)
    with context.step("save") as result:
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
            checkpoint_id=checkpoint_id,
            kind=_LABEL,
            label=_LABEL,
            step=source.step,
            metrics=source.metrics,
        )
        result["checkpoint_id"] = checkpoint_id
    return dict(result)


def adapter_row(context: JobContext, *, to: str) -> Checkpoint:
    """Return the adapter that the job names.

    Raises:
        RunAborted: it is no adapter, or was deleted.
    """
    named = str(context.job.spec["checkpoint_id"])
    try:
        with context.database.reading() as session:
            row = ExperimentRepository(session).checkpoint(context.job.owner_id, named)
    except NotFound as error:
        raise RunAborted(
            f"checkpoint {named} was deleted, expected an adapter to {to}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="name another checkpoint, or run the fine-tuning job again",
        ) from error
    if row.kind != "adapter":
        raise RunAborted(
            f"checkpoint {row.id} is of kind {row.kind!r}, expected an adapter to {to}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="name the checkpoint `final` or `baseline` of a fine-tuning job",
        )
    return row


def check_base(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a base that is not the one that the adapter was trained on, by content."""
    for name, value in model_hashes(folder).items():
        trained_on = manifest.get(name)
        if trained_on is None:
            raise RunAborted(
                f"the checkpoint's {MANIFEST} has no {name}, expected the hash of the base that it "
                f"was trained on; the base in {folder} has {value}",
                failure=FailureCode.CHECKPOINT_CORRUPT,
                hint="run the fine-tuning job again: its checkpoint says which base it needs",
            )
        if value != trained_on:
            raise RunAborted(
                f"the base in {folder} has {name} {value}, trained on was {trained_on}",
                failure=FailureCode.CHECKPOINT_CORRUPT,
                hint="put the base model of the training back, or run the fine-tuning job again",
            )


def verified(path: Path, *, sha256: str) -> SealedFolder:
    """Open a published folder, all of its files checked.

    Raises:
        RunAborted: it is damaged (`checkpoint_corrupt`).
    """
    try:
        return open_sealed(path, manifest_name=MANIFEST, sha256=sha256)
    except FolderDamaged as error:
        raise RunAborted(
            f"the checkpoint does not verify: {error}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="restore the folder from a backup, or run the fine-tuning job again",
        ) from error
