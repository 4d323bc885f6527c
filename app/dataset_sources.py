"""A dataset whose JSON body says where its rows are: at an address, in a file, or in the body."""

import hashlib
import json
from typing import Annotated, Any, Literal, assert_never

import orjson
from fastapi import Request
from pydantic import ConfigDict, Field, ValidationError

from app.dataset_uploads import discarded_on_error, store_received
from app.deps import ID_PATTERN
from app.errors import validation_detail
from app.file_store import link
from app.uploads import (
    FULL_ERRORS,
    PART_SUFFIX,
    Upload,
    create_private,
    make_room,
    no_room,
    publish,
    sync,
)
from core.errors import InvalidInput, MalformedRequest, NotFound
from core.ids import new_id
from core.lifecycle import JobKind
from core.run_spec import DatasetPolicy
from core.settings import Settings
from core.sources import (
    DatasetSource,
    HttpsSource,
    HuggingFaceSource,
    PathSource,
    check_source,
)
from core.spec import SpecModel
from models.repositories.datasets import DatasetRepository
from models.repositories.files import FileRepository
from models.repositories.jobs import ID_OF_KIND
from models.session import Database

MAX_INLINE_ROWS = 10_000


class InlineSource(SpecModel):
    """The rows themselves, for a few; they are kept as if a file of JSON Lines had been sent."""

    type: Literal["inline"]
    rows: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_INLINE_ROWS)


class FileSource(SpecModel):
    """A file that was sent to `/v1/files`, of any purpose; either can be deleted alone."""

    type: Literal["file"]
    file_id: str = Field(pattern=ID_PATTERN)


class DatasetFromSource(SpecModel):
    """What a dataset is to be made of when no file comes with the request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "source": {
                        "type": "huggingface",
                        "repo_id": "trl-lib/ultrafeedback_binarized",
                        "split": "train",
                    }
                },
                {"source": {"type": "file", "file_id": "file-01jd"}, "name": "read once more"},
                {
                    "source": {
                        "type": "inline",
                        "rows": [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}],
                    },
                    "policy": {"dry_run": True},
                },
            ]
        }
    )

    source: Annotated[
        HuggingFaceSource | HttpsSource | PathSource | FileSource | InlineSource,
        Field(discriminator="type"),
    ]
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    policy: DatasetPolicy = DatasetPolicy()


SOURCE_BODY: dict[str, Any] = {"schema": {"$ref": "#/components/schemas/DatasetFromSource"}}


def is_json(request: Request) -> bool:
    """Whether the request's body says that it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "application/json"


async def receive_source(request: Request, *, dry_run: bool) -> DatasetFromSource:
    """Return the body of a request that names a source.

    Raises:
        MalformedRequest: it is not JSON.
        InvalidInput: a field is wrong or unknown.
    """
    body = await request.body()
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from error
    try:
        made = DatasetFromSource.model_validate_json(body)
    except ValidationError as error:
        details = [
            validation_detail({**item, "loc": ("body", *item["loc"])}, data)
            for item in error.errors()
        ]
        raise InvalidInput(
            f"{details[0].pointer or 'body'}: {details[0].detail}",
            param=(details[0].pointer or "").lstrip("/").replace("/", ".") or None,
            errors=details,
            hint='expected {"source": {"type": "huggingface", "repo_id": "organisation/name"}}',
        ) from error
    if made.name is not None and not made.name.isprintable():
        raise InvalidInput("name must have 1 to 200 printable characters", param="name")
    if dry_run:
        policy = made.policy.model_copy(update={"dry_run": True})
        return made.model_copy(update={"policy": policy})
    return made


def store_source(
    database: Database,
    body: DatasetFromSource,
    settings: Settings,
    *,
    dataset_id: str,
    owner_id: str,
) -> None:
    """Make the dataset and the job that validates it, in one transaction.

    What is fetched from elsewhere is fetched by the job; what is here becomes an upload at once.

    Raises:
        NotPermitted: this server takes nothing from there.
        InvalidInput: no such secret, or no such URL can be.
        NotFound: no such file.
    """
    match body.source:
        case InlineSource(rows=rows):
            upload = _write_rows(rows, settings, dataset_id)
            _store_given(database, body, upload, dataset_id=dataset_id, owner_id=owner_id)
        case FileSource(file_id=file_id):
            upload = _linked_file(database, settings, file_id, dataset_id, owner_id)
            _store_given(database, body, upload, dataset_id=dataset_id, owner_id=owner_id)
        case HuggingFaceSource() | HttpsSource() | PathSource() as source:
            check_source(source, settings)
            _store_remote(database, body, source, dataset_id=dataset_id, owner_id=owner_id)
        case _:
            assert_never(body.source)


def _store_remote(
    database: Database,
    body: DatasetFromSource,
    source: DatasetSource,
    *,
    dataset_id: str,
    owner_id: str,
) -> None:
    job_id = new_id(ID_OF_KIND[JobKind.DATASET])
    with database.transaction() as session:
        datasets = DatasetRepository(session)
        dataset = datasets.create(
            dataset_id=dataset_id,
            owner_id=owner_id,
            job_id=job_id,
            name=body.name or _name_of(source),
            size_bytes=None,
            sha256=None,
            source=source.model_dump(mode="json"),
            policy=body.policy.model_dump(mode="json"),
        )
        datasets.queue_validation(dataset)


def _store_given(
    database: Database,
    body: DatasetFromSource,
    upload: Upload,
    *,
    dataset_id: str,
    owner_id: str,
) -> None:
    with discarded_on_error(upload), database.transaction() as session:
        store_received(
            session,
            upload,
            dataset_id=dataset_id,
            owner_id=owner_id,
            name=body.name or upload.filename or dataset_id,
            policy=body.policy,
        )


def _write_rows(rows: list[dict[str, Any]], settings: Settings, dataset_id: str) -> Upload:
    # Not by orjson, which knows no integers of more than 64 bits.
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    target = settings.upload_dir / dataset_id
    temporary = target.with_name(f".{dataset_id}{PART_SUFFIX}")
    make_room(target.parent, len(data))
    try:
        with create_private(temporary) as file:
            file.write(data)
            sync(file)
        publish(temporary, target)
    except OSError as error:
        if error.errno not in FULL_ERRORS:
            raise
        raise no_room() from error
    finally:
        temporary.unlink(missing_ok=True)
    return Upload(target, len(data), hashlib.sha256(data).hexdigest(), None, {})


def _linked_file(
    database: Database, settings: Settings, file_id: str, dataset_id: str, owner_id: str
) -> Upload:
    with database.reading() as session:
        row = FileRepository(session).get(owner_id, file_id)
    target = settings.upload_dir / dataset_id
    try:
        link(settings.file_dir / row.id, target)
    except FileNotFoundError as error:
        raise NotFound(f"the file {file_id!r} is gone from the server's disk") from error
    return Upload(target, row.bytes, row.sha256, row.filename[:200], {})


def _name_of(source: HuggingFaceSource | HttpsSource | PathSource) -> str:
    match source:
        case HuggingFaceSource(repo_id=repo_id):
            text = repo_id
        case HttpsSource(url=url):
            text = url.partition("?")[0].rstrip("/").rpartition("/")[2]
        case PathSource(path=path):
            text = path.rstrip("/").rpartition("/")[2]
    return "".join(c for c in text if c.isprintable())[:200] or source.type
