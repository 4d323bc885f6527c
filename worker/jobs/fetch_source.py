"""Brings the source of a dataset to where an upload would be: once, pinned, and under the fence."""

import time
from collections.abc import Callable
from dataclasses import asdict
from io import BufferedRandom
from pathlib import Path
from typing import Any, assert_never

from pydantic import TypeAdapter

from core.errors import (
    CancelRequested,
    InvalidInput,
    KdpoError,
    NotPermitted,
    TooLarge,
    UnsupportedMedia,
)
from core.lifecycle import Phase
from core.sources import (
    DatasetSource,
    HttpsSource,
    HuggingFaceSource,
    PathSource,
    check_source,
    shown,
)
from models.dataset import Dataset
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import JobRepository
from worker.context import JobContext
from worker.ingest.files import file_sha256, sync_folder
from worker.ingest.sources.assembly import (
    Gauge,
    Limits,
    Piece,
    as_tar,
    assemble,
    check_sha256,
    sole_writer,
)
from worker.ingest.sources.https import HttpsFile
from worker.ingest.sources.hub import HubPin, HubRemote, pin
from worker.ingest.sources.local import LocalFile

# What trying again cannot change: the dataset is invalid then, and the job has done its work.
REFUSALS = (InvalidInput, NotPermitted, TooLarge, UnsupportedMedia)
_MAX_FILES_SHOWN = 100
_ADAPTER: TypeAdapter[DatasetSource] = TypeAdapter(DatasetSource)


def fetch(context: JobContext, dataset: Dataset) -> None:
    """Bring the source of a dataset to its upload's place; nothing to do when it is there.

    What it was resolved to is stored first, so that every attempt and every version reads the same.
    What has arrived is kept for the next attempt, unless there is to be none.

    Raises:
        InvalidInput, NotPermitted, TooLarge, UnsupportedMedia: the source cannot be had.
        Unavailable: it cannot be had now.
        StorageFull: the disk has no room.
        CancelRequested, Preempted, LeaseLost: as everywhere.
    """
    place = context.settings.upload_dir / dataset.upload_id
    if _adopted(context, dataset, place):
        return
    part = place.with_name(f".{place.name}.part")
    context.phase(Phase.DOWNLOADING_DATA)
    with sole_writer(part, on_wait=_listener(context)) as file:
        # Of two versions that want it at once, the one that came first has brought it.
        if _adopted(context, dataset, place):
            part.unlink(missing_ok=True)
            return
        try:
            size_bytes, sha256 = _bring(context, dataset, file, folder=part.parent)
        except (*REFUSALS, CancelRequested):
            part.unlink(missing_ok=True)
            raise

        def into_place() -> None:
            part.replace(place)
            sync_folder(place.parent)

        _record(context, dataset, size_bytes=size_bytes, sha256=sha256, before=into_place)


def source_report(dataset: Dataset) -> dict[str, Any]:
    """Return what was asked for and what it was resolved to, as the report shows it."""
    source = _ADAPTER.validate_python(dataset.source)
    found: dict[str, Any] = shown(source).model_dump(mode="json", exclude_none=True)
    if isinstance(source, HuggingFaceSource) and dataset.origin is not None:
        pinned = HubPin.from_json(dataset.origin)
        found |= {
            "commit": pinned.commit,
            "config": pinned.config,
            "split": pinned.split,
            "num_files": len(pinned.files),
            "files": [
                {"path": file.path, "bytes": file.size, "sha256": file.sha256}
                for file in pinned.files[:_MAX_FILES_SHOWN]
            ],
            "ignored_files": list(pinned.ignored[:_MAX_FILES_SHOWN]),
        }
    return found | {"bytes": dataset.bytes, "sha256": dataset.sha256}


def _adopted(context: JobContext, dataset: Dataset, place: Path) -> bool:
    """Whether the source has been brought already; this version then knows of it, too."""
    if not place.is_file():
        return False
    first = _first_version(context, dataset)
    size_bytes, sha256 = first.bytes, first.sha256
    if sha256 is None:
        # It is whole, or it would not be in its place; whoever put it there has not committed yet,
        # or died before.
        size_bytes, sha256 = place.stat().st_size, file_sha256(place)
    _record(context, dataset, size_bytes=size_bytes, sha256=sha256, origin=first.origin)
    return True


def _bring(
    context: JobContext, dataset: Dataset, file: BufferedRandom, *, folder: Path
) -> tuple[int, str]:
    """Complete the file with what the source has; return its size and SHA-256."""
    source = _ADAPTER.validate_python(dataset.source)
    check_source(source, context.settings)
    origin = _first_version(context, dataset).origin or {}
    pieces = _pieces(context, dataset, source, origin)
    size_bytes, sha256 = assemble(pieces, file, folder=folder, gauge=_gauge(context))
    if isinstance(source, HttpsSource):
        check_sha256(sha256, source.sha256)
    if size_bytes == 0:
        raise InvalidInput(
            "the source is empty", code="empty_file", param="source",
            hint="name a file with preference pairs",
        )  # fmt: skip
    return size_bytes, sha256


def _pieces(
    context: JobContext, dataset: Dataset, source: DatasetSource, origin: dict[str, Any]
) -> list[Piece]:
    """Return what the upload is put together from; several files become one tar."""
    settings = context.settings
    match source:
        case HuggingFaceSource():
            pinned = HubPin.from_json(origin) if origin else pin(source, settings)
            if not origin:
                _record(context, dataset, origin=asdict(pinned))
            files = [
                (file.path, HubRemote(source, pinned.commit, file, settings))
                for file in pinned.files
            ]
            return [files[0][1]] if len(files) == 1 else as_tar(files)
        case HttpsSource():
            return [
                HttpsFile(
                    source, settings, etag=origin.get("etag"), size=origin.get("bytes"),
                    on_told=lambda etag, size: _record(
                        context, dataset, origin={"etag": etag, "bytes": size}
                    ),
                )
            ]  # fmt: skip
        case PathSource():
            return [LocalFile(source, settings.sources.paths)]
        case _:
            assert_never(source)


def _gauge(context: JobContext) -> Gauge:
    settings = context.settings
    limits = Limits(
        # No file that is accepted is larger than what it expands to.
        max_bytes=min(settings.sources.max_bytes, settings.data.max_decompressed_bytes),
        deadline_s=settings.sources.deadline_s,
    )
    return Gauge(limits, _reporter(context))


def _reporter(context: JobContext) -> Callable[[int, int | None], None]:
    """Return what shows the progress, and ends the attempt when it is to stop."""
    asked_at = float("-inf")

    def on_bytes(done: int, total: int | None) -> None:
        nonlocal asked_at
        # Without a total every report would be a last one, which is always written.
        now = time.monotonic()
        if done == total or now - asked_at >= context.settings.training.progress_every_s:
            asked_at = now
            context.progress(
                unit="bytes", done=done, total=total or done, overall=None if total else 0.0
            )
        context.raise_if_stopped()

    return on_bytes


def _listener(context: JobContext) -> Callable[[], None]:
    """Return what notices, while another process brings the source, that this job is to stop."""
    report = _reporter(context)
    return lambda: report(0, None)


def _first_version(context: JobContext, dataset: Dataset) -> Dataset:
    """Return the row that knows how far the fetching has come."""
    with context.database.reading() as session:
        return DatasetRepository(session).load(dataset.upload_id)


def _record(
    context: JobContext,
    dataset: Dataset,
    *,
    before: Callable[[], None] | None = None,
    **values: Any,
) -> None:
    """Store what is known of the source, in all versions; an attempt that lost its job does not."""
    with context.transaction() as session:
        JobRepository(session).guard(context.fence)
        if before is not None:
            before()
        DatasetRepository(session).record_source(dataset.upload_id, **values)


def refused(error: KdpoError) -> dict[str, Any]:
    """Return the failure of a dataset whose source cannot be had."""
    return {
        "category": error.category.value,
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "param": error.param or "source",
        "errors": [asdict(detail) for detail in error.errors],
    }
