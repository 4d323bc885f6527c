"""Losses of all validation pairs under each trial, by which trials are compared pair by pair."""

from pathlib import Path
from typing import Any

import orjson

from core.search_files import groups_file, losses_file
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.ingest.files import atomic_writer, full_disk_as_error
from worker.jobs.workbench import Workbench
from worker.training.evaluate import Floats, pair_groups


def losses_path(context: JobContext, number: int, rung: int) -> Path:
    """Where the losses of a trial at a rung are kept."""
    return losses_file(context.trials_dir, number, rung)


def write_losses(context: JobContext, number: int, rung: int, losses: Floats) -> None:
    """Keep the losses of all validation pairs under a trial at a rung."""
    _write(losses_path(context, number, rung), losses.tolist())


def write_groups(bench: Workbench) -> None:
    """Keep the number of each validation pair's prompt, once for all trials of the search."""
    path = groups_file(bench.context.trials_dir)
    if not path.is_file():
        _write(path, pair_groups(bench.pairs[Split.VALIDATION]).tolist())


def _write(path: Path, values: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_as_error(path.parent), atomic_writer(path) as file:
        file.write(orjson.dumps(values))
