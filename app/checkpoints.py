"""Checkpoints: list, get, download file by file, export."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.checkpoint_views import CheckpointView, FileView, checkpoint_view
from app.deps import ID_PATTERN, Config, Db, Lists, PageOf, Queue, ReadsArtifacts, WritesArtifacts
from app.downloads import RANGE_RESPONSES, StoredFile, file_response
from app.job_views import AnyJob, any_job
from app.queue import relay_now
from app.responses import ListOf, conditional, json_response, list_of
from core.errors import Conflict, NotFound
from core.lifecycle import JobKind
from core.spec import SpecModel
from models.experiment import Checkpoint
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"])

CheckpointId = Annotated[str, Path(pattern=ID_PATTERN)]


class CreateExport(SpecModel):
    """How to export a checkpoint."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"merge": True}]})

    merge: Literal[True] = Field(
        default=True, description="merge the adapter into the base model's weights"
    )


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


@router.get("/{checkpoint_id}", operation_id="get_checkpoint", response_model=CheckpointView)
def get_checkpoint(
    request: Request, caller: ReadsArtifacts, database: Db, checkpoint_id: CheckpointId
) -> Response:
    """Return one checkpoint."""
    row = _read(database, caller.owner_id, checkpoint_id)
    return conditional(request, checkpoint_view(row))


@router.get("/{checkpoint_id}/files", operation_id="list_checkpoint_files")
def list_checkpoint_files(
    caller: ReadsArtifacts, database: Db, checkpoint_id: CheckpointId
) -> ListOf[FileView]:
    """List all files of a checkpoint with sizes and hashes."""
    row = _read(database, caller.owner_id, checkpoint_id)
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
    responses={200: {"description": "Size, hash and ETag of the file"}},
)
@router.get(
    "/{checkpoint_id}/files/{path:path}",
    operation_id="download_checkpoint_file",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The file"},
        **RANGE_RESPONSES,
    },
)
async def download_checkpoint_file(
    request: Request,
    caller: ReadsArtifacts,
    database: Db,
    settings: Config,
    checkpoint_id: CheckpointId,
    path: Annotated[str, Path(max_length=512)],
) -> Response:
    """Send one file; ETag and Repr-Digest are its SHA-256, one byte range may be asked for."""
    row = await run_in_threadpool(_read, database, caller.owner_id, checkpoint_id)
    for file in row.files:
        if file["path"] == path:
            return await file_response(
                request,
                StoredFile(
                    folder=settings.artifact_dir / row.path,
                    path=path,
                    size_bytes=int(file["bytes"]),
                    sha256=str(file["sha256"]),
                ),
            )
    raise NotFound(
        f"checkpoint {checkpoint_id} has no file {path!r}",
        hint=f"GET /v1/checkpoints/{checkpoint_id}/files lists them",
    )


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
    checkpoint_id: CheckpointId,
    body: CreateExport,
) -> Response:
    """Queue the export of a checkpoint as one model that needs no adapter."""
    with database.transaction() as session:
        row = ExperimentRepository(session).checkpoint(caller.owner_id, checkpoint_id)
        if row.kind != "adapter":
            raise Conflict(
                f"checkpoint {row.id} is of kind {row.kind!r}; only an adapter can be merged into "
                "its base model",
                code="checkpoint_not_adapter",
                hint="a merged checkpoint needs no export: download its files",
            )
        jobs = JobRepository(session)
        source = jobs.get(caller.owner_id, row.job_id)
        job = jobs.create(
            owner_id=caller.owner_id,
            kind=JobKind.EXPORT,
            spec={"checkpoint_id": row.id, "merge": body.merge},
            model=source.model,
        )
        view = any_job(session, job)
    relay_now(database, queue)
    return json_response(view, status=202, headers={"Location": f"/v1/jobs/{view.id}"})


def _read(database: Database, owner_id: str, checkpoint_id: str) -> Checkpoint:
    with database.reading() as session:
        return ExperimentRepository(session).checkpoint(owner_id, checkpoint_id)
