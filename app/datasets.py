"""Datasets: upload, validate, report, look at rows."""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from app.dataset_sources import SOURCE_BODY, is_json, receive_source, store_source
from app.dataset_views import (
    DatasetView,
    Failure,
    ReportView,
    RowView,
    dataset_view,
    report_url,
    report_view,
)
from app.deps import (
    ID_PATTERN,
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
from app.errors import problem_response, status_of, validation_detail
from app.queue import relay_now
from app.responses import ListOf, conditional, json_response, list_of, next_page, wait_until
from app.uploads import Upload, receive_upload
from core.errors import Conflict, InvalidInput, UnsupportedMedia
from core.ids import IdPrefix, new_id
from core.lifecycle import DatasetStatus, JobKind
from core.run_spec import DatasetPolicy
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import ID_OF_KIND, JobRepository
from models.session import Database

router = APIRouter(prefix="/datasets", tags=["datasets"])

DatasetId = Annotated[str, Path(pattern=ID_PATTERN)]
FIELDS = frozenset({"name", "policy"})

# What is refused before anything is stored; validation knows all containers.
_MAGIC = (
    (b"BZh", "bzip2", "decompress it first: bzip2 -d file.bz2"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "unpack it and upload the file inside"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
)
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "preference data: JSON Lines, a JSON array, CSV or TSV "
                            "(plain, gzip, zstd, xz), Parquet, Arrow, or a zip or tar of these",
                        },
                        "name": {"type": "string", "maxLength": 200},
                        "policy": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {"$ref": "#/components/schemas/DatasetPolicy"},
                        },
                    },
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
) -> Response:
    """Take preference pairs as a file, or as JSON that names a source (a hub repository, an https
    address, a path on the server); validate them, and answer when that is done or time is up.
    """
    names = {"dataset_id": new_id(IdPrefix.DATASET), "owner_id": caller.owner_id}
    dataset_id = names["dataset_id"]
    if is_json(request):
        source = await receive_source(request)
        await run_in_threadpool(store_source, database, source, settings, **names)
    else:
        upload = await receive_upload(
            request,
            settings.upload_dir / dataset_id,
            max_bytes=settings.api.max_upload_bytes,
            fields=FIELDS,
        )
        await run_in_threadpool(_store, database, upload, **names)
    await run_in_threadpool(relay_now, database, queue)
    patience = prefer or Patience(settings.api.wait_default_s, preferred=False)
    await wait_until(lambda: _is_settled(database, caller.owner_id, dataset_id), patience.seconds)
    view = await run_in_threadpool(_read, database, caller.owner_id, dataset_id)
    return _answer(request, view, patience.headers())


def _store(database: Database, upload: Upload, *, dataset_id: str, owner_id: str) -> None:
    """Make the dataset and its job in one transaction; the file goes when that fails."""
    try:
        policy = _policy(upload.fields.get("policy"))
        name = _name(upload, dataset_id)
        _refuse_container(upload.path)
        job_id = new_id(ID_OF_KIND[JobKind.DATASET])
        with database.transaction() as session:
            DatasetRepository(session).create(
                dataset_id=dataset_id,
                owner_id=owner_id,
                job_id=job_id,
                name=name,
                size_bytes=upload.size_bytes,
                sha256=upload.sha256,
                policy=policy.model_dump(mode="json"),
            )
            JobRepository(session).create(
                owner_id=owner_id,
                kind=JobKind.DATASET,
                spec={"dataset_id": dataset_id},
                job_id=job_id,
                dataset_id=dataset_id,
            )
    except BaseException:
        upload.path.unlink(missing_ok=True)
        raise


def _policy(text: str | None) -> DatasetPolicy:
    if text is None:
        return DatasetPolicy()
    try:
        return DatasetPolicy.model_validate_json(text)
    except ValidationError as error:
        details = [
            validation_detail({**item, "loc": ("body", *item["loc"])}, _loads(text))
            for item in error.errors()
        ]
        raise InvalidInput(
            f"policy{details[0].pointer or ''}: {details[0].detail}",
            param="policy",
            errors=details,
            hint='policy is JSON text such as {"on_invalid": "fail"}',
        ) from error


def _loads(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _name(upload: Upload, dataset_id: str) -> str:
    name = upload.fields.get("name")
    if name is None:
        printable = "".join(c for c in upload.filename or "" if c.isprintable())
        return printable[:200] or dataset_id
    if not 1 <= len(name) <= 200 or not name.isprintable():
        raise InvalidInput("name must have 1 to 200 printable characters", param="name")
    return name


def _refuse_container(path: FilePath) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, container, hint in _MAGIC:
        if start.startswith(magic):
            raise UnsupportedMedia(
                f"received {container}, expected JSON Lines, a JSON array, CSV, Parquet or Arrow, "
                "or a zip or tar of these",
                param="file",
                hint=hint,
            )


def _read(database: Database, owner_id: str, dataset_id: str) -> DatasetView:
    with database.reading() as session:
        return dataset_view(DatasetRepository(session).get(owner_id, dataset_id))


def _is_settled(database: Database, owner_id: str, dataset_id: str) -> bool:
    view = _read(database, owner_id, dataset_id)
    return view.error is not None or view.status is not DatasetStatus.VALIDATING


def _answer(request: Request, view: DatasetView, headers: Mapping[str, str]) -> Response:
    url = f"/v1/datasets/{view.id}"
    if view.status is DatasetStatus.VALIDATING:
        return json_response(view, status=202, headers={"Location": url, **headers})
    if view.error is not None:
        return _refused(request, view, view.error)
    return json_response(view, headers={"Location": url, **headers})


def _refused(request: Request, view: DatasetView, failure: Failure) -> Response:
    return problem_response(
        request,
        status=status_of(failure.category),
        code=failure.code,
        detail=failure.message,
        hint=failure.hint,
        param=failure.param,
        retryable=failure.retryable,
        errors=failure.details(),
        extra={"dataset_id": view.id, "report_url": report_url(view.id)},
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


@router.get("/{dataset_id}", operation_id="get_dataset", response_model=DatasetView)
def get_dataset(
    request: Request, caller: ReadsDatasets, database: Db, dataset_id: DatasetId
) -> Response:
    """Return one dataset; its ETag makes polling cheap."""
    return conditional(request, _read(database, caller.owner_id, dataset_id))


@router.get("/{dataset_id}/report", operation_id="get_dataset_report", response_model=ReportView)
def get_dataset_report(
    request: Request, caller: ReadsDatasets, database: Db, dataset_id: DatasetId
) -> Response:
    """Return what validation found: layout, counts, every kind of error, lint, a preview."""
    with database.reading() as session:
        dataset = DatasetRepository(session).get(caller.owner_id, dataset_id)
    return conditional(request, report_view(dataset))


@router.get(
    "/{dataset_id}/rows",
    operation_id="list_dataset_rows",
    response_model=ListOf[RowView],
    responses={200: {"content": {"application/jsonl": {}}}},
)
def list_dataset_rows(
    request: Request,
    caller: ReadsDatasets,
    database: Db,
    settings: Config,
    dataset_id: DatasetId,
    view: Literal["canonical", "rejected"] = "canonical",
    form: Annotated[Literal["json", "jsonl"], Query(alias="format")] = "json",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[int, Query(ge=0, description="`number` of the last row seen")] = 0,
) -> Response:
    """Return rows as kdpo reads them, or those that it rejected; `jsonl` streams all of them."""
    with database.reading() as session:
        dataset = DatasetRepository(session).get(caller.owner_id, dataset_id)
    path = settings.artifact_dir / "datasets" / dataset.id / f"{view}.jsonl"
    if not path.is_file():
        raise Conflict(
            f"dataset {dataset_id} is {dataset.status.value} and has no {view} rows",
            code="dataset_not_ready",
            hint=f"read GET {report_url(dataset_id)}",
            retryable=dataset.status is DatasetStatus.VALIDATING,
        )
    if form == "jsonl":
        return FileResponse(path, media_type="application/jsonl", filename=f"{view}.jsonl")
    rows = _rows(path, after=after, limit=limit + 1)
    page = list_of(rows[:limit], [str(r.number) for r in rows[:limit]], has_more=len(rows) > limit)
    return json_response(page, headers=next_page(request, page))


def _rows(path: FilePath, *, after: int, limit: int) -> list[RowView]:
    rows: list[RowView] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number > after:
                rows.append(RowView(number=number, row=orjson.loads(line)))
                if len(rows) == limit:
                    break
    return rows
