"""Keeps received files under their ids, and makes datasets of those that are for training."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from app.dataset_uploads import store_upload
from app.uploads import FULL_ERRORS, PART_SUFFIX, Upload, create_private, no_room, publish, sync
from core.files import FilePurpose
from core.ids import IdPrefix, new_id
from core.settings import MIB, Settings
from models.file import StoredFileRow
from models.repositories.files import FileRepository, UploadRepository
from models.session import Database


@dataclass(frozen=True)
class Received:
    """Bytes that lie under the id of the file that they will be."""

    path: Path
    size_bytes: int
    sha256: str
    md5: str | None = None


@dataclass(frozen=True)
class NewFile:
    """What a request says about a file; `upload_id` is of the parts that it is made of."""

    owner_id: str
    filename: str
    purpose: FilePurpose
    ttl_s: int | None
    upload_id: str | None = None


@contextmanager
def storing(
    database: Database, settings: Settings, received: Received, new: NewFile
) -> Iterator[tuple[Session, StoredFileRow]]:
    """Give the file's row in a transaction that ends with the block; leave nothing if it raises.

    The dataset's upload is a second name of the same bytes, so that either can be deleted alone.

    Raises:
        UnsupportedMedia: a file for training begins like something that is not read.
        Conflict: its upload was completed or cancelled meanwhile.
    """
    names = [received.path]
    try:
        dataset_id = new_id(IdPrefix.DATASET) if new.purpose.makes_dataset else None
        if dataset_id is not None:
            names.append(settings.upload_dir / dataset_id)
            link(received.path, names[-1])
        with database.transaction() as session:
            if new.upload_id is not None:
                # The file takes the room of its parts.
                uploads = UploadRepository(session)
                uploads.forget_parts(uploads.pending(new.owner_id, new.upload_id).id)
            if dataset_id is not None:
                upload = Upload(
                    names[-1], received.size_bytes, received.sha256, new.filename[:200], {}
                )
                store_upload(session, upload, dataset_id=dataset_id, owner_id=new.owner_id)
            row = FileRepository(session).create(
                file_id=received.path.name,
                owner_id=new.owner_id,
                filename=new.filename,
                purpose=new.purpose,
                size_bytes=received.size_bytes,
                sha256=received.sha256,
                dataset_id=dataset_id,
                ttl_s=new.ttl_s,
            )
            yield session, row
    except BaseException:
        for path in names:
            path.unlink(missing_ok=True)
        raise


def join_parts(parts: Sequence[Path], target: Path) -> Received:
    """Write parts one behind the other to a new file, and hash it.

    Raises:
        StorageFull: the disk has no room.
        FileNotFoundError: a part is not there any more.
    """
    temporary = target.with_name(f".{target.name}{PART_SUFFIX}")
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    size = 0
    try:
        with create_private(temporary) as joined:
            for path in parts:
                with path.open("rb") as part:
                    while block := part.read(MIB):
                        joined.write(block)
                        sha256.update(block)
                        md5.update(block)
                        size += len(block)
            sync(joined)
        publish(temporary, target)
    except OSError as error:
        if error.errno not in FULL_ERRORS:
            raise
        raise no_room() from error
    finally:
        temporary.unlink(missing_ok=True)
    return Received(target, size, sha256.hexdigest(), md5.hexdigest())


def link(path: Path, name: Path) -> None:
    """Give the bytes of a file a second name; either can be deleted alone.

    Raises:
        StorageFull: the disk has no room.
        FileNotFoundError: the file is not there any more.
    """
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno in FULL_ERRORS:
            raise no_room() from error
        # A file system without hard links: the bytes are kept twice.
        shutil.copyfile(path, name)
        name.chmod(0o600)
