"""Upkeep that every process does for all: owed wake-ups are sent, expired leases are taken back."""

import logging

from core.clock import Clock, SystemClock
from core.errors import StorageFull, Unavailable
from core.queue import WakeSender
from core.settings import Settings
from models.outbox import relay_once
from models.repositories.audit import AuditRepository
from models.repositories.jobs import JobRepository, Reaped
from models.repositories.replays import KEPT_S, ReplayRepository
from models.session import Database

_log = logging.getLogger("kdpo.maintenance")

_FORGET_S = 3600.0


class Maintenance:
    """Relay and reaper. Any number of processes may run it at once; each round is idempotent."""

    period_s = 0.5

    def __init__(
        self,
        database: Database,
        sender: WakeSender,
        settings: Settings,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._database = database
        self._sender = sender
        self._limits = settings.worker
        self._audit_s = settings.auth.audit_days * 86_400
        self._clock = clock or SystemClock()
        self._reap_at = self._forget_at = float("-inf")

    def tick(self) -> None:
        """Reap when it is time, then relay; call it every `period_s`.

        A database or broker that does not answer is logged and met again in the next round.
        """
        try:
            if self._clock.monotonic() >= self._forget_at:
                self._forget_at = self._clock.monotonic() + _FORGET_S
                self._forget()
            if self._clock.monotonic() >= self._reap_at:
                self._reap_at = self._clock.monotonic() + self._limits.reap_s
                self.reap()
            relay_once(self._database, self._sender)
        except (Unavailable, StorageFull) as error:
            _log.warning("upkeep is put off: %s", error.message)

    def _forget(self) -> None:
        with self._database.transaction() as session:
            AuditRepository(session).sweep(older_than_s=self._audit_s)
            ReplayRepository(session).sweep(older_than_s=KEPT_S)

    def reap(self) -> list[Reaped]:
        """Take back the jobs whose worker stopped renewing the lease.

        Raises:
            Unavailable: the database does not answer.
        """
        with self._database.transaction() as session:
            reaped = JobRepository(session).reap(
                max_losses=self._limits.max_losses, backoff_s=self._limits.backoff_s
            )
        for one in reaped:
            _log.warning(
                "job %s: attempt %d lost its worker; the job is %s",
                one.fence.job_id, one.fence.attempt, one.status.value,
            )  # fmt: skip
        return reaped
