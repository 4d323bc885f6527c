"""Workers: what they do, which of them get no job and why; and letting one run empty."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import Field

from app.deps import ID_PATTERN, Admin, Config, Db
from app.job_verbs import NoOptions
from app.responses import Schema
from core.queue import QueueName
from models.job import Worker
from models.repositories.workers import Quarantine, WorkerRepository

router = APIRouter(prefix="/workers", tags=["workers"])

WorkerId = Annotated[str, Path(pattern=ID_PATTERN)]


class QuarantineView(Schema):
    """Why a worker gets no job for a while: it lost its last attempts, at several jobs."""

    until: int
    losses: int
    job_ids: list[str]


class WorkerView(Schema):
    """One process that takes jobs."""

    object: Literal["worker"] = "worker"
    id: str
    host: str
    pid: int
    version: str
    queues: list[QueueName]
    status: Literal["idle", "busy", "draining", "quarantined"]
    job_id: str | None
    draining: bool
    quarantine: QuarantineView | None
    started_at: int
    seen_at: int


class WorkerList(Schema):
    """All live workers."""

    object: Literal["list"] = "list"
    data: list[WorkerView]
    has_more: Literal[False] = Field(default=False, description="all are in one answer")


def _view(worker: Worker, job_id: str | None, held: Quarantine | None) -> WorkerView:
    draining = not worker.takes_jobs
    status: Literal["idle", "busy", "draining", "quarantined"] = "busy" if job_id else "idle"
    if held is not None:
        status = "quarantined"
    if draining:
        status = "draining"
    return WorkerView(
        id=worker.id,
        host=worker.host,
        pid=worker.pid,
        version=worker.version,
        queues=[QueueName(name) for name in worker.queues],
        status=status,
        job_id=job_id,
        draining=draining,
        quarantine=None
        if held is None
        else QuarantineView(until=int(held.until), losses=held.losses, job_ids=list(held.job_ids)),
        started_at=int(worker.created_at),
        seen_at=int(worker.seen_at),
    )


@router.get("", operation_id="list_workers")
def list_workers(_admin: Admin, database: Db, settings: Config) -> WorkerList:
    """List the workers that were seen within a lease."""
    limits = settings.worker
    with database.reading() as session:
        workers = WorkerRepository(session)
        views = [
            _view(one, job_id, workers.quarantine(one.id, quarantine_s=limits.quarantine_s))
            for one, job_id in workers.live_with_jobs(within_s=limits.lease_s)
        ]
    return WorkerList(data=views)


@router.post("/{worker_id}/drain", operation_id="drain_worker", status_code=202)
def drain_worker(
    _admin: Admin,
    database: Db,
    settings: Config,
    worker_id: WorkerId,
    _body: NoOptions | None = None,
) -> WorkerView:
    """Let a worker take no further job; it ends the present one, and may then be stopped."""
    with database.transaction() as session:
        workers = WorkerRepository(session)
        worker = workers.request_drain(worker_id)
        held = workers.quarantine(worker_id, quarantine_s=settings.worker.quarantine_s)
        return _view(worker, workers.job_of(worker_id), held)
