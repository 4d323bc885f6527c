"""Checkpoints: list, get, keep, delete, download file by file, export."""

import time
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import ConfigDict, Field, field_validator
from starlette.concurrency import run_in_threadpool

from app.checkpoint_views import (
    CheckpointId,
    CheckpointView,
    FilePath,
    FileView,
    checkpoint_view,
    stored_file,
)
from app.conditional import CONDITIONAL_RESPONSES
from app.deps import (
    ID_PATTERN,
    TEXT_PATTERN,
    Config,
    Db,
    IfMatch,
    Lists,
    PageOf,
    Queue,
    ReadsArtifacts,
    WritesArtifacts,
)
from app.downloads import FILE_CONTENT, HEAD_RESPONSES, RANGE_RESPONSES, file_response
from app.job_views import AnyJob, any_job
from app.queue import relay_now
from app.responses import (
    ListOf,
    check_if_match,
    conditional,
    json_response,
    list_of,
    with_etag,
)
from core.errors import Conflict
from core.hub_push import ExportOptions, push_token
from core.lifecycle import JobKind
from core.spec import SpecModel
from models.experiment import Checkpoint
from models.repositories.checkpoints import CheckpointRepository
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"])


class CreateExport(ExportOptions):
    """How to export a checkpoint."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"merge": True}, {"merge": True, "dtype": "bfloat16"}]}
    )


class UpdateCheckpoint(SpecModel):
    """How long a checkpoint stays, and what it is called."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"pinned": True, "label": "the one we ship"}]}
    )

    pinned: bool | None = Field(default=None, description="a pinned one never expires")
    expires_at: int | None = Field(
        default=None, lt=2**40, description="unix seconds, later than now; null: no end"
    )
    label: Annotated[str, Field(min_length=1, max_length=200, pattern=TEXT_PATTERN)] | None = Field(
        default=None, description="null: the job's own"
    )

    @field_validator("expires_at")
    @classmethod
    def _later(cls, value: int | None) -> int | None:
        now = int(time.time())
        if value is not None and value <= now:
            raise ValueError(f"received {value}, expected unix seconds after now, which is {now}")
        return value


@router.get("", operation_id="list_checkpoints")
def list_checkpoints(
    caller: ReadsArtifacts,
    database: Db,
    query: PageOf,
    lists: Lists,
    job_id: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> ListOf[CheckpointView]:
    """List checkpoints, newest first."""
    with database.reading() as session:
        page = ExperimentRepository(session).checkpoint_page(caller.owner_id, query, job_id=job_id)
        views = [checkpoint_view(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{checkpoint_id}",
    operation_id="get_checkpoint",
    response_model=CheckpointView,
    responses=CONDITIONAL_RESPONSES,
)
def get_checkpoint(
    request: Request, caller: ReadsArtifacts, database: Db, checkpoint_id: CheckpointId
) -> Response:
    """Return one checkpoint."""
    row = read_checkpoint(database, caller.owner_id, checkpoint_id)
    return conditional(request, checkpoint_view(row))


@router.get("/{checkpoint_id}/files", operation_id="list_checkpoint_files")
def list_checkpoint_files(
    caller: ReadsArtifacts, database: Db, checkpoint_id: CheckpointId
) -> ListOf[FileView]:
    """List all files of a checkpoint with sizes and hashes."""
    row = read_checkpoint(database, caller.owner_id, checkpoint_id)
    files = [
        FileView(
            path=str(file["path"]),
            bytes=int(file["bytes"]),
            sha256=str(file["sha256"]),
            url=f"/v1/checkpoints/{row.id}/files/{file['path']}",
        )
        for file in row.files
    ]
    return list_of(files, [file.path for file in files], has_more=False)


@router.head(
    "/{checkpoint_id}/files/{path:path}",
    operation_id="head_checkpoint_file",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
@router.get(
    "/{checkpoint_id}/files/{path:path}",
    operation_id="download_checkpoint_file",
    response_class=Response,
    responses={
        200: {"content": FILE_CONTENT, "description": "The file"},
        **RANGE_RESPONSES,
    },
)
async def download_checkpoint_file(
    request: Request,
    caller: ReadsArtifacts,
    database: Db,
    settings: Config,
    checkpoint_id: CheckpointId,
    path: FilePath,
) -> Response:
    """Send one file; ETag and Repr-Digest are its SHA-256, one byte range may be asked for."""
    row = await run_in_threadpool(read_checkpoint, database, caller.owner_id, checkpoint_id)
    return await file_response(request, stored_file(row, path, settings))


@router.patch("/{checkpoint_id}", operation_id="update_checkpoint", response_model=CheckpointView)
def update_checkpoint(
    caller: WritesArtifacts,
    database: Db,
    checkpoint_id: CheckpointId,
    body: UpdateCheckpoint,
    if_match: IfMatch = None,
) -> Response:
    """Pin a checkpoint, give it a label or an end; what is not given stays as it is."""
    given = body.model_fields_set
    with database.transaction() as session:
        checkpoints = CheckpointRepository(session)
        row = checkpoints.lock(caller.owner_id, checkpoint_id)
        check_if_match(if_match, checkpoint_view(row))
        checkpoints.change(
            row,
            title=body.label if "label" in given else row.title,
            pinned=row.pinned if body.pinned is None else body.pinned,
            ends=body.expires_at if "expires_at" in given else row.expires_at,
        )
        view = checkpoint_view(row)
    return with_etag(view)


@router.delete(
    "/{checkpoint_id}",
    operation_id="delete_checkpoint",
    status_code=204,
    responses={204: {"description": "Deleted; its files go within minutes"}},
)
def delete_checkpoint(caller: WritesArtifacts, database: Db, checkpoint_id: CheckpointId) -> None:
    """Delete a checkpoint, unless a job that has not ended makes or reads it."""
    with database.transaction() as session:
        CheckpointRepository(session).delete(caller.owner_id, checkpoint_id)


@router.post(
    "/{checkpoint_id}/export",
    operation_id="export_checkpoint",
    status_code=202,
    response_model=AnyJob,
)
def export_checkpoint(
    caller: WritesArtifacts,
    database: Db,
    queue: Queue,
    settings: Config,
    checkpoint_id: CheckpointId,
    body: CreateExport,
) -> Response:
    """Queue the export of a checkpoint: as one model that needs no adapter, to the hub, or both."""
    if body.push_to_hub is not None:
        push_token(body.push_to_hub, settings)
    with database.transaction() as session:
        row = CheckpointRepository(session).lock(caller.owner_id, checkpoint_id)
        if body.merge and row.kind != "adapter":
            raise Conflict(
                f"checkpoint {row.id} is of kind {row.kind!r}; only an adapter can be merged into "
                "its base model",
                code="checkpoint_not_adapter",
                hint="a merged checkpoint needs no export: download its files, or push them with "
                "merge: false",
            )
        jobs = JobRepository(session)
        source = jobs.get(caller.owner_id, row.job_id)
        job = jobs.create(
            owner_id=caller.owner_id,
            kind=JobKind.EXPORT,
            spec={"checkpoint_id": row.id, **body.model_dump(mode="json", exclude_none=True)},
            model=source.model,
        )
        view = any_job(session, job)
    relay_now(database, queue)
    return json_response(view, status=202, headers={"Location": f"/v1/jobs/{view.id}"})


def read_checkpoint(database: Database, owner_id: str, checkpoint_id: str) -> Checkpoint:
    """Return the owner's checkpoint.

    Raises:
        NotFound: no such checkpoint.
    """
    with database.reading() as session:
        return ExperimentRepository(session).checkpoint(owner_id, checkpoint_id)
