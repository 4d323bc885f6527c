"""Removes files that nothing needs any more; a job that has not ended is never touched.

A job publishes its checkpoints under its fence, so that when it has ended the rows name all that
stays, and no later attempt can read or add anything.
"""

import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from core.settings import Settings
from models.repositories.leftovers import MAX_IDS, LeftoverRepository
from models.session import Database
from worker.outcome import LOG_NAME, OUTCOME_NAME, TRIALS
from worker.training.entries import EntryFolder

_log = logging.getLogger("kdpo.cleanup")

PERIOD_S = 300.0
# Longer than any upload, and longer than a file may be written without a change.
STALE_S = 86_400.0
_ATTEMPT = re.compile(r"a[0-9]+")
_TEMPORARY = re.compile(r"\.tmp-.*|\..*\.tmp")


class Cleanup:
    """One pass after the other over the data folder; any number of workers may clean at once."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._uploads = settings.upload_dir
        self._artifacts = settings.artifact_dir
        self._references = EntryFolder(settings.reference_dir)
        self._database = database
        self._clean_jobs: set[str] = set()

    def run(self) -> None:
        """Remove what deleted datasets leave, attempts of ended jobs, forgotten temporary files.

        Raises:
            Unavailable: the database does not answer.
            StorageFull: the disk has no room for the lock of what a dead process has left.
        """
        self._clean_uploads()
        self._clean_datasets()
        self._clean_attempts()
        for folder in ("datasets", "datasets/*"):
            for path in self._artifacts.glob(f"{folder}/.*"):
                if _TEMPORARY.fullmatch(path.name) and is_stale(path):
                    try_to_remove(path)
        self._references.remove_leftovers()

    def _clean_uploads(self) -> None:
        """Remove uploads whose versions are all deleted, and old ones that no dataset names."""
        files = [path for path in entries(self._uploads) if path.is_file()]
        for some in chunks(files):
            with self._database.reading() as session:
                named = LeftoverRepository(session).uploads([path.name for path in some])
            for path in some:
                forgotten = path.name not in named and is_stale(path)
                if forgotten or named.get(path.name) is False:
                    try_to_remove(path)

    def _clean_datasets(self) -> None:
        """Remove the rows of deleted datasets; a deleted one never comes back."""
        folders = [path for path in entries(self._artifacts / "datasets") if path.is_dir()]
        for some in chunks(folders):
            with self._database.reading() as session:
                deleted = LeftoverRepository(session).deleted_datasets([p.name for p in some])
            for path in some:
                if path.name in deleted:
                    try_to_remove(path)

    def _clean_attempts(self) -> None:
        """Leave of the attempts of ended jobs what is published, and how each attempt ended."""
        folders = [path for path in entries(self._artifacts / "jobs") if path.is_dir()]
        unknown = [path for path in folders if path.name not in self._clean_jobs]
        for some in chunks(unknown):
            with self._database.reading() as session:
                leftovers = LeftoverRepository(session)
                # First who has ended: a job that ends after this is left for the next pass.
                ended = leftovers.ended_jobs([path.name for path in some])
                published = leftovers.checkpoint_paths(ended)
            kept = {self._artifacts / path for path in published}
            for job in some:
                if job.name in ended and _strip_job(job, kept):
                    self._clean_jobs.add(job.name)


def _strip_job(job: Path, published: set[Path]) -> bool:
    """Strip all attempts of a job and its trials; return whether nothing is left to remove."""
    done = try_to_remove(job / TRIALS) if (job / TRIALS).is_dir() else True
    for attempt in entries(job):
        if _ATTEMPT.fullmatch(attempt.name) and attempt.is_dir() and not attempt.is_symlink():
            kept = published | {attempt / LOG_NAME, attempt / OUTCOME_NAME}
            done = _strip(attempt, kept) and done
    return done


def _strip(folder: Path, kept: set[Path]) -> bool:
    done = True
    for path in entries(folder):
        if path in kept:
            continue
        if not path.is_symlink() and any(path in one.parents for one in kept):
            done = _strip(path, kept) and done
        else:
            done = try_to_remove(path) and done
    return done


def try_to_remove(path: Path) -> bool:
    """Remove a file or a folder; what cannot be removed is met again in the next pass."""
    try:
        with suppress(FileNotFoundError):  # another worker cleans, too
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        _log.warning("%s cannot be removed: %s", path, error.strerror)
        return False
    return True


def is_stale(path: Path) -> bool:
    """Whether nothing was written to it for a day."""
    try:
        return time.time() - path.lstat().st_mtime > STALE_S
    except FileNotFoundError:
        return False


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing when there is none."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def chunks(paths: list[Path]) -> Iterator[list[Path]]:
    """Return as many paths at a time as one query takes."""
    return (paths[start : start + MAX_IDS] for start in range(0, len(paths), MAX_IDS))
