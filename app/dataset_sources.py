"""A dataset that names its source: what the JSON body is, and the job that will fetch it."""

from typing import Annotated, Any

import orjson
from fastapi import Request
from pydantic import Field, ValidationError

from app.errors import validation_detail
from core.errors import InvalidInput, MalformedRequest, TooLarge
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
from models.repositories.jobs import ID_OF_KIND
from models.session import Database

MAX_BODY_BYTES = 64 * 1024
SOURCE_BODY: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["source"],
        "additionalProperties": False,
        "properties": {
            "source": {
                "oneOf": [
                    {"$ref": f"#/components/schemas/{model.__name__}"}
                    for model in (HuggingFaceSource, HttpsSource, PathSource)
                ]
            },
            "name": {"type": "string", "minLength": 1, "maxLength": 200},
            "policy": {"$ref": "#/components/schemas/DatasetPolicy"},
        },
    },
    "examples": {
        "hub": {
            "value": {
                "source": {
                    "type": "huggingface",
                    "repo_id": "trl-lib/ultrafeedback_binarized",
                    "split": "train",
                }
            }
        }
    },
}


class DatasetFromSource(SpecModel):
    """The body of a request for a dataset that the server fetches."""

    source: DatasetSource
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    policy: DatasetPolicy = DatasetPolicy()


def is_json(request: Request) -> bool:
    """Whether the request's body says that it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "application/json"


async def receive_source(request: Request) -> DatasetFromSource:
    """Return the body of a request that names a source.

    Raises:
        TooLarge: it is longer than any source needs.
        MalformedRequest: it is not JSON.
        InvalidInput: a field is wrong or unknown.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes, the limit for JSON")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from error
    try:
        made = DatasetFromSource.model_validate_json(bytes(body))
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
    return made


def store_source(
    database: Database,
    body: DatasetFromSource,
    settings: Settings,
    *,
    dataset_id: str,
    owner_id: str,
) -> None:
    """Make the dataset and the job that fetches and validates it, in one transaction.

    Raises:
        NotPermitted: this server takes nothing from there.
        InvalidInput: no such secret, or no such URL can be.
    """
    check_source(body.source, settings)
    job_id = new_id(ID_OF_KIND[JobKind.DATASET])
    with database.transaction() as session:
        datasets = DatasetRepository(session)
        dataset = datasets.create(
            dataset_id=dataset_id,
            owner_id=owner_id,
            job_id=job_id,
            name=body.name or _name_of(body.source),
            size_bytes=None,
            sha256=None,
            source=body.source.model_dump(mode="json"),
            policy=body.policy.model_dump(mode="json"),
        )
        datasets.queue_validation(dataset)


def _name_of(source: HuggingFaceSource | HttpsSource | PathSource) -> str:
    match source:
        case HuggingFaceSource(repo_id=repo_id):
            text = repo_id
        case HttpsSource(url=url):
            text = url.partition("?")[0].rstrip("/").rpartition("/")[2]
        case PathSource(path=path):
            text = path.rstrip("/").rpartition("/")[2]
    return "".join(c for c in text if c.isprintable())[:200] or source.type
