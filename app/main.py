"""Composition root of the API: settings in, application out."""

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from app import audit, docs_page, errors, health, limits, problems
from app.api import include_v1
from app.conditional import Answers
from app.deps import DEFAULT_OWNER
from app.idempotency import Idempotency
from app.key_ring import KeyRing
from app.middleware import BodyLimit, RequestLog
from app.openapi import PROBLEM_RESPONSES, KdpoApi
from app.queue import CeleryQueue
from app.streams import Followers
from app.uploads import remove_stale_parts
from core.settings import Settings
from models.maintenance import Maintenance
from models.repositories.owners import OwnerRepository
from models.session import Database

_log = logging.getLogger("kdpo.api")


def create_app(settings: Settings) -> FastAPI:
    """Return the application; connections are made when it starts, not here."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.database_url, pool_size=settings.db.pool_size)
        queue = CeleryQueue(settings)
        stop = threading.Event()
        thread = threading.Thread(
            target=maintain,
            args=(Maintenance(database, queue, settings), stop),
            name="maintenance",
        )
        followers = Followers(
            database, period_s=settings.api.stream_poll_s, max_streams=settings.api.max_streams
        )
        limiter = limits.make_limiter(settings)
        try:
            app.state.database, app.state.queue = database, queue
            app.state.followers = followers
            app.state.limiter = limiter
            app.state.answers = Answers()
            app.state.keys = KeyRing(database)
            if not settings.auth.required:
                app.state.default_owner_id = await run_in_threadpool(_default_owner, database)
            await run_in_threadpool(remove_stale_parts, settings.upload_dir)
            thread.start()
            followers.start()
            yield
        finally:
            stop.set()
            await followers.stop()
            if thread.ident is not None:
                await run_in_threadpool(thread.join)
            queue.close()
            database.dispose()
            await limiter.close()

    app = KdpoApi(
        title="kdpo",
        version=version("kdpo"),
        description="Preference alignment that picks its kernel and divergence from your data.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.add_middleware(Idempotency)
    app.add_middleware(
        BodyLimit,
        max_body_bytes=settings.api.max_body_bytes,
        max_upload_bytes=settings.api.max_upload_bytes,
    )
    app.add_middleware(audit.AuditLog)
    app.add_middleware(limits.Accounts)
    app.add_middleware(RequestLog)
    errors.install(app)
    limits.install(app)
    include_v1(app)
    app.include_router(health.router)
    app.include_router(problems.router, responses=PROBLEM_RESPONSES)
    app.include_router(docs_page.router)
    return app


def maintain(maintenance: Maintenance, stop: threading.Event) -> None:
    """Relay owed wake-ups and reap lost jobs until stopped.

    An error of one round is logged and the next round tries again: this loop must outlive a
    database or a broker that is away.
    """
    while not stop.wait(maintenance.period_s):
        try:
            maintenance.tick()
        except Exception:
            _log.exception("a round of maintenance failed; the next one tries again")


def _default_owner(database: Database) -> str:
    with database.transaction() as session:
        return OwnerRepository(session).ensure(DEFAULT_OWNER).id
