"""Steps of a job: what succeeded is remembered and never done again."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from core.lifecycle import EventType, StepStatus
from models.job import Job, JobStep
from models.repositories.events import append_event
from models.repositories.jobs import Fence, JobRepository
from models.types import db_now

# Asked with every poll of a job: it is put together once.
_OF_JOBS = (
    select(JobStep)
    .where(JobStep.job_id.in_(bindparam("job_ids", expanding=True)))
    .order_by(JobStep.position)
)


class StepRepository:
    """Reads and fenced writes of steps in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def plan(self, fence: Fence, names: list[str]) -> None:
        """Write down the steps of a job once; later attempts find them."""
        JobRepository(self._session).guard(fence)
        if self.of_job(fence.job_id):
            return
        for position, name in enumerate(names):
            self._session.add(
                JobStep(
                    job_id=fence.job_id, position=position, name=name, status=StepStatus.PENDING
                )
            )
        self._session.flush()

    def of_job(self, job_id: str) -> list[JobStep]:
        """Return the steps in order."""
        statement = select(JobStep).where(JobStep.job_id == job_id).order_by(JobStep.position)
        return list(self._session.execute(statement).scalars())

    def of_jobs(self, jobs: Collection[Job]) -> dict[str, list[JobStep]]:
        """Return the steps of many jobs, those of each in order; an attempt writes them down."""
        found: dict[str, list[JobStep]] = {job.id: [] for job in jobs}
        job_ids = [job.id for job in jobs if job.attempt > 0]
        if not job_ids:
            return found
        for step in self._session.execute(_OF_JOBS, {"job_ids": job_ids}).scalars():
            found[step.job_id].append(step)
        return found

    def start(self, fence: Fence, name: str) -> None:
        """Mark a step as running."""
        JobRepository(self._session).guard(fence)
        step = self._one(fence.job_id, name)
        step.status = StepStatus.RUNNING
        if step.started_at is None:
            step.started_at = db_now()
        append_event(
            self._session, fence.job_id, EventType.JOB_STEP, f"Step `{name}` has started.",
            data={"step": name, "status": StepStatus.RUNNING.value},
        )  # fmt: skip

    def succeed(self, fence: Fence, name: str, result: dict[str, Any]) -> None:
        """Mark a step as done and keep its result for later steps and attempts."""
        jobs = JobRepository(self._session)
        jobs.guard(fence)
        step = self._one(fence.job_id, name)
        step.status = StepStatus.SUCCEEDED
        step.result = result
        step.finished_at = db_now()
        jobs.progressed(fence)
        append_event(
            self._session, fence.job_id, EventType.JOB_STEP, f"Step `{name}` is done.",
            data={"step": name, "status": StepStatus.SUCCEEDED.value},
        )  # fmt: skip

    def _one(self, job_id: str, name: str) -> JobStep:
        statement = select(JobStep).where(JobStep.job_id == job_id, JobStep.name == name)
        return self._session.execute(statement).scalar_one()
