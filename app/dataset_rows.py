"""The rows of a dataset: pages to look at, and whole files to download."""

import os
from dataclasses import replace
from itertools import islice
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app.dataset_views import DatasetId, RowView, report_url
from app.deps import Config, Db, ReadsDatasets
from app.downloads import (
    HEAD_RESPONSES,
    RANGE_RESPONSES,
    StoredFile,
    file_response,
    open_inside,
)
from app.responses import ListOf, json_response, list_of, next_page
from core.errors import Conflict, InvalidInput
from core.lifecycle import DatasetStatus
from core.settings import Settings
from models.dataset import Dataset
from models.repositories.datasets import DatasetRepository
from models.session import Database

router = APIRouter(prefix="/datasets", tags=["datasets"])

View = Literal["canonical", "rejected"]
_PAGE = 20


@router.head(
    "/{dataset_id}/rows",
    operation_id="head_dataset_rows",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
@router.get(
    "/{dataset_id}/rows",
    operation_id="list_dataset_rows",
    response_model=ListOf[RowView],
    responses={
        200: {"content": {"application/jsonl": {}, "application/vnd.apache.parquet": {}}},
        **RANGE_RESPONSES,
    },
)
async def list_dataset_rows(
    request: Request,
    caller: ReadsDatasets,
    database: Db,
    settings: Config,
    dataset_id: DatasetId,
    view: View = "canonical",
    form: Annotated[Literal["json", "jsonl", "parquet"], Query(alias="format")] = "json",
    limit: Annotated[int | None, Query(ge=1, le=100, description="rows on a page; 20")] = None,
    after: Annotated[
        int | None, Query(ge=0, lt=2**53, description="`number` of the last row seen")
    ] = None,
) -> Response:
    """Return the pairs as kdpo reads them, or the rows that it rejected.

    `json` gives a page. `jsonl` and `parquet` give the whole file: ETag and Repr-Digest are its
    SHA-256, one byte range may be asked for. Uploaded again, it gives the same pairs.
    """
    if form != "json" and (limit, after) != (None, None):
        raise InvalidInput(
            f"limit and after cut pages of json, and format is {form}: drop them, or the format",
            param="limit" if after is None else "after",
        )
    dataset = await run_in_threadpool(_read, database, caller.owner_id, dataset_id)
    file = _file(dataset, view, "jsonl" if form == "json" else form, settings)
    if form != "json":
        return await file_response(request, file)
    size = limit or _PAGE
    rows = await run_in_threadpool(_rows, file, after=after or 0, limit=size + 1)
    page = list_of(rows[:size], [str(r.number) for r in rows[:size]], has_more=len(rows) > size)
    return json_response(page, headers=next_page(request, page))


@router.head(
    "/{dataset_id}/content",
    operation_id="head_dataset_content",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
@router.get(
    "/{dataset_id}/content",
    operation_id="download_dataset",
    response_class=Response,
    responses={
        200: {
            "content": {"application/jsonl": {}, "application/vnd.apache.parquet": {}},
            "description": "All pairs",
        },
        **RANGE_RESPONSES,
    },
)
async def download_dataset(
    request: Request,
    caller: ReadsDatasets,
    database: Db,
    settings: Config,
    dataset_id: DatasetId,
    form: Annotated[Literal["jsonl", "parquet"], Query(alias="format")] = "jsonl",
) -> Response:
    """Send all pairs as kdpo reads them; what `rows` gives with this `format`."""
    dataset = await run_in_threadpool(_read, database, caller.owner_id, dataset_id)
    file = replace(_file(dataset, "canonical", form, settings), filename=f"{dataset.id}.{form}")
    return await file_response(request, file)


def _read(database: Database, owner_id: str, dataset_id: str) -> Dataset:
    with database.reading() as session:
        return DatasetRepository(session).get(owner_id, dataset_id)


def _file(
    dataset: Dataset, view: View, form: Literal["jsonl", "parquet"], settings: Settings
) -> StoredFile:
    """Return a published file of the dataset.

    Raises:
        InvalidInput: this view never has the form.
        Conflict: the dataset has no such rows, or none yet.
    """
    if view == "rejected" and form == "parquet":
        raise InvalidInput(
            "rejected rows have any columns and no table: ask for format=jsonl", param="format"
        )
    name = f"{view}.{form}"
    for file in dataset.files:
        if file["path"] == name:
            return StoredFile(
                settings.artifact_dir / "datasets" / dataset.id, name, file["bytes"], file["sha256"]
            )
    raise Conflict(
        f"dataset {dataset.id} is {dataset.status.value} and has no {view} rows",
        code="dataset_not_ready",
        hint=f"read GET {report_url(dataset.id)}",
        retryable=dataset.status is DatasetStatus.VALIDATING,
    )


def _rows(stored: StoredFile, *, after: int, limit: int) -> list[RowView]:
    with os.fdopen(open_inside(stored), "rb") as file:
        lines = islice(enumerate(file, start=1), after, after + limit)
        return [RowView(number=number, row=orjson.loads(line)) for number, line in lines]
