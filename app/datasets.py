"""Datasets: upload, validate, report."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app.conditional import CONDITIONAL_RESPONSES
from app.dataset_sources import SOURCE_BODY, is_json, receive_source, store_source
from app.dataset_uploads import UPLOAD_FIELDS, discarded_on_error, store_upload
from app.dataset_views import (
    DatasetId,
    DatasetView,
    Failure,
    ReportView,
    dataset_view,
    report_url,
    report_view,
)
from app.deps import (
    Config,
    Db,
    Lists,
    PageOf,
    Patience,
    Prefer,
    Queue,
    ReadsDatasets,
    WritesDatasets,
)
from app.errors import problem_response, status_of
from app.queue import relay_now
from app.responses import ListOf, conditional, json_response, wait_until
from app.uploads import Upload, receive_upload
from core.ids import IdPrefix, new_id
from core.lifecycle import DatasetStatus
from models.repositories.datasets import DatasetRepository
from models.session import Database

router = APIRouter(prefix="/datasets", tags=["datasets"])

FIELDS = frozenset({"name", "policy"})

_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": UPLOAD_FIELDS,
                },
                "examples": {
                    "upload": {
                        "value": {
                            "file": '{"prompt": "2+2?", "chosen": "4", "rejected": "5"}',
                            "name": "arithmetic",
                            "policy": '{"on_invalid": "skip", "max_invalid_fraction": 0.05}',
                        }
                    }
                },
            },
            "application/json": SOURCE_BODY,
        },
    }
}


@router.post(
    "",
    operation_id="create_dataset",
    response_model=DatasetView,
    openapi_extra=_UPLOAD_BODY,
    responses={202: {"model": DatasetView, "description": "Still being validated"}},
)
async def create_dataset(
    request: Request,
    caller: WritesDatasets,
    database: Db,
    queue: Queue,
    settings: Config,
    prefer: Prefer,
    dry_run: Annotated[
        bool, Query(description="read and report, and keep no pairs; as `dry_run` of the policy")
    ] = False,
) -> Response:
    """Take preference pairs as a file, or as JSON with the rows or where they are: a file of
    `/v1/files`, a hub repository, an https address, a path on the server.

    They are validated, and the answer comes when that is done or time is up.
    """
    names = {"dataset_id": new_id(IdPrefix.DATASET), "owner_id": caller.owner_id}
    dataset_id = names["dataset_id"]
    if is_json(request):
        source = await receive_source(request, dry_run=dry_run)
        await run_in_threadpool(store_source, database, source, settings, **names)
    else:
        upload = await receive_upload(
            request,
            settings.upload_dir / dataset_id,
            max_bytes=settings.api.max_upload_bytes,
            fields=FIELDS,
        )
        await run_in_threadpool(_store, database, upload, dry_run=dry_run, **names)
    await run_in_threadpool(relay_now, database, queue)
    patience = prefer or Patience(settings.api.wait_default_s, preferred=False)
    await wait_until(lambda: is_settled(database, caller.owner_id, dataset_id), patience.seconds)
    view = await run_in_threadpool(read_dataset, database, caller.owner_id, dataset_id)
    return dataset_answer(request, view, patience.headers())


def _store(
    database: Database, upload: Upload, *, dataset_id: str, owner_id: str, dry_run: bool
) -> None:
    with discarded_on_error(upload), database.transaction() as session:
        store_upload(session, upload, dataset_id=dataset_id, owner_id=owner_id, dry_run=dry_run)


def read_dataset(database: Database, owner_id: str, dataset_id: str) -> DatasetView:
    """Return the view of a dataset."""
    with database.reading() as session:
        return dataset_view(DatasetRepository(session).get(owner_id, dataset_id))


def is_settled(database: Database, owner_id: str, dataset_id: str) -> bool:
    """Whether a dataset is validated, or its validation waits for a person."""
    view = read_dataset(database, owner_id, dataset_id)
    return view.error is not None or view.status is not DatasetStatus.VALIDATING


def dataset_answer(request: Request, view: DatasetView, headers: Mapping[str, str]) -> Response:
    """Return a dataset that was asked to be made: 202 while it is read, a problem if invalid."""
    url = f"/v1/datasets/{view.id}"
    if view.status is DatasetStatus.VALIDATING:
        return json_response(view, status=202, headers={"Location": url, **headers})
    if view.error is not None:
        return refused_dataset(request, view, view.error)
    return json_response(view, headers={"Location": url, **headers})


def refused_dataset(request: Request, view: DatasetView, failure: Failure, **more: str) -> Response:
    """Return the problem of an invalid dataset, with where its report is."""
    return problem_response(
        request,
        status=status_of(failure.category),
        code=failure.code,
        detail=failure.message,
        hint=failure.hint,
        param=failure.param,
        retryable=failure.retryable,
        errors=failure.details(),
        extra={"dataset_id": view.id, "report_url": report_url(view.id), **more},
    )


@router.get("", operation_id="list_datasets")
def list_datasets(
    caller: ReadsDatasets, database: Db, query: PageOf, lists: Lists
) -> ListOf[DatasetView]:
    """List datasets, newest first."""
    with database.reading() as session:
        page = DatasetRepository(session).page(caller.owner_id, query)
        views = [dataset_view(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.get(
    "/{dataset_id}",
    operation_id="get_dataset",
    response_model=DatasetView,
    responses=CONDITIONAL_RESPONSES,
)
def get_dataset(
    request: Request, caller: ReadsDatasets, database: Db, dataset_id: DatasetId
) -> Response:
    """Return one dataset; its ETag makes polling cheap."""
    return conditional(request, read_dataset(database, caller.owner_id, dataset_id))


@router.get(
    "/{dataset_id}/report",
    operation_id="get_dataset_report",
    response_model=ReportView,
    responses=CONDITIONAL_RESPONSES,
)
def get_dataset_report(
    request: Request, caller: ReadsDatasets, database: Db, dataset_id: DatasetId
) -> Response:
    """Return what validation found: layout, counts, every kind of error, lint, a preview."""
    with database.reading() as session:
        dataset = DatasetRepository(session).get(caller.owner_id, dataset_id)
    return conditional(request, report_view(dataset))
