"""Merges a published adapter into its base and publishes the full model; pushes to the hub."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from core.errors import FailureCode, InvalidInput, NotFound, NotPermitted, RunAborted
from core.hub import fetch
from core.hub_push import ExportOptions, PushTarget, push
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
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(context: JobContext) -> dict[str, Any]:
    """Do one export job; the result names the new checkpoint, and the hub's commit.

    Raises:
        RunAborted: the checkpoint is damaged or not an adapter, or its base cannot be used.
        StorageFull: the disk has no room.
        CancelRequested, Preempted: the attempt was asked to stop.
        LeaseLost: another attempt owns the job.
    """
    spec = context.job.spec
    names = ExportOptions.model_fields
    # A job that was retried says so in its spec.
    wanted = ExportOptions.model_validate({name: spec[name] for name in names if name in spec})
    steps = {"save": wanted.merge, "push": wanted.push_to_hub is not None}
    context.plan([name for name, is_wanted in steps.items() if is_wanted])
    made = _merge(context, wanted.dtype) if wanted.merge else {}
    if wanted.push_to_hub is None:
        return made
    pushed_id = str(made.get("checkpoint_id", spec["checkpoint_id"]))
    return {**made, "hub": _push(context, wanted.push_to_hub, pushed_id)}


def _push(context: JobContext, target: PushTarget, checkpoint_id: str) -> dict[str, Any]:
    """Push a published checkpoint; return repository, commit and address.

    Raises:
        RunAborted: the settings or the hub refuse it (`dependency_error`).
        Unavailable: the hub does not answer.
    """
    done = context.step_result("push")
    if done is not None:
        return done
    row = _row(context, checkpoint_id, wanted="one to push")
    sealed = verified(context.settings.artifact_dir / row.path, sha256=row.manifest_sha256)
    context.raise_if_stopped()
    context.phase(Phase.UPLOADING)
    with context.step("push") as result:
        message = f"kdpo checkpoint {checkpoint_id}"
        try:
            pushed = push(sealed.path, target, context.settings, message=message)
        except (InvalidInput, NotPermitted) as error:
            raise RunAborted(
                error.message, failure=FailureCode.DEPENDENCY_ERROR, hint=error.hint
            ) from error
        result.update(asdict(pushed))
    return dict(result)


def _merge(context: JobContext, dtype: str | None) -> dict[str, Any]:
    """Merge the adapter into its base and publish that; return the new checkpoint's id."""
    apply_threads(context.settings.training)
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
            dtype=None if dtype is None else _DTYPES[dtype],
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
    row = _row(context, str(context.job.spec["checkpoint_id"]), wanted=f"an adapter to {to}")
    if row.kind != "adapter":
        raise RunAborted(
            f"checkpoint {row.id} is of kind {row.kind!r}, expected an adapter to {to}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="name the checkpoint `final` or `baseline` of a fine-tuning job",
        )
    return row


def _row(context: JobContext, checkpoint_id: str, *, wanted: str) -> Checkpoint:
    """Return a checkpoint of the job's owner.

    Raises:
        RunAborted: it was deleted.
    """
    try:
        with context.database.reading() as session:
            return ExperimentRepository(session).checkpoint(context.job.owner_id, checkpoint_id)
    except NotFound as error:
        raise RunAborted(
            f"checkpoint {checkpoint_id} was deleted, expected {wanted}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="name another checkpoint, or run the fine-tuning job again",
        ) from error


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
