"""What a recommendation is asked for with: JSON that names a dataset, or a form that brings one."""

import re
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field, ValidationError

from app.dataset_uploads import UPLOAD_FIELDS, discarded_on_error, store_upload
from app.errors import validation_detail
from app.fine_tuning import DatasetId, Metadata, ModelName, Seed
from app.uploads import Upload
from core.errors import InvalidInput, MalformedRequest
from core.hub import resolve
from core.ids import new_id
from core.lifecycle import JobKind
from core.run_spec import DatasetPolicy
from core.settings import Settings
from core.spec import SpecModel
from models.repositories.jobs import ID_OF_KIND, JobRepository
from models.session import Database

FIELDS = frozenset({"model", "seed", "metadata", "name", "policy"})


class CreateRecommendation(SpecModel):
    """Which data, under which model."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"dataset_id": "ds_01jd", "model": "tiny-lm", "seed": 7}]}
    )

    dataset_id: DatasetId
    model: ModelName
    seed: Seed = 0
    metadata: Metadata = Field(default_factory=dict)


RECOMMENDATION_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": CreateRecommendation.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "model"],
                    "additionalProperties": False,
                    "properties": {
                        **UPLOAD_FIELDS,
                        "model": {"type": "string", "minLength": 1, "maxLength": 512},
                        "seed": {"type": "integer", "minimum": 0},
                        "metadata": {"type": "string", "contentMediaType": "application/json"},
                    },
                },
                "examples": {
                    "upload": {
                        "value": {
                            "file": '{"prompt": "2+2?", "chosen": "4", "rejected": "5"}',
                            "model": "tiny-lm",
                        }
                    }
                },
            },
        },
    }
}


async def receive_json(request: Request) -> CreateRecommendation:
    """Return the JSON body of a request.

    Raises:
        MalformedRequest: it is not JSON.
        RequestValidationError: a field is wrong or unknown.
    """
    body = await request.body()
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(
            f"the body is not valid JSON: {error}", hint="send one JSON object, UTF-8"
        ) from error
    try:
        return CreateRecommendation.model_validate(data)
    except ValidationError as error:
        found = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        raise RequestValidationError(found, body=data) from error


def store_form(
    database: Database, upload: Upload, settings: Settings, *, dataset_id: str, owner_id: str
) -> str:
    """Make the dataset of a form and, behind its validation, the recommendation; return its id.

    Both are made or none; of none the file is removed.

    Raises:
        InvalidInput: a field of the form is not valid.
        UnsupportedMedia: the file begins like something that is not read.
    """
    with discarded_on_error(upload):
        asked = _asked(upload, dataset_id)
        spec: dict[str, Any] = {"model": resolve(asked.model, settings).model_dump(mode="json")}
        job_id = new_id(ID_OF_KIND[JobKind.RECOMMENDATION])
        with database.transaction() as session:
            dataset = store_upload(session, upload, dataset_id=dataset_id, owner_id=owner_id)
            if DatasetPolicy.model_validate(dataset.policy).dry_run:
                raise InvalidInput(
                    "a dry run keeps no pairs to recommend from: drop dry_run, or POST the file "
                    "to /v1/datasets",
                    param="policy",
                )
            JobRepository(session).create(
                owner_id=owner_id,
                kind=JobKind.RECOMMENDATION,
                spec=spec,
                job_id=job_id,
                dataset_id=dataset_id,
                model=asked.model,
                seed=asked.seed,
                metadata=asked.metadata,
                after_validation=True,
            )
    return job_id


def _asked(upload: Upload, dataset_id: str) -> CreateRecommendation:
    """Return what the fields of a form say; they are texts, `metadata` is JSON text."""
    data: dict[str, Any] = {
        name: upload.fields[name] for name in ("model", "seed") if name in upload.fields
    }
    if re.fullmatch(r"-?[0-9]{1,20}", data.get("seed", "")):
        data["seed"] = int(data["seed"])
    if "metadata" in upload.fields:
        try:
            data["metadata"] = orjson.loads(upload.fields["metadata"])
        except orjson.JSONDecodeError as error:
            raise InvalidInput(
                f"metadata is not valid JSON: {error}",
                param="metadata",
                hint='metadata is JSON text such as {"run": "first"}',
            ) from error
    try:
        return CreateRecommendation.model_validate({**data, "dataset_id": dataset_id})
    except ValidationError as error:
        details = [
            validation_detail({**item, "loc": ("body", *item["loc"])}, data)
            for item in error.errors()
        ]
        first = details[0]
        name = (first.pointer or "").split("/")[1:2]
        raise InvalidInput(
            f"{first.pointer or 'the form'}: {first.detail}",
            param=name[0] if name else None,
            errors=details,
            hint="curl -F file=@data.jsonl -F model=NAME sends what is needed",
        ) from error
