"""Files, and uploads that come in parts."""

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.orm import Session, defer

from core.errors import Conflict, NotFound
from core.files import FilePurpose, UploadStatus
from core.ids import IdPrefix, new_id
from models.dataset import Dataset
from models.file import StoredFileRow, UploadPart, UploadSession
from models.repositories.datasets import DatasetRepository
from models.repositories.paging import Page, PageQuery, fetch_page
from models.repositories.quotas import QuotaRepository
from models.types import db_now


class FileRepository:
    """Reads and writes of files in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(
        self,
        *,
        file_id: str,
        owner_id: str,
        filename: str,
        purpose: FilePurpose,
        size_bytes: int,
        sha256: str,
        dataset_id: str | None,
        ttl_s: int | None,
    ) -> StoredFileRow:
        """Insert a file that lies under its id; with `ttl_s` it expires so long from now.

        Raises:
            QuotaExceeded: the owner may not upload or store so much.
        """
        if dataset_id is None:
            QuotaRepository(self._session).admit_bytes(owner_id, size_bytes)
        row = StoredFileRow(
            id=file_id,
            owner_id=owner_id,
            filename=filename,
            purpose=purpose,
            bytes=size_bytes,
            sha256=sha256,
            dataset_id=dataset_id,
            expires_at=None if ttl_s is None else db_now() + ttl_s,
        )
        self._session.add(row)
        self._session.flush()
        self._session.refresh(row)
        return row

    def get(self, owner_id: str, file_id: str, *, lock: bool = False) -> StoredFileRow:
        """Return the owner's file; `lock` keeps it from being deleted in this transaction.

        Raises:
            NotFound: no such file, or somebody else's, or it has expired.
        """
        found = select(StoredFileRow).where(
            StoredFileRow.id == file_id, StoredFileRow.owner_id == owner_id, _alive()
        )
        if lock:
            found = found.with_for_update()
        row = self._session.execute(found).scalar_one_or_none()
        if row is None:
            raise NotFound(
                f"no file {file_id!r}", hint="GET /v1/files lists your files", param="file_id"
            )
        return row

    def dataset_id(self, owner_id: str, name: str, *, param: str = "dataset_id") -> str:
        """Return the dataset that a request names by its own id or by that of its file.

        Raises:
            NotFound: no such file.
            Conflict: no dataset was made of the file.
        """
        if not name.startswith(IdPrefix.FILE.value):
            return name
        row = self.get(owner_id, name)
        if row.dataset_id is None:
            raise Conflict(
                f"file {name} has the purpose {row.purpose.value!r}, of which no dataset is made",
                code="file_not_dataset",
                param=param,
                hint="upload it with the purpose fine-tune",
            )
        return row.dataset_id

    def page(
        self, owner_id: str, query: PageQuery, *, purpose: FilePurpose | None = None
    ) -> Page[StoredFileRow]:
        """Return one page of the owner's files."""
        statement = select(StoredFileRow).where(StoredFileRow.owner_id == owner_id, _alive())
        if purpose is not None:
            statement = statement.where(StoredFileRow.purpose == purpose)
        return fetch_page(self._session, statement, StoredFileRow.id, query)

    def datasets_of(self, files: Sequence[StoredFileRow]) -> dict[str, Dataset]:
        """Return the datasets of files by the id of the dataset."""
        ids = [row.dataset_id for row in files if row.dataset_id is not None]
        found = select(Dataset).where(Dataset.id.in_(ids)).options(defer(Dataset.report))
        return {row.id: row for row in self._session.execute(found).scalars()}

    def delete(self, owner_id: str, file_id: str) -> None:
        """Forget a file and the dataset that was made of it; versions of that one stay.

        Raises:
            NotFound: no such file.
            Conflict: a job that has not ended names the dataset.
        """
        self._drop(self.get(owner_id, file_id, lock=True))

    def expire(self, *, limit: int = 100) -> list[str]:
        """Forget files whose time is over and return their ids; those in use are met again."""
        due = (
            select(StoredFileRow)
            .where(StoredFileRow.expires_at <= db_now())
            .order_by(StoredFileRow.expires_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        gone = []
        for row in list(self._session.execute(due).scalars()):
            try:
                self._drop(row)
            except Conflict:
                continue
            gone.append(row.id)
        return gone

    def known(self, file_ids: Collection[str]) -> set[str]:
        """Return those of the ids that are files."""
        statement = select(StoredFileRow.id).where(StoredFileRow.id.in_(file_ids))
        return set(self._session.execute(statement).scalars())

    def _drop(self, row: StoredFileRow) -> None:
        if row.dataset_id is not None:
            datasets = DatasetRepository(self._session)
            try:
                datasets.delete(row.owner_id, row.dataset_id)
            except NotFound:
                # The dataset was deleted by itself before.
                row.dataset_id = None
        self._session.delete(row)
        self._session.flush()


class UploadRepository:
    """Reads and writes of uploads in parts in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(
        self,
        *,
        owner_id: str,
        filename: str,
        purpose: FilePurpose,
        mime_type: str,
        size_bytes: int,
        file_ttl_s: int | None,
        expires_s: float,
    ) -> UploadSession:
        """Insert an upload that waits for its parts.

        Raises:
            QuotaExceeded: the owner may not upload or store so much.
        """
        QuotaRepository(self._session).admit_bytes(owner_id, size_bytes)
        row = UploadSession(
            id=new_id(IdPrefix.UPLOAD),
            owner_id=owner_id,
            filename=filename,
            purpose=purpose,
            mime_type=mime_type,
            bytes=size_bytes,
            status=UploadStatus.PENDING,
            expires_at=db_now() + expires_s,
            file_ttl_s=file_ttl_s,
        )
        self._session.add(row)
        self._session.flush()
        self._session.refresh(row)
        return row

    def get(self, owner_id: str, upload_id: str, *, lock: bool = False) -> UploadSession:
        """Return the owner's upload; `lock` until the end of the transaction.

        Raises:
            NotFound: no such upload, or somebody else's.
        """
        found = select(UploadSession).where(
            UploadSession.id == upload_id, UploadSession.owner_id == owner_id
        )
        if lock:
            found = found.with_for_update()
        row = self._session.execute(found).scalar_one_or_none()
        if row is None:
            raise NotFound(
                f"no upload {upload_id!r}", hint="POST /v1/uploads begins one", param="upload_id"
            )
        return row

    def pending(self, owner_id: str, upload_id: str) -> UploadSession:
        """Return the owner's upload, locked, if it still takes parts.

        Raises:
            NotFound: no such upload.
            Conflict: it was completed or cancelled, or has expired.
        """
        row = self.get(owner_id, upload_id, lock=True)
        now = self._session.execute(select(db_now())).scalar_one()
        status = row.status
        if status is UploadStatus.PENDING and row.expires_at <= now:
            status = UploadStatus.EXPIRED
        if status is not UploadStatus.PENDING:
            raise Conflict(
                f"upload {upload_id} is {status.value}, expected pending",
                code="upload_not_pending",
                param="upload_id",
                hint="begin another one: POST /v1/uploads",
            )
        return row

    def add_part(
        self, owner_id: str, upload_id: str, *, part_id: str, size_bytes: int, sha256: str
    ) -> UploadPart:
        """Insert a part, or return the one that has the same bytes already.

        Raises:
            NotFound: no such upload.
            Conflict: it takes no more parts, or the parts would be more than was announced.
            QuotaExceeded: the owner may not store so much.
        """
        upload = self.pending(owner_id, upload_id)
        same = select(UploadPart).where(
            UploadPart.upload_id == upload_id, UploadPart.sha256 == sha256
        )
        known = self._session.execute(same).scalar_one_or_none()
        if known is not None:
            return known
        total = select(func.coalesce(func.sum(UploadPart.bytes), 0)).where(
            UploadPart.upload_id == upload_id
        )
        stored = int(self._session.execute(total).scalar_one())
        if stored + size_bytes > upload.bytes:
            raise Conflict(
                f"the parts have {stored + size_bytes} bytes with this one, announced were "
                f"{upload.bytes}",
                code="upload_too_long",
                param="data",
                hint="complete the upload with the parts that it has, or cancel it and begin anew",
            )
        QuotaRepository(self._session).admit_bytes(upload.owner_id, size_bytes)
        part = UploadPart(id=part_id, upload_id=upload_id, bytes=size_bytes, sha256=sha256)
        self._session.add(part)
        self._session.flush()
        self._session.refresh(part)
        return part

    def parts(self, upload_id: str) -> list[UploadPart]:
        """Return the parts of an upload, oldest first."""
        found = select(UploadPart).where(UploadPart.upload_id == upload_id).order_by(UploadPart.id)
        return list(self._session.execute(found).scalars())

    def expire(self) -> list[str]:
        """Mark unfinished uploads whose time is over and return their ids."""
        due = (
            update(UploadSession)
            .where(
                UploadSession.status == UploadStatus.PENDING, UploadSession.expires_at <= db_now()
            )
            .values(status=UploadStatus.EXPIRED)
            .returning(UploadSession.id)
            .execution_options(synchronize_session=False)
        )
        return list(self._session.execute(due).scalars())

    def with_parts(self, upload_ids: Collection[str]) -> set[str]:
        """Return those of the uploads that may still need their parts."""
        statement = select(UploadSession.id).where(
            UploadSession.id.in_(upload_ids), UploadSession.status == UploadStatus.PENDING
        )
        return set(self._session.execute(statement).scalars())

    def forget_parts(self, upload_id: str) -> None:
        """Delete the rows of an upload's parts."""
        self._session.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))


def _alive() -> ColumnElement[bool]:
    return or_(StoredFileRow.expires_at.is_(None), StoredFileRow.expires_at > db_now())
