"""Files in OpenAI's form: upload, list, get, delete, download."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.conditional import CONDITIONAL_RESPONSES
from app.deps import (
    ID_PATTERN,
    Config,
    Db,
    Lists,
    Queue,
    ReadsDatasets,
    WritesDatasets,
)
from app.downloads import FILE_CONTENT, HEAD_RESPONSES, RANGE_RESPONSES, StoredFile, file_response
from app.file_store import NewFile, Received, storing
from app.file_views import ExpiresAfter, FileDeleted, FileId, FileView, file_view
from app.queue import relay_now
from app.responses import ListOf, conditional
from app.uploads import Upload, receive_upload
from core.errors import InvalidInput
from core.files import FilePurpose
from core.ids import IdPrefix, new_id
from core.settings import Settings
from models.file import StoredFileRow
from models.repositories.files import FileRepository
from models.repositories.paging import PageQuery
from models.session import Database

router = APIRouter(prefix="/files", tags=["files"])

MAX_NAME = 255
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = frozenset({"purpose", _ANCHOR, _SECONDS})
_PURPOSES = ", ".join(FilePurpose)
_FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                        "purpose": {"type": "string", "enum": [*FilePurpose]},
                        _ANCHOR: {"type": "string", "enum": ["created_at"]},
                        _SECONDS: {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                },
                "examples": {
                    "pairs": {
                        "value": {
                            "file": '{"prompt": "2+2?", "chosen": "4", "rejected": "5"}',
                            "purpose": "fine-tune",
                        }
                    }
                },
            }
        },
    }
}


@router.post("", operation_id="create_file", response_model=FileView, openapi_extra=_FILE_BODY)
async def create_file(
    request: Request, caller: WritesDatasets, database: Db, queue: Queue, settings: Config
) -> FileView:
    """Keep a file. One for training (`fine-tune`, `preference`) becomes a dataset as well.

    The answer does not wait for the validation: `status` is `uploaded` until it is done, then
    `processed` or `error`.
    """
    upload = await receive_upload(
        request,
        settings.file_dir / new_id(IdPrefix.FILE),
        max_bytes=settings.api.max_upload_bytes,
        fields=_FIELDS,
    )
    view = await run_in_threadpool(_store, database, settings, upload, caller.owner_id)
    await run_in_threadpool(relay_now, database, queue)
    return view


def _store(database: Database, settings: Settings, upload: Upload, owner_id: str) -> FileView:
    try:
        new = NewFile(
            owner_id,
            file_name(upload.filename, upload.path.name),
            _purpose(upload.fields.get("purpose")),
            _ttl_s(upload.fields),
        )
    except InvalidInput:
        upload.path.unlink(missing_ok=True)
        raise
    received = Received(upload.path, upload.size_bytes, upload.sha256)
    with storing(database, settings, received, new) as (session, row):
        return view_of(session, row)


def file_name(given: str | None, otherwise: str) -> str:
    """Return the name that a client gave, without what cannot be shown."""
    return "".join(c for c in given or "" if c.isprintable())[:MAX_NAME] or otherwise


def _purpose(text: str | None) -> FilePurpose:
    try:
        return FilePurpose(text or "")
    except ValueError as error:
        raise InvalidInput(
            f"received the purpose {(text or '')[:40]!r}, expected one of {_PURPOSES}",
            param="purpose",
            hint="preference pairs have the purpose fine-tune",
        ) from error


def _ttl_s(fields: dict[str, str]) -> int | None:
    given = {key: fields[name] for key, name in (("anchor", _ANCHOR), ("seconds", _SECONDS))
             if name in fields}  # fmt: skip
    if not given:
        return None
    try:
        return ExpiresAfter.model_validate_strings(given).seconds
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            f"expires_after.{'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
            param="expires_after",
            hint="expected expires_after[anchor]=created_at and expires_after[seconds] of an hour "
            "to 30 days",
        ) from error


def view_of(session: Session, row: StoredFileRow) -> FileView:
    """Return the view of one file."""
    datasets = FileRepository(session).datasets_of([row])
    return file_view(row, datasets.get(row.dataset_id or ""))


@router.get("", operation_id="list_files")
def list_files(
    caller: ReadsDatasets,
    database: Db,
    lists: Lists,
    limit: Annotated[int, Query(ge=1, le=10_000, description="files on a page")] = 10_000,
    after: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    before: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="by age")] = "desc",
    purpose: FilePurpose | None = None,
) -> ListOf[FileView]:
    """List files, newest first."""
    query = PageQuery(limit=limit, after=after, before=before, order=order)
    with database.reading() as session:
        files = FileRepository(session)
        page = files.page(caller.owner_id, query, purpose=purpose)
        datasets = files.datasets_of(page.rows)
        views = [file_view(row, datasets.get(row.dataset_id or "")) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{file_id}",
    operation_id="get_file",
    response_model=FileView,
    responses=CONDITIONAL_RESPONSES,
)
def get_file(request: Request, caller: ReadsDatasets, database: Db, file_id: FileId) -> Response:
    """Return one file."""
    with database.reading() as session:
        view = view_of(session, FileRepository(session).get(caller.owner_id, file_id))
    return conditional(request, view)


@router.delete("/{file_id}", operation_id="delete_file")
def delete_file(
    caller: WritesDatasets, database: Db, settings: Config, file_id: FileId
) -> FileDeleted:
    """Delete a file and the dataset that was made of it, unless a job that has not ended names it.

    What jobs have made of the data stays, and so do other versions of the dataset.
    """
    with database.transaction() as session:
        FileRepository(session).delete(caller.owner_id, file_id)
    (settings.file_dir / file_id).unlink(missing_ok=True)
    return FileDeleted(id=file_id)


@router.head(
    "/{file_id}/content",
    operation_id="head_file_content",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
@router.get(
    "/{file_id}/content",
    operation_id="download_file",
    response_class=Response,
    responses={
        200: {"content": FILE_CONTENT, "description": "The file"},
        **RANGE_RESPONSES,
    },
)
async def download_file(
    request: Request, caller: ReadsDatasets, database: Db, settings: Config, file_id: FileId
) -> Response:
    """Send the file as it came; its ETag is its SHA-256, and one range may be asked for."""
    row = await run_in_threadpool(_read, database, caller.owner_id, file_id)
    stored = StoredFile(settings.file_dir, row.id, row.bytes, row.sha256, filename=row.filename)
    return await file_response(request, stored)


def _read(database: Database, owner_id: str, file_id: str) -> StoredFileRow:
    with database.reading() as session:
        return FileRepository(session).get(owner_id, file_id)
