"""What is done to a job that is there: cancel, pause, resume, retry; `If-Match` guards each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from fastapi import Depends
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app.conditional import IfMatch, check_if_match
from app.deps import Caller, Db, Queue
from app.queue import CeleryQueue, relay_now
from core.lifecycle import JobKind
from core.spec import SpecModel
from models.job import Job
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import JobRepository
from models.session import Database

V = TypeVar("V", bound=BaseModel)
View = Callable[[Session, Job], V]


class NoOptions(SpecModel):
    """The body of a request in which there is nothing to choose: none, or an empty object."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})


class CancelOptions(SpecModel):
    """How a job is cancelled; without a body gracefully, and what it has published stays."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"mode": "graceful", "keep_checkpoints": True}]}
    )

    mode: Literal["graceful", "force"] = Field(
        default="graceful",
        description="graceful: at the next step; force: killed at the next heartbeat",
    )
    keep_checkpoints: bool = Field(
        default=True, description="false: checkpoints that the job has published are deleted"
    )


@dataclass(frozen=True)
class JobVerbs:
    """Does to a job of the caller what the request says, in one transaction."""

    database: Database
    queue: CeleryQueue
    if_match: str | None

    def cancel(
        self,
        caller: Caller,
        job_id: str,
        view: View[V],
        options: CancelOptions | None,
        *,
        kind: JobKind | None = None,
    ) -> V:
        """Cancel the job: at once when it waits, else when its attempt has stopped.

        Raises:
            NotFound: no such job.
            Changed: it has another version than `If-Match` names.
            Conflict: it has already ended otherwise.
        """
        given = None if options is None else options.model_dump()
        with self._locked(caller, job_id, kind) as (session, job):
            jobs = JobRepository(session)
            return view(session, jobs.request_cancel(caller.owner_id, job.id, options=given))

    def pause(
        self, caller: Caller, job_id: str, view: View[V], *, kind: JobKind | None = None
    ) -> V:
        """Pause the job: at once when it is queued, else when it has saved what it has.

        Raises:
            NotFound, Changed: as `cancel`.
            Conflict: it is neither queued nor running, or is to be cancelled.
        """
        with self._locked(caller, job_id, kind) as (session, job):
            return view(session, JobRepository(session).request_pause(job))

    def resume(
        self, caller: Caller, job_id: str, view: View[V], *, kind: JobKind | None = None
    ) -> V:
        """Queue a paused job or a draft, and take back a pause that was asked for.

        Raises:
            NotFound, Changed: as `cancel`.
            Conflict: the job has ended.
            QuotaExceeded: the owner has too many waiting jobs, or no device time left.
        """
        with self._locked(caller, job_id, kind) as (session, job):
            resumed = view(session, JobRepository(session).resume(job))
        relay_now(self.database, self.queue)
        return resumed

    def retry(self, caller: Caller, job_id: str, view: View[V]) -> V:
        """Queue a new job like one that has failed or was cancelled.

        Raises:
            NotFound, Changed: as `cancel`.
            Conflict: the job cannot be retried, or its dataset not be used any more.
            QuotaExceeded: the owner has too many waiting jobs, or no device time left.
        """
        with self._locked(caller, job_id, None) as (session, job):
            new = JobRepository(session).retry(job)
            if new.dataset_id is not None:
                DatasetRepository(session).get_usable(caller.owner_id, new.dataset_id, lock=True)
            made = view(session, new)
        relay_now(self.database, self.queue)
        return made

    @contextmanager
    def _locked(
        self, caller: Caller, job_id: str, kind: JobKind | None
    ) -> Iterator[tuple[Session, Job]]:
        with self.database.transaction() as session:
            job = JobRepository(session).lock(caller.owner_id, job_id, kind=kind)
            check_if_match(self.if_match, job)
            yield session, job


async def job_verbs(database: Db, queue: Queue, if_match: IfMatch = None) -> JobVerbs:
    """Return what does things to jobs."""
    return JobVerbs(database, queue, if_match)


Verbs = Annotated[JobVerbs, Depends(job_verbs)]
