"""A page of jobs costs as many queries as one job that waits and one that runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from app.job_views import any_job, any_jobs, fine_tuning_job, fine_tuning_jobs
from core.lifecycle import JobKind, JobStatus
from models.repositories.jobs import JobRepository
from models.repositories.paging import PageQuery
from tests.integration.api_world import World, running_api


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(database_url, tmp_path) as made:
        yield made


def test_page_of_many_jobs_takes_the_queries_of_few(world: World) -> None:
    dataset = world.dataset()
    for _ in range(6):
        world.training_job(dataset)
    first = world.claim(JobKind.TRAINING)
    statements: list[str] = []

    def note(*arguments: object) -> None:
        statements.append(str(arguments[2]))

    event.listen(world.database.engine, "before_cursor_execute", note)
    try:
        with world.database.reading() as session:
            owner_id = JobRepository(session).load(first).owner_id
            rows = list(JobRepository(session).page(owner_id, PageQuery()).rows)
            training = [job for job in rows if job.kind is JobKind.TRAINING]
            assert len(training) == 6
            for all_views, one_view, jobs in (
                (any_jobs, any_job, rows),
                (fine_tuning_jobs, fine_tuning_job, training),
            ):
                few = [
                    next(job for job in jobs if job.status is status)
                    for status in (JobStatus.QUEUED, JobStatus.RUNNING)
                ]
                statements.clear()
                views = all_views(session, jobs)
                many = len(statements)
                statements.clear()
                all_views(session, few)
                assert many == len(statements)
                assert views == [one_view(session, job) for job in jobs]
    finally:
        event.remove(world.database.engine, "before_cursor_execute", note)
