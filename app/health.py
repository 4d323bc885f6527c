"""Liveness, readiness and version; no key is needed."""

import platform
from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter, Response

from app.deps import Config, Db, Queue
from app.responses import Schema, json_response
from core.errors import KdpoError
from core.queue import QueueName
from core.settings import Mode
from models.repositories.workers import WorkerRepository

router = APIRouter(tags=["health"])


class Alive(Schema):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Check(Schema):
    """One dependency."""

    ok: bool
    detail: str


class Readiness(Schema):
    """Whether requests can be served and jobs be worked on."""

    status: Literal["ready", "unready"]
    database: Check
    broker: Check
    workers: Check
    live_workers: int


class Version(Schema):
    """What runs here."""

    name: Literal["kdpo"] = "kdpo"
    version: str
    python: str
    mode: Mode


@router.get("/healthz", operation_id="get_health")
def health() -> Alive:
    """Say that the process answers."""
    return Alive()


@router.get(
    "/readyz",
    operation_id="get_readiness",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Something is missing"}},
)
def ready(database: Db, queue: Queue, settings: Config) -> Response:
    """Say whether database, broker and workers are there; 503 when one is not."""
    live, served = 0, set[str]()
    try:
        with database.reading() as session:
            workers = WorkerRepository(session).live(within_s=settings.worker.lease_s)
        live = len(workers)
        served = {name for worker in workers if worker.takes_jobs for name in worker.queues}
        database_check = Check(ok=True, detail="answers")
    except KdpoError as error:
        database_check = Check(ok=False, detail=error.message)
    try:
        queue.check()
        broker_check = Check(ok=True, detail="answers")
    except KdpoError as error:
        broker_check = Check(ok=False, detail=error.message)
    missing = sorted({name.value for name in QueueName} - served)
    workers_check = Check(
        ok=not missing,
        detail=f"no worker reads: {', '.join(missing)}" if missing else "every queue is read",
    )
    is_ready = database_check.ok and broker_check.ok and workers_check.ok
    body = Readiness(
        status="ready" if is_ready else "unready",
        database=database_check,
        broker=broker_check,
        workers=workers_check,
        live_workers=live,
    )
    return json_response(
        body, status=200 if is_ready else 503, headers={} if is_ready else {"Retry-After": "5"}
    )


@router.get("/version", operation_id="get_version")
def get_version(settings: Config) -> Version:
    """Say which build answers."""
    return Version(version=version("kdpo"), python=platform.python_version(), mode=settings.mode)
