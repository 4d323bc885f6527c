"""Which jobs a list shows, as query parameters."""

from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Query, Request

from app.deps import ANY_METADATA, ID_PATTERN, METADATA_NAME, TEXT_PATTERN
from core.errors import InvalidInput
from core.lifecycle import JobKind, JobStatus
from models.repositories.job_pages import JobFilter

_MAX_LABELS = 16
_MAX_LABEL = 512
UnixTime = Annotated[int | None, Query(ge=0, lt=2**40)]


async def job_filter(
    request: Request,
    status: JobStatus | None = None,
    dataset_id: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    model: Annotated[str | None, Query(max_length=512, pattern=TEXT_PATTERN)] = None,
    created_after: UnixTime = None,
    created_before: UnixTime = None,
    _metadata: Annotated[
        str | None,
        Query(
            alias=ANY_METADATA,
            max_length=_MAX_LABEL,
            pattern=TEXT_PATTERN,
            description="only jobs with this pair in their metadata, e.g. `metadata[team]=a`; may "
            "be given for several keys",
        ),
    ] = None,
) -> JobFilter:
    """Return what listed jobs of a known kind must have.

    Raises:
        InvalidInput: a pair of metadata is one that no job can have.
    """
    return JobFilter(
        status=status,
        dataset_id=dataset_id,
        model=model,
        created_after=created_after,
        created_before=created_before,
        labels=_labels(request),
    )


Filter = Annotated[JobFilter, Depends(job_filter)]


async def any_job_filter(
    shared: Filter,
    kind: JobKind | None = None,
    parent: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="the job that the listed ones help")
    ] = None,
) -> JobFilter:
    """Return what listed jobs of any kind must have."""
    return replace(shared, kind=kind, parent_id=parent)


AnyJobFilter = Annotated[JobFilter, Depends(any_job_filter)]


def _labels(request: Request) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        found = METADATA_NAME.fullmatch(name)
        if found is None:
            continue
        if len(value) > _MAX_LABEL or "\0" in value or labels.get(found[1], value) != value:
            raise InvalidInput(
                f"{name} must be one text of at most {_MAX_LABEL} characters", param=name
            )
        labels[found[1]] = value
    if len(labels) > _MAX_LABELS:
        raise InvalidInput(
            f"received {len(labels)} pairs of metadata, a job has at most {_MAX_LABELS}",
            param="metadata",
        )
    return labels
