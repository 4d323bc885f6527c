"""What becomes of a dataset: another version of it, another name, its end."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field, field_validator
from starlette.concurrency import run_in_threadpool

from app.dataset_views import DatasetId, DatasetView, dataset_view
from app.datasets import dataset_answer, is_settled, read_dataset
from app.deps import (
    Config,
    Db,
    IfMatch,
    Lists,
    PageOf,
    Patience,
    Prefer,
    Queue,
    ReadsDatasets,
    WritesDatasets,
)
from app.queue import relay_now
from app.responses import ListOf, check_if_match, wait_until, with_etag
from core.errors import Conflict, InvalidInput
from core.ids import IdPrefix, new_id
from core.lifecycle import JobKind
from core.run_spec import DatasetPolicy
from core.settings import Settings
from core.spec import SpecModel
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import ID_OF_KIND
from models.session import Database

router = APIRouter(prefix="/datasets", tags=["datasets"])


class CreateVersion(SpecModel):
    """How the upload of a dataset is to be read this time."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"policy": {"column_mapping": {"chosen": "good", "rejected": "bad"}}},
                {"policy": {"pairing": "all", "max_pairs_per_prompt": 4}, "name": "all pairs"},
            ]
        }
    )

    policy: DatasetPolicy = Field(
        description="the whole policy: what it does not say is as usual, not as it was"
    )
    name: str | None = Field(
        default=None, min_length=1, max_length=200, description="null: that of the dataset"
    )


class UpdateDataset(SpecModel):
    """What can be changed of a dataset."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "support chats, March"}]})

    name: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="null: as it is"
    )

    @field_validator("name")
    @classmethod
    def _can_be_shown(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("expected printable characters")
        return value


@router.post(
    "/{dataset_id}/versions",
    operation_id="create_dataset_version",
    response_model=DatasetView,
    responses={202: {"model": DatasetView, "description": "Still being validated"}},
)
async def create_dataset_version(
    request: Request,
    caller: WritesDatasets,
    database: Db,
    queue: Queue,
    settings: Config,
    prefer: Prefer,
    dataset_id: DatasetId,
    body: CreateVersion,
) -> Response:
    """Read the upload of a dataset again under another policy, as a dataset of its own.

    The bytes are shared and the dataset stays as it is. A policy that the upload has been read
    under already gives the version that there is.
    """
    made = await run_in_threadpool(
        _create, database, body, settings, owner_id=caller.owner_id, dataset_id=dataset_id
    )
    await run_in_threadpool(relay_now, database, queue)
    patience = prefer or Patience(settings.api.wait_default_s, preferred=False)
    await wait_until(lambda: is_settled(database, caller.owner_id, made), patience.seconds)
    view = await run_in_threadpool(read_dataset, database, caller.owner_id, made)
    return dataset_answer(request, view, patience.headers())


@router.get("/{dataset_id}/versions", operation_id="list_dataset_versions")
def list_dataset_versions(
    caller: ReadsDatasets, database: Db, query: PageOf, lists: Lists, dataset_id: DatasetId
) -> ListOf[DatasetView]:
    """List all versions of a dataset's upload, newest first, whichever of them is named."""
    with database.reading() as session:
        page = DatasetRepository(session).version_page(caller.owner_id, dataset_id, query)
        views = [dataset_view(row) for row in page.rows]
    return lists.page(views, [view.id for view in views], has_more=page.has_more)


@router.patch("/{dataset_id}", operation_id="update_dataset", response_model=DatasetView)
def update_dataset(
    caller: WritesDatasets,
    database: Db,
    dataset_id: DatasetId,
    body: UpdateDataset,
    if_match: IfMatch = None,
) -> Response:
    """Give a dataset another name; how it is read makes a new version instead."""
    with database.transaction() as session:
        dataset = DatasetRepository(session).lock(caller.owner_id, dataset_id)
        check_if_match(if_match, dataset_view(dataset))
        dataset.name = body.name or dataset.name
        view = dataset_view(dataset)
    return with_etag(view)


@router.delete(
    "/{dataset_id}",
    operation_id="delete_dataset",
    status_code=204,
    responses={204: {"description": "Deleted; its files go within minutes"}},
)
def delete_dataset(caller: WritesDatasets, database: Db, dataset_id: DatasetId) -> None:
    """Delete a dataset and its rows, unless a job that has not ended names it.

    The upload goes with its last version. What jobs have made of the data stays.
    """
    with database.transaction() as session:
        DatasetRepository(session).delete(caller.owner_id, dataset_id)


def _create(
    database: Database, body: CreateVersion, settings: Settings, *, owner_id: str, dataset_id: str
) -> str:
    """Return the id of the version that has the policy; made now unless there is one.

    Raises:
        NotFound: no such dataset.
        Conflict: the upload is not on this server any more.
    """
    if body.name is not None and not body.name.isprintable():
        raise InvalidInput("name must have 1 to 200 printable characters", param="name")
    made, job_id = new_id(IdPrefix.DATASET), new_id(ID_OF_KIND[JobKind.DATASET])
    with database.transaction() as session:
        datasets = DatasetRepository(session)
        parent = datasets.lock_versions(owner_id, dataset_id)
        known = datasets.version_with(parent, body.policy)
        if known is not None:
            return known.id
        if parent.source is None and not (settings.upload_dir / parent.upload_id).is_file():
            raise Conflict(
                f"the upload of dataset {dataset_id} is not on this server any more",
                code="upload_gone",
                hint="send the file again: POST /v1/datasets",
            )
        version = datasets.add_version(
            parent,
            dataset_id=made,
            job_id=job_id,
            name=body.name or parent.name,
            policy=body.policy.model_dump(mode="json"),
        )
        datasets.queue_validation(version)
    return made
