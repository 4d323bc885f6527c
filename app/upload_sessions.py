"""Uploads in parts, in OpenAI's form: begin, add parts, complete or cancel."""

import shutil
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.conditional import CONDITIONAL_RESPONSES
from app.deps import (
    ID_PATTERN,
    TEXT_PATTERN,
    Config,
    Db,
    Queue,
    ReadsDatasets,
    WritesDatasets,
)
from app.file_store import NewFile, Received, join_parts, storing
from app.file_views import (
    ExpiresAfter,
    PartView,
    UploadId,
    UploadView,
    part_view,
    upload_view,
)
from app.files import MAX_NAME, file_name, view_of
from app.queue import relay_now
from app.responses import ListOf, conditional, list_of
from app.uploads import Upload, make_room, receive_upload
from core.errors import Conflict, InvalidInput, NotFound, TooLarge
from core.files import FilePurpose, UploadStatus
from core.ids import IdPrefix, new_id
from core.settings import Settings
from core.spec import SpecModel
from models.file import UploadSession
from models.repositories.files import FileRepository, UploadRepository
from models.session import Database

router = APIRouter(prefix="/uploads", tags=["uploads"])

MAX_PARTS = 10_000
PartId = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
_PART_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "additionalProperties": False,
                    "properties": {"data": {"type": "string", "format": "binary", "minLength": 1}},
                },
                "examples": {"part": {"value": {"data": "the next 64 MB of the file"}}},
            }
        },
    }
}


class CreateUpload(SpecModel):
    """What will come."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "filename": "prefs.jsonl",
                    "purpose": "fine-tune",
                    "bytes": 1_073_741_824,
                    "mime_type": "application/jsonl",
                }
            ]
        }
    )

    filename: Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=TEXT_PATTERN)]
    purpose: FilePurpose
    bytes: int = Field(ge=1, le=2**53, description="of all parts together")
    mime_type: Annotated[str, Field(min_length=1, max_length=200, pattern=TEXT_PATTERN)]
    expires_after: ExpiresAfter | None = None


class CompleteUpload(SpecModel):
    """The parts in the order of the file."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"part_ids": ["part_01jd", "part_01je"]}]}
    )

    part_ids: list[PartId] = Field(min_length=1, max_length=MAX_PARTS)
    md5: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{32}$", description="of the whole file"
    )


@router.post("", operation_id="create_upload")
def create_upload(
    caller: WritesDatasets, database: Db, settings: Config, body: CreateUpload
) -> UploadView:
    """Begin an upload in parts; it waits for them until `expires_at`."""
    limit = settings.api.max_upload_bytes
    if body.bytes > limit:
        raise TooLarge(
            f"received bytes {body.bytes}, the limit here is {limit}",
            param="bytes",
            hint="upload a sample, compress it with gzip, or raise KDPO_API__MAX_UPLOAD_BYTES",
        )
    make_room(settings.part_dir, body.bytes)
    with database.transaction() as session:
        row = UploadRepository(session).create(
            owner_id=caller.owner_id,
            filename=file_name(body.filename, "upload"),
            purpose=body.purpose,
            mime_type=body.mime_type,
            size_bytes=body.bytes,
            file_ttl_s=None if body.expires_after is None else body.expires_after.seconds,
            expires_s=settings.files.upload_expires_s,
        )
    return upload_view(row, None)


@router.get(
    "/{upload_id}",
    operation_id="get_upload",
    response_model=UploadView,
    responses=CONDITIONAL_RESPONSES,
)
def get_upload(
    request: Request, caller: ReadsDatasets, database: Db, upload_id: UploadId
) -> Response:
    """Return one upload."""
    with database.reading() as session:
        row = UploadRepository(session).get(caller.owner_id, upload_id)
        return conditional(request, _view(session, row))


@router.get("/{upload_id}/parts", operation_id="list_upload_parts")
def list_upload_parts(caller: ReadsDatasets, database: Db, upload_id: UploadId) -> ListOf[PartView]:
    """List the parts that have arrived, oldest first: who was interrupted sends the others."""
    with database.reading() as session:
        uploads = UploadRepository(session)
        rows = uploads.parts(uploads.get(caller.owner_id, upload_id).id)
        views = [part_view(row) for row in rows]
    return list_of(views, [view.id for view in views], has_more=False)


@router.post(
    "/{upload_id}/parts",
    operation_id="create_upload_part",
    response_model=PartView,
    openapi_extra=_PART_BODY,
)
async def create_upload_part(
    request: Request, caller: WritesDatasets, database: Db, settings: Config, upload_id: UploadId
) -> PartView:
    """Add a part, in any order. The same bytes sent again are the same part."""
    await run_in_threadpool(_pending, database, caller.owner_id, upload_id)
    folder = settings.part_dir / upload_id
    part = await receive_upload(
        request,
        folder / new_id(IdPrefix.PART),
        max_bytes=settings.files.max_part_bytes,
        fields=frozenset(),
        file_part="data",
    )
    return await run_in_threadpool(_add_part, database, caller.owner_id, upload_id, part)


@router.post("/{upload_id}/complete", operation_id="complete_upload")
def complete_upload(
    caller: WritesDatasets,
    database: Db,
    queue: Queue,
    settings: Config,
    upload_id: UploadId,
    body: CompleteUpload,
) -> UploadView:
    """Make the file of the parts, in the order that is given here; a part may be named again.

    Repeated for an upload that is complete, it gives the same answer.
    """
    with database.reading() as session:
        row = UploadRepository(session).get(caller.owner_id, upload_id)
        if row.status is UploadStatus.COMPLETED:
            return _view(session, row)
    upload = _pending(database, caller.owner_id, upload_id)
    _check_parts(database, upload, body)
    folder = settings.part_dir / upload_id
    target = settings.file_dir / new_id(IdPrefix.FILE)
    make_room(settings.file_dir, upload.bytes)
    try:
        received = join_parts([folder / part_id for part_id in body.part_ids], target)
    except FileNotFoundError as error:
        # Another request has completed or cancelled it meanwhile, or the server has lost a part.
        raise Conflict(
            f"a part of upload {upload_id} is not on the server's disk any more",
            code="upload_gone",
            hint=f"read GET /v1/uploads/{upload_id}, or begin another one",
        ) from error
    view = _complete(database, settings, upload, received, body.md5)
    shutil.rmtree(folder, ignore_errors=True)
    relay_now(database, queue)
    return view


@router.post("/{upload_id}/cancel", operation_id="cancel_upload")
def cancel_upload(
    caller: WritesDatasets, database: Db, settings: Config, upload_id: UploadId
) -> UploadView:
    """Give up an upload and remove its parts; a cancelled one stays cancelled."""
    with database.transaction() as session:
        uploads = UploadRepository(session)
        row = uploads.get(caller.owner_id, upload_id, lock=True)
        if row.status is not UploadStatus.CANCELLED:
            row = uploads.pending(caller.owner_id, upload_id)
            row.status = UploadStatus.CANCELLED
            uploads.forget_parts(upload_id)
    shutil.rmtree(settings.part_dir / upload_id, ignore_errors=True)
    return upload_view(row, None)


def _pending(database: Database, owner_id: str, upload_id: str) -> UploadSession:
    with database.transaction() as session:
        return UploadRepository(session).pending(owner_id, upload_id)


def _add_part(database: Database, owner_id: str, upload_id: str, part: Upload) -> PartView:
    stored = None
    try:
        with database.transaction() as session:
            row = UploadRepository(session).add_part(
                owner_id, upload_id, part_id=part.path.name, size_bytes=part.size_bytes,
                sha256=part.sha256,
            )  # fmt: skip
            view = part_view(row)
        stored = row.id
    finally:
        if stored != part.path.name:
            part.path.unlink(missing_ok=True)
    return view


def _check_parts(database: Database, upload: UploadSession, body: CompleteUpload) -> None:
    """Refuse parts that are not there, or not of the announced size, before anything is copied."""
    with database.reading() as session:
        sizes = {row.id: row.bytes for row in UploadRepository(session).parts(upload.id)}
    missing = [part_id for part_id in body.part_ids if part_id not in sizes]
    if missing:
        raise NotFound(
            f"upload {upload.id} has no part {missing[0]!r}",
            param="part_ids",
            hint=f"GET /v1/uploads/{upload.id}/parts lists them",
        )
    total = sum(sizes[part_id] for part_id in body.part_ids)
    if total != upload.bytes:
        raise InvalidInput(
            f"the parts have {total} bytes together, announced were {upload.bytes}",
            code="upload_size_mismatch",
            param="part_ids",
            hint="name all parts in the order of the file, or add the one that is missing",
        )


def _complete(
    database: Database,
    settings: Settings,
    upload: UploadSession,
    received: Received,
    md5: str | None,
) -> UploadView:
    """Make the file and complete the upload in one transaction.

    Raises:
        InvalidInput: code `upload_damaged`: the MD5 is another one.
        Conflict: another request was faster.
    """
    if md5 is not None and md5.lower() != received.md5:
        received.path.unlink(missing_ok=True)
        raise InvalidInput(
            f"the file has the MD5 {received.md5}, expected was {md5.lower()}",
            code="upload_damaged",
            param="md5",
            hint="send the damaged parts again, and name the parts in the order of the file",
        )
    new = NewFile(
        upload.owner_id, upload.filename, upload.purpose, upload.file_ttl_s, upload_id=upload.id
    )
    with storing(database, settings, received, new) as (session, file):
        row = UploadRepository(session).pending(upload.owner_id, upload.id)
        row.status, row.file_id = UploadStatus.COMPLETED, file.id
        return _view(session, row)


def _view(session: Session, row: UploadSession) -> UploadView:
    if row.file_id is None:
        return upload_view(row, None)
    try:
        file = FileRepository(session).get(row.owner_id, row.file_id)
    except NotFound:  # deleted since
        return upload_view(row, None)
    return upload_view(row, view_of(session, file))
