"""Checkpoints as one archive, and links to them that need no key."""

import time
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.archives import tar_of
from app.checkpoint_views import CheckpointId, FilePath, stored_file, stored_files
from app.checkpoints import read_checkpoint
from app.deps import Config, Db, ReadsArtifacts, refuse_unknown_query
from app.downloads import (
    FILE_CONTENT,
    HEAD_RESPONSES,
    RANGE_RESPONSES,
    Content,
    content_response,
    file_response,
)
from app.errors import public_url
from app.responses import NO_STORE, Schema, json_response
from app.signed_links import check_signature, sign
from core.errors import InvalidInput, NotFound
from core.settings import Settings
from core.spec import SpecModel
from models.experiment import Checkpoint
from models.repositories.checkpoints import CheckpointRepository
from models.session import Database

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"])
links = APIRouter(prefix="/downloads", tags=["downloads"])

Expires = Annotated[int, Query(ge=0, lt=2**40, description="unix seconds")]
Signature = Annotated[str, Query(pattern=r"^[A-Za-z0-9_-]{43}$")]
_TAR: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-tar": {}}, "description": "The archive"}
}
_FILE: dict[int | str, dict[str, Any]] = {200: {"content": FILE_CONTENT, "description": "The file"}}


class CreateDownloadUrl(SpecModel):
    """What the link is to, and how long it works."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"path": "adapter_model.safetensors"}, {}]}
    )

    path: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        default=None, description="a file of the checkpoint; null: all of it as a tar"
    )
    expires_in_s: int = Field(default=3600, ge=1)


class DownloadUrl(Schema):
    """A link that works without a key until `expires_at`; who has it can use it."""

    object: Literal["checkpoint.download_url"] = "checkpoint.download_url"
    checkpoint_id: str
    path: str | None
    url: str
    expires_at: int


@router.head(
    "/{checkpoint_id}/archive",
    operation_id="head_checkpoint_archive",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
@router.get(
    "/{checkpoint_id}/archive",
    operation_id="download_checkpoint_archive",
    response_class=Response,
    responses={**_TAR, **RANGE_RESPONSES},
)
async def download_checkpoint_archive(
    request: Request,
    caller: ReadsArtifacts,
    database: Db,
    settings: Config,
    checkpoint_id: CheckpointId,
    _form: Annotated[Literal["tar"], Query(alias="format")] = "tar",
) -> Response:
    """Send all files as one uncompressed tar, the same bytes each time; one range may be asked for.

    It unpacks into a folder that is named like the checkpoint.
    """
    row = await run_in_threadpool(read_checkpoint, database, caller.owner_id, checkpoint_id)
    return await content_response(request, _archive(row, settings))


@router.post(
    "/{checkpoint_id}/download_url",
    operation_id="create_download_url",
    status_code=201,
    response_model=DownloadUrl,
)
def create_download_url(
    request: Request,
    caller: ReadsArtifacts,
    database: Db,
    settings: Config,
    checkpoint_id: CheckpointId,
    body: CreateDownloadUrl,
) -> Response:
    """Make a link for wget, aria2 or a browser, to one file or to all of them as a tar."""
    longest = settings.downloads.max_link_s
    if body.expires_in_s > longest:
        raise InvalidInput(
            f"received expires_in_s {body.expires_in_s}, the longest here is {longest}",
            param="expires_in_s",
            hint="make another link later, or raise KDPO_DOWNLOADS__MAX_LINK_S",
        )
    row = read_checkpoint(database, caller.owner_id, checkpoint_id)
    if body.path is not None:
        stored_file(row, body.path, settings)
    target = _target(row.id, body.path)
    expires = int(time.time()) + body.expires_in_s
    signature = sign(settings, target, expires=expires)
    made = DownloadUrl(
        checkpoint_id=row.id,
        path=body.path,
        url=f"{public_url(request)}/v1/downloads/{quote(target)}"
        f"?expires={expires}&signature={signature}",
        expires_at=expires,
    )
    return json_response(made, status=201, headers=NO_STORE)


@links.head(
    "/{checkpoint_id}/archive",
    operation_id="head_signed_archive",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
@links.get(
    "/{checkpoint_id}/archive",
    operation_id="download_signed_archive",
    response_class=Response,
    responses={**_TAR, **RANGE_RESPONSES},
)
async def download_signed_archive(
    request: Request,
    database: Db,
    settings: Config,
    checkpoint_id: CheckpointId,
    expires: Expires,
    signature: Signature,
) -> Response:
    """Send all files as one tar to whoever has the link; no key is needed."""
    row = await run_in_threadpool(
        _linked, request, database, settings, checkpoint_id, None, expires, signature
    )
    return await content_response(request, _archive(row, settings))


@links.head(
    "/{checkpoint_id}/files/{path:path}",
    operation_id="head_signed_file",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
@links.get(
    "/{checkpoint_id}/files/{path:path}",
    operation_id="download_signed_file",
    response_class=Response,
    responses={**_FILE, **RANGE_RESPONSES},
)
async def download_signed_file(
    request: Request,
    database: Db,
    settings: Config,
    checkpoint_id: CheckpointId,
    path: FilePath,
    expires: Expires,
    signature: Signature,
) -> Response:
    """Send one file to whoever has the link; no key is needed."""
    row = await run_in_threadpool(
        _linked, request, database, settings, checkpoint_id, path, expires, signature
    )
    return await file_response(request, stored_file(row, path, settings))


def _linked(
    request: Request,
    database: Database,
    settings: Settings,
    checkpoint_id: str,
    path: str | None,
    expires: int,
    signature: str,
) -> Checkpoint:
    """Return the checkpoint of a link that this server has signed.

    Raises:
        NotPermitted: it has not, or the link's time is over.
        NotFound: the checkpoint was deleted since.
    """
    refuse_unknown_query(request)
    check_signature(settings, _target(checkpoint_id, path), expires=expires, signature=signature)
    with database.reading() as session:
        row = CheckpointRepository(session).find(checkpoint_id)
    if row is None:
        raise NotFound(f"checkpoint {checkpoint_id!r} has been deleted")
    return row


def _target(checkpoint_id: str, path: str | None) -> str:
    return f"{checkpoint_id}/archive" if path is None else f"{checkpoint_id}/files/{path}"


def _archive(row: Checkpoint, settings: Settings) -> Content:
    return tar_of(stored_files(row, settings), name=row.id, created_at=int(row.created_at))
