"""Ends what has had its time: files, uploads in parts, checkpoints, the log of webhooks."""

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from sqlalchemy.orm import Session

from core.settings import Settings
from models.repositories.checkpoints import CheckpointRepository
from models.repositories.files import FileRepository, UploadRepository
from models.repositories.webhooks import WebhookRepository
from models.session import Database
from worker.cleanup import chunks, entries, is_stale, try_to_remove

_log = logging.getLogger("kdpo.expiry")

PERIOD_S = 60.0


class Expiry:
    """One pass after the other; any number of workers may do it at once."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database

    def run(self) -> None:
        """End what is due, announce what soon will be, and remove files that nobody needs.

        Raises:
            Unavailable: the database does not answer.
        """
        with self._database.transaction() as session:
            files = FileRepository(session).expire()
            uploads = UploadRepository(session).expire()
            WebhookRepository(session).forget(older_than_days=self._settings.webhooks.keep_days)
        for what, ids in (("file", files), ("upload", uploads)):
            for one in ids:
                _log.info("%s %s has expired", what, one)
        self._end_checkpoints()
        self._remove_checkpoint_folders()
        self._remove_unknown(self._settings.file_dir, _files, also=files)
        self._remove_unknown(self._settings.part_dir, _uploads, also=uploads)

    def _end_checkpoints(self) -> None:
        days = self._settings.downloads.checkpoint_days
        with self._database.transaction() as session:
            checkpoints = CheckpointRepository(session)
            if days is not None:
                checkpoints.set_ends(days=days)
            checkpoints.warn()
            for one in checkpoints.expire():
                _log.info("checkpoint %s has expired", one)

    def _remove_checkpoint_folders(self) -> None:
        with self._database.reading() as session:
            gone = CheckpointRepository(session).gone()
        for one in gone:
            if try_to_remove(self._settings.artifact_dir / one.path):
                with self._database.transaction() as session:
                    CheckpointRepository(session).forget_folder(one.id)

    def _remove_unknown(
        self,
        folder: Path,
        known: Callable[[Session, Collection[str]], set[str]],
        *,
        also: Collection[str],
    ) -> None:
        """Remove what no row names; a name that is young may get its row any moment."""
        paths = [path for path in entries(folder) if path != self._settings.part_dir]
        for some in chunks(paths):
            with self._database.reading() as session:
                named = known(session, [path.name for path in some])
            for path in some:
                if path.name not in named and (path.name in also or is_stale(path)):
                    try_to_remove(path)


def _files(session: Session, names: Collection[str]) -> set[str]:
    return FileRepository(session).known(names)


def _uploads(session: Session, names: Collection[str]) -> set[str]:
    return UploadRepository(session).with_parts(names)
