"""Turns an upload into a dataset, or says why it cannot be one.

An invalid dataset is a job that succeeded: it found out what it was asked to.
"""

import os
import shutil
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from core.errors import (
    FailureCode,
    InvalidInput,
    KdpoError,
    NotPermitted,
    RunAborted,
    TooLarge,
)
from core.lifecycle import DatasetStatus, Phase
from core.run_spec import DatasetPolicy
from core.settings import DataLimits
from models.dataset import Dataset
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import JobRepository
from models.repositories.quotas import QuotaName, QuotaRepository
from worker.context import JobContext
from worker.ingest.files import file_sha256, full_disk_as_error, sync_folder
from worker.ingest.limits import apply_process_limits, mapped_bytes
from worker.ingest.pipeline import CANONICAL_NAME, PARQUET_NAME, IngestResult, ingest
from worker.ingest.preview import PairObserver

_FOLDER = "dataset"


@dataclass(frozen=True)
class _Finding:
    """What goes into the dataset's row."""

    status: DatasetStatus
    report: dict[str, Any]
    counts: dict[str, Any]
    canonical_sha256: str | None
    failure: dict[str, Any] | None
    files: tuple[dict[str, Any], ...] = ()


class _Sample(PairObserver, Protocol):
    """Looks at the pairs with a model's tokenizer."""

    def added_to(self, result: IngestResult) -> IngestResult:
        """Return the result with what was seen in its report."""


def run(context: JobContext) -> dict[str, Any]:
    """Validate the upload of the job's dataset, or its source, and store what was found.

    The upload stays, for other versions of the dataset, until all of them are deleted.

    Raises:
        RunAborted: the upload is not there.
        Unavailable: the source cannot be fetched now.
        StorageFull: the disk has no room for the converted rows.
        CancelRequested: the user cancelled the job.
        Preempted: the worker is shutting down.
        LeaseLost: another attempt owns the job.
    """
    dataset = _load(context)
    source = context.settings.upload_dir / dataset.upload_id
    if dataset.status is DatasetStatus.VALIDATING:
        finding = (
            _examine(context, dataset, source)
            if dataset.source is None
            else _examine_source(context, dataset, source)
        )
        _publish(context, dataset.id, finding)
        dataset = _load(context)
    return {"dataset_id": dataset.id, "status": dataset.status.value, "counts": dataset.counts}


def _load(context: JobContext) -> Dataset:
    with context.database.reading() as session:
        return DatasetRepository(session).load(str(context.job.dataset_id))


def _examine_source(context: JobContext, dataset: Dataset, place: Path) -> _Finding:
    """Fetch, then parse; a source that cannot be had is an invalid dataset."""
    # An upload must not load the hub's client.
    from worker.jobs.fetch_source import REFUSALS, fetch, refused, source_report

    try:
        fetch(context, dataset)
    except REFUSALS as error:
        return _Finding(
            status=DatasetStatus.INVALID, report={"source": source_report(_load(context))},
            counts={}, canonical_sha256=None, failure=refused(error),
        )  # fmt: skip
    dataset = _load(context)
    finding = _examine(context, dataset, place)
    return replace(finding, report={**finding.report, "source": source_report(dataset)})


def _limits(context: JobContext) -> DataLimits:
    """Return the limits of the server, with fewer rows where the owner may have fewer."""
    limits = context.settings.data
    with context.database.reading() as session:
        rows = QuotaRepository(session).limit(context.job.owner_id, QuotaName.DATASET_ROWS)
    return (
        limits
        if rows is None
        else limits.model_copy(update={"max_rows": min(limits.max_rows, max(rows, 1))})
    )


def _examine(context: JobContext, dataset: Dataset, source: Path) -> _Finding:
    """Parse in a folder that only this attempt writes to."""
    if not source.is_file():
        raise RunAborted(
            f"the upload of dataset {dataset.id} is not on this server",
            failure=FailureCode.DATASET_INVALID,
            hint="upload it again; API and workers must share one data folder",
        )
    context.phase(Phase.CONVERTING)
    limits = _limits(context)

    def on_progress(done: int, total: int) -> None:
        context.progress(unit="bytes", done=done, total=total)
        context.raise_if_stopped()

    policy = DatasetPolicy.model_validate(dataset.policy)
    try:
        sample = None if policy.model is None else _token_sample(policy, context)
    except (InvalidInput, NotPermitted) as error:
        return _without_model(error)
    try:
        # A tokenizer comes with torch, whose CUDA libraries alone take more than parsing may.
        _limit_this_process(limits, beside_bytes=0 if sample is None else mapped_bytes())
        result = ingest(
            source,
            out_dir=context.attempt_dir / _FOLDER,
            dataset_id=dataset.id,
            policy=policy,
            limits=limits,
            on_progress=on_progress,
            observer=sample,
        )
        files = _finished_files(context)
    except (MemoryError, TooLarge) as error:
        # What was written so far is of no dataset: nothing names it, so nothing would remove it.
        shutil.rmtree(context.attempt_dir / _FOLDER, ignore_errors=True)
        return _beyond_limits(error, limits)
    if sample is not None:
        result = sample.added_to(result)
    return replace(_finding_of(result), files=files)


def _token_sample(policy: DatasetPolicy, context: JobContext) -> _Sample:
    # A dataset job without a model must not load transformers, which loads torch.
    from worker.jobs.dataset_tokens import open_sample

    return open_sample(policy, context.settings)


def _without_model(error: KdpoError) -> _Finding:
    """The upload stays: another version can name another model."""
    return _Finding(
        status=DatasetStatus.INVALID, report={}, counts={}, canonical_sha256=None,
        failure={**_failure(error), "param": "policy.model"},
    )  # fmt: skip


def _finished_files(context: JobContext) -> tuple[dict[str, Any], ...]:
    """Write the rows as a table, too; return what there is to publish."""
    folder = context.attempt_dir / _FOLDER
    if (folder / CANONICAL_NAME).is_file():
        # A dry run and an invalid upload must not load Arrow.
        from worker.ingest.table_form import write_parquet

        with full_disk_as_error(folder):
            write_parquet(
                folder / CANONICAL_NAME, folder / PARQUET_NAME, on_part=context.raise_if_stopped
            )
    return published_files(folder)


def published_files(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return path, bytes and SHA-256 of every file of a folder."""
    return tuple(_file(path) for path in sorted(folder.iterdir()))


def _file(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _limit_this_process(limits: DataLimits, *, beside_bytes: int) -> None:
    def on_cpu_limit(_number: int, _frame: FrameType | None) -> None:
        raise TooLarge(
            f"parsing took more than {limits.parser_cpu_s} s of processor time",
            hint="upload a smaller file, or raise KDPO_DATA__PARSER_CPU_S",
            param="file",
        )

    signal.signal(signal.SIGXCPU, on_cpu_limit)
    apply_process_limits(limits, beside_bytes=beside_bytes)


def _finding_of(result: IngestResult) -> _Finding:
    return _Finding(
        status=result.status,
        report=result.report,
        counts={
            "rows": result.num_rows,
            "rejected": result.num_rejected,
            "pairs": result.num_pairs,
            "prompts": result.num_prompts,
        },
        canonical_sha256=result.canonical_sha256,
        failure=None if result.failure is None else _failure(result.failure),
    )


def _beyond_limits(error: MemoryError | TooLarge, limits: DataLimits) -> _Finding:
    if isinstance(error, MemoryError):
        error = TooLarge(
            f"parsing needs more than {limits.parser_memory_bytes} bytes of memory",
            hint="upload a smaller file, or raise KDPO_DATA__PARSER_MEMORY_BYTES",
            param="file",
        )
    return _Finding(
        status=DatasetStatus.INVALID, report={}, counts={}, canonical_sha256=None,
        failure=_failure(error),
    )  # fmt: skip


def _failure(error: KdpoError) -> dict[str, Any]:
    return {
        "category": error.category.value,
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "errors": [asdict(detail) for detail in error.errors],
    }


def _publish(context: JobContext, dataset_id: str, finding: _Finding) -> None:
    """Move the files to their place and store the finding, under the fence.

    The renames happen while the job's row is locked: an attempt that lost its lease cannot pass
    the guard, so it never replaces the files of the one that owns the job.
    """
    made = context.attempt_dir / _FOLDER
    place = context.settings.artifact_dir / "datasets" / dataset_id
    place.mkdir(parents=True, exist_ok=True)
    with context.transaction() as session:
        JobRepository(session).guard(context.fence)
        for file in sorted(made.iterdir()) if made.is_dir() else ():
            os.replace(file, place / file.name)
        # Before the row says that they are there.
        sync_folder(place)
        sync_folder(place.parent)
        DatasetRepository(session).record_result(dataset_id, **vars(finding))
    shutil.rmtree(made, ignore_errors=True)
