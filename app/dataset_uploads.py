"""Makes a dataset of a received file: the policy and name of the form, and the validation job."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.errors import validation_detail
from app.uploads import Upload
from core.errors import InvalidInput, UnsupportedMedia
from core.ids import new_id
from core.lifecycle import JobKind
from core.run_spec import DatasetPolicy
from models.dataset import Dataset
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import ID_OF_KIND

UPLOAD_FIELDS: dict[str, Any] = {
    "file": {
        "type": "string",
        "format": "binary",
        "minLength": 1,
        "description": "preference data: JSON Lines, a JSON array, CSV or TSV "
        "(plain, gzip, zstd, xz), Parquet, Arrow, or a zip or tar of these",
    },
    "name": {"type": "string", "maxLength": 200},
    "policy": {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": "#/components/schemas/DatasetPolicy"},
    },
}
"""The parts of a multipart body that uploads a dataset, for the OpenAPI description."""

# What is refused before anything is stored; validation knows all containers.
_MAGIC = (
    (b"BZh", "bzip2", "decompress it first: bzip2 -d file.bz2"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "unpack it and upload the file inside"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 in > out"),
)


@contextmanager
def discarded_on_error(upload: Upload) -> Iterator[None]:
    """Remove the received file when the block raises."""
    try:
        yield
    except BaseException:
        upload.path.unlink(missing_ok=True)
        raise


def store_upload(
    session: Session, upload: Upload, *, dataset_id: str, owner_id: str, dry_run: bool = False
) -> Dataset:
    """Make the dataset of a form's file, and the job that validates it; return the dataset.

    Raises:
        InvalidInput: the fields `policy` or `name` of the form are not valid.
        UnsupportedMedia: the file begins like something that is not read.
    """
    policy = _policy(upload.fields.get("policy"))
    return store_received(
        session,
        upload,
        dataset_id=dataset_id,
        owner_id=owner_id,
        name=_name(upload, dataset_id),
        policy=policy.model_copy(update={"dry_run": True}) if dry_run else policy,
    )


def store_received(
    session: Session,
    upload: Upload,
    *,
    dataset_id: str,
    owner_id: str,
    name: str,
    policy: DatasetPolicy,
) -> Dataset:
    """Make the dataset of bytes that lie under its id, and the job that validates it.

    Raises:
        UnsupportedMedia: they begin like something that is not read.
    """
    _refuse_container(upload.path)
    job_id = new_id(ID_OF_KIND[JobKind.DATASET])
    datasets = DatasetRepository(session)
    dataset = datasets.create(
        dataset_id=dataset_id,
        owner_id=owner_id,
        job_id=job_id,
        name=name,
        size_bytes=upload.size_bytes,
        sha256=upload.sha256,
        policy=policy.model_dump(mode="json"),
    )
    datasets.queue_validation(dataset)
    return dataset


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


def _refuse_container(path: Path) -> None:
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
