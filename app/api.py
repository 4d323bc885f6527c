"""Mounts every router of the API under /v1."""

from fastapi import APIRouter

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


def v1_router() -> APIRouter:
    """Return all of `/v1`; every endpoint documents the problem body as its error."""
    router = APIRouter(prefix="/v1", responses=PROBLEM_RESPONSES)
    # Paths are tried in this order: those of jobs, which clients poll, come first.
    for domain in (
        fine_tuning, jobs, recommendations, datasets, dataset_rows, dataset_versions,
        studies, study_quote, study_changes,
        checkpoints, checkpoint_downloads, files, upload_sessions,
        webhooks, evaluations,
        api_keys, usage, workers, audit, catalog,
    ):  # fmt: skip
        router.include_router(domain.router)
    router.include_router(checkpoint_downloads.links)
    return router
