"""Recommendations, studies, trials, metric points, resume points and checkpoints."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import BindParameter, CompoundSelect, bindparam, delete, null, select, union_all
from sqlalchemy.orm import Session

from core.errors import NotFound
from core.ids import IdPrefix, new_id
from core.lifecycle import EventType, TrialStatus
from models.experiment import (
    Checkpoint,
    MetricPoint,
    RecommendationRow,
    ResumePoint,
    StudyRow,
    TrialRow,
)
from models.job import Job
from models.repositories.events import append_event
from models.repositories.jobs import Fence, JobRepository
from models.repositories.paging import Page, PageQuery, fetch_page

_NAMED: BindParameter[str] = bindparam("job_ids", expanding=True)
# Asked with every poll of a job: it is put together once.
_MADE: CompoundSelect[str, str | None, Any, str | None] = union_all(
    select(StudyRow.job_id, StudyRow.id, StudyRow.quotes, null()).where(
        StudyRow.job_id.in_(_NAMED)
    ),
    select(RecommendationRow.job_id, null(), null(), RecommendationRow.id).where(
        RecommendationRow.job_id.in_(_NAMED)
    ),
)


@dataclass(frozen=True)
class Made:
    """What a job has made besides checkpoints; `quotes` are those of its study."""

    study_id: str | None = None
    quotes: Sequence[Mapping[str, Any]] = ()
    recommendation_id: str | None = None


class ExperimentRepository:
    """Reads, and writes fenced by the attempt that makes them, in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._jobs = JobRepository(session)

    # --------------------------------------------------------- recommendation

    def save_recommendation(
        self, fence: Fence, *, owner_id: str, dataset_id: str, model: str, result: dict[str, Any]
    ) -> RecommendationRow:
        """Store the recommendation of a job; a later attempt replaces it."""
        self._jobs.guard(fence)
        row = self.recommendation_of(fence.job_id)
        if row is None:
            is_own_job = fence.job_id.startswith(IdPrefix.RECOMMENDATION.value)
            row = RecommendationRow(
                id=fence.job_id if is_own_job else new_id(IdPrefix.RECOMMENDATION),
                owner_id=owner_id,
                job_id=fence.job_id,
                dataset_id=dataset_id,
                model=model,
                result=result,
            )
            self._session.add(row)
        row.result = result
        self._session.flush()
        append_event(
            self._session, fence.job_id, EventType.RECOMMENDATION_UPDATED,
            str(result.get("summary", "The recommendation is ready.")),
            data={"recommendation_id": row.id},
        )  # fmt: skip
        return row

    def recommendation_of(self, job_id: str) -> RecommendationRow | None:
        """Return the recommendation that a job made, if it has."""
        statement = select(RecommendationRow).where(RecommendationRow.job_id == job_id)
        return self._session.execute(statement).scalar_one_or_none()

    def recommendation(self, owner_id: str, recommendation_id: str) -> RecommendationRow:
        """Return the owner's recommendation, whichever job made it.

        Raises:
            NotFound: no such recommendation, or somebody else's.
        """
        row = self._session.get(RecommendationRow, recommendation_id)
        if row is None or row.owner_id != owner_id:
            raise NotFound(
                f"no recommendation {recommendation_id!r}",
                hint="GET /v1/recommendations lists them",
            )
        return row

    # ------------------------------------------------------- studies and trials

    def study_of(self, job_id: str) -> StudyRow | None:
        """Return the job's study, if it has one."""
        statement = select(StudyRow).where(StudyRow.job_id == job_id)
        return self._session.execute(statement).scalar_one_or_none()

    def made_by(self, jobs: Collection[Job]) -> dict[str, Made]:
        """Return what attempts at the jobs have made, of those that have made something."""
        found: dict[str, Made] = {}
        job_ids = [job.id for job in jobs if job.attempt > 0]
        if not job_ids:
            return found
        rows = self._session.execute(_MADE, {"job_ids": job_ids})
        for job_id, study_id, quotes, recommendation_id in rows:
            known = found.get(job_id, Made())
            if study_id is None:
                found[job_id] = replace(known, recommendation_id=recommendation_id)
            else:
                found[job_id] = replace(known, study_id=study_id, quotes=quotes)
        return found

    def study(self, owner_id: str, study_id: str) -> StudyRow:
        """Return the owner's study.

        Raises:
            NotFound: no such study, or somebody else's.
        """
        row = self._session.get(StudyRow, study_id)
        if row is None or row.owner_id != owner_id:
            raise NotFound(
                f"no study {study_id!r}", hint="a fine-tuning job names its study in `study_id`"
            )
        return row

    def trials(self, study_id: str) -> list[TrialRow]:
        """Return the trials of a study in order."""
        statement = select(TrialRow).where(TrialRow.study_id == study_id).order_by(TrialRow.number)
        return list(self._session.execute(statement).scalars())

    def trials_on(self, owner_id: str, *, dataset_id: str, model: str) -> list[TrialRow]:
        """Return all ended trials of the owner's searches on a dataset under a model."""
        statement = (
            select(TrialRow)
            .join(StudyRow, StudyRow.id == TrialRow.study_id)
            .join(Job, Job.id == StudyRow.job_id)
            .where(
                Job.owner_id == owner_id,
                Job.dataset_id == dataset_id,
                Job.model == model,
                TrialRow.status.in_((TrialStatus.COMPLETE, TrialStatus.PRUNED, TrialStatus.FAIL)),
            )
            .order_by(TrialRow.id)
        )
        return list(self._session.execute(statement).scalars())

    # ----------------------------------------------------------------- metrics

    def record_metrics(
        self, fence: Fence, *, job_id: str, scope: str, step: int, values: dict[str, float]
    ) -> None:
        """Store the metrics of one step of a job's run; a resumed run writes the same row again.

        The attempt of the fence may be at a job that helps `job_id`.
        """
        self._jobs.guard(fence)
        self._session.merge(MetricPoint(job_id=job_id, scope=scope, step=step, metrics=values))
        self._session.flush()

    def copy_metrics(self, fence: Fence, *, source: str, target: str) -> bool:
        """Give a scope without metrics those of another one; return whether it had none.

        A final run that a trial has already made takes no step of its own.
        """
        self._jobs.guard(fence)
        if self.metrics(fence.job_id, target):
            return False
        for point in self.metrics(fence.job_id, source):
            self._session.add(
                MetricPoint(
                    job_id=fence.job_id, scope=target, step=point.step, metrics=point.metrics
                )
            )
        self._session.flush()
        return True

    def metrics(self, job_id: str, scope: str) -> list[MetricPoint]:
        """Return the metric points of one scope by step."""
        statement = (
            select(MetricPoint)
            .where(MetricPoint.job_id == job_id, MetricPoint.scope == scope)
            .order_by(MetricPoint.step)
        )
        return list(self._session.execute(statement).scalars())

    # ----------------------------------------------- resume points, checkpoints

    def add_resume_point(
        self,
        fence: Fence,
        *,
        job_id: str,
        scope: str,
        step: int,
        path: str,
        manifest_sha256: str,
        size_bytes: int,
    ) -> None:
        """Record a folder from which a job's run can go on.

        The attempt's job has made progress when it is further than every point that is known.
        """
        known = self.resume_points(job_id, scope)
        if not known or step > known[0].step:
            self._jobs.progressed(fence)
        else:
            self._jobs.guard(fence)
        self._session.merge(
            ResumePoint(
                job_id=job_id,
                scope=scope,
                step=step,
                attempt=fence.attempt,
                path=path,
                manifest_sha256=manifest_sha256,
                bytes=size_bytes,
            )
        )
        self._session.flush()

    def resume_points(self, job_id: str, scope: str) -> list[ResumePoint]:
        """Return resume points of a scope, furthest first."""
        statement = (
            select(ResumePoint)
            .where(ResumePoint.job_id == job_id, ResumePoint.scope == scope)
            .order_by(ResumePoint.step.desc(), ResumePoint.attempt.desc())
        )
        return list(self._session.execute(statement).scalars())

    def drop_resume_points(
        self, fence: Fence, *, job_id: str, scope: str, keep_from_step: int
    ) -> list[str]:
        """Forget resume points before a step and return their paths for removal."""
        self._jobs.guard(fence)
        dropped = (
            delete(ResumePoint)
            .where(
                ResumePoint.job_id == job_id,
                ResumePoint.scope == scope,
                ResumePoint.step < keep_from_step,
            )
            .returning(ResumePoint.path)
        )
        return list(self._session.execute(dropped).scalars())

    def forget_resume_point(self, fence: Fence, point: ResumePoint) -> None:
        """Forget one resume point: it was found to be of no use."""
        self._jobs.guard(fence)
        self._session.execute(
            delete(ResumePoint).where(
                ResumePoint.job_id == point.job_id,
                ResumePoint.scope == point.scope,
                ResumePoint.step == point.step,
                ResumePoint.attempt == point.attempt,
            )
        )

    def publish_checkpoint(
        self,
        fence: Fence,
        *,
        owner_id: str,
        checkpoint_id: str,
        kind: str,
        label: str,
        step: int,
        path: str,
        files: list[dict[str, Any]],
        manifest_sha256: str,
        size_bytes: int,
        metrics: dict[str, Any],
    ) -> Checkpoint:
        """Make a finished folder visible; calling it again with the same id changes nothing."""
        self._jobs.guard(fence)
        existing = self._session.get(Checkpoint, checkpoint_id)
        if existing is not None:
            return existing
        row = Checkpoint(
            id=checkpoint_id,
            owner_id=owner_id,
            job_id=fence.job_id,
            attempt=fence.attempt,
            kind=kind,
            label=label,
            step=step,
            path=path,
            files=files,
            manifest_sha256=manifest_sha256,
            bytes=size_bytes,
            metrics=metrics,
        )
        self._session.add(row)
        self._session.flush()
        append_event(
            self._session, fence.job_id, EventType.JOB_CHECKPOINT,
            f"Checkpoint `{label}` is ready.", data={"checkpoint_id": row.id, "label": label},
        )  # fmt: skip
        return row

    def checkpoint(self, owner_id: str, checkpoint_id: str) -> Checkpoint:
        """Return the owner's checkpoint.

        Raises:
            NotFound: no such checkpoint, or somebody else's.
        """
        row = self._session.get(Checkpoint, checkpoint_id)
        if row is None or row.owner_id != owner_id or row.deleted_at is not None:
            raise NotFound(
                f"no checkpoint {checkpoint_id!r}",
                hint="GET /v1/fine_tuning/jobs/{id}/checkpoints lists them",
            )
        return row

    def checkpoint_page(
        self, owner_id: str, query: PageQuery, *, job_id: str | None = None
    ) -> Page[Checkpoint]:
        """Return one page of the owner's checkpoints."""
        statement = select(Checkpoint).where(
            Checkpoint.owner_id == owner_id, Checkpoint.deleted_at.is_(None)
        )
        if job_id is not None:
            statement = statement.where(Checkpoint.job_id == job_id)
        return fetch_page(self._session, statement, Checkpoint.id, query)
