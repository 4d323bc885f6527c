"""Mounts every router of the API under /v1."""

from fastapi import FastAPI

from app import (
    api_keys,
    audit,
    catalog,
    checkpoint_downloads,
    checkpoints,
    dataset_rows,
    dataset_versions,
    datasets,
    evaluations,
    files,
    fine_tuning,
    jobs,
    recommendations,
    studies,
    study_changes,
    study_quote,
    upload_sessions,
    usage,
    webhooks,
    workers,
)
from app.openapi import PROBLEM_RESPONSES


def include_v1(app: FastAPI) -> None:
    """Mount all of `/v1`; every endpoint documents the problem body as its error."""
    # Paths are tried in this order, so those of jobs, which clients poll, come first. A router of
    # all of them between would be asked for all its routes with every request.
    for router in (
        *(
            domain.router
            for domain in (
                fine_tuning, jobs, recommendations, datasets, dataset_rows, dataset_versions,
                studies, study_quote, study_changes,
                checkpoints, checkpoint_downloads, files, upload_sessions,
                webhooks, evaluations,
                api_keys, usage, workers, audit, catalog,
            )
        ),
        checkpoint_downloads.links,
    ):  # fmt: skip
        app.include_router(router, prefix="/v1", responses=PROBLEM_RESPONSES)
