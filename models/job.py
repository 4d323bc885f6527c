"""Jobs and everything that the lease protocol needs (docs/architecture.md, ADR 0006)."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    UniqueConstraint,
    desc,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import AttemptOutcome, EventType, JobKind, JobStatus, Phase, StepStatus
from core.queue import QueueName
from models.base import Base, Identified, Owned
from models.types import EnumText, Epoch, Json, db_now


class Job(Identified, Owned, Base):
    """One thing a worker does. `attempt` is the fence: every claim raises it by one."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("owner_id", "id"),
        ForeignKeyConstraint(
            ["owner_id", "dataset_id"], ["dataset.owner_id", "dataset.id"], name="fk_job_dataset"
        ),
        CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="lease"),
        Index(
            "ix_job_claim",
            "queue",
            "owner_id",
            desc("priority"),
            "created_at",
            "id",
            postgresql_where=text("status = 'queued'"),
            sqlite_where=text("status = 'queued'"),
        ),
        Index(
            "ix_job_lease",
            "lease_until",
            postgresql_where=text("status = 'running'"),
            sqlite_where=text("status = 'running'"),
        ),
        Index(
            "ix_job_running",
            "owner_id",
            postgresql_where=text("status = 'running'"),
            sqlite_where=text("status = 'running'"),
        ),
        Index("ix_job_list", "owner_id", "kind", "id"),
        Index("ix_job_status", "owner_id", "status", "id"),
        Index("ix_job_newest", "owner_id", "created_at", "id"),
    )

    kind: Mapped[JobKind] = mapped_column(EnumText(JobKind))
    queue: Mapped[QueueName] = mapped_column(EnumText(QueueName))
    priority: Mapped[int] = mapped_column(Integer, insert_default=0)
    status: Mapped[JobStatus] = mapped_column(EnumText(JobStatus))
    phase: Mapped[Phase | None] = mapped_column(EnumText(Phase))
    attention: Mapped[list[str]] = mapped_column(Json, insert_default=list)
    spec: Mapped[dict[str, Any]] = mapped_column(Json)
    dataset_id: Mapped[str | None] = mapped_column(String(48))
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("job.id"), index=True)
    model: Mapped[str | None] = mapped_column(String(512))
    seed: Mapped[int] = mapped_column(Integer, insert_default=0)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", Json, insert_default=dict)
    attempt: Mapped[int] = mapped_column(Integer, insert_default=0)
    failures: Mapped[int] = mapped_column(Integer, insert_default=0)
    losses: Mapped[int] = mapped_column(Integer, insert_default=0)
    run_after: Mapped[float] = mapped_column(Epoch, insert_default=db_now())
    lease_owner: Mapped[str | None] = mapped_column(String(48))
    lease_until: Mapped[float | None] = mapped_column(Epoch)
    heartbeat_at: Mapped[float | None] = mapped_column(Epoch)
    cancel_requested_at: Mapped[float | None] = mapped_column(Epoch)
    cancel_options: Mapped[dict[str, Any] | None] = mapped_column(Json)
    pause_requested_at: Mapped[float | None] = mapped_column(Epoch)
    progress: Mapped[dict[str, Any] | None] = mapped_column(Json)
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    gpu_seconds: Mapped[float] = mapped_column(Epoch, insert_default=0.0)
    event_seq: Mapped[int] = mapped_column(BigInteger, insert_default=0)
    version: Mapped[int] = mapped_column(BigInteger, insert_default=1)
    queued_at: Mapped[float | None] = mapped_column(Epoch)
    started_at: Mapped[float | None] = mapped_column(Epoch)
    finished_at: Mapped[float | None] = mapped_column(Epoch)


class JobAttempt(Base):
    __tablename__ = "job_attempt"
    __table_args__ = (Index("ix_job_attempt_worker", "worker_id", "ended_at"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    worker_id: Mapped[str] = mapped_column(String(48))
    started_at: Mapped[float] = mapped_column(Epoch, insert_default=db_now())
    ended_at: Mapped[float | None] = mapped_column(Epoch)
    outcome: Mapped[AttemptOutcome | None] = mapped_column(EnumText(AttemptOutcome))
    exit_code: Mapped[int | None] = mapped_column(Integer)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)


class JobStep(Base):
    """A resumable part of a job; what succeeded is never done again."""

    __tablename__ = "job_step"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    status: Mapped[StepStatus] = mapped_column(EnumText(StepStatus))
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    started_at: Mapped[float | None] = mapped_column(Epoch)
    finished_at: Mapped[float | None] = mapped_column(Epoch)


class Event(Identified, Owned, Base):
    """Append-only; `seq` counts per job and is the cursor of every transport."""

    __tablename__ = "event"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"))
    seq: Mapped[int] = mapped_column(BigInteger)
    attempt: Mapped[int] = mapped_column(Integer)
    type: Mapped[EventType] = mapped_column(EnumText(EventType))
    level: Mapped[str] = mapped_column(String(10))
    message: Mapped[str] = mapped_column(String(2000))
    data: Mapped[dict[str, Any]] = mapped_column(Json)


class Outbox(Base):
    """A wake-up that a committed transaction owes its queue."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    queue: Mapped[QueueName] = mapped_column(EnumText(QueueName))
    job_id: Mapped[str] = mapped_column(String(48))
    created_at: Mapped[float] = mapped_column(Epoch, insert_default=db_now())


class Worker(Identified, Base):
    """A live worker process; old rows are swept."""

    __tablename__ = "worker"

    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    version: Mapped[str] = mapped_column(String(40))
    queues: Mapped[list[str]] = mapped_column(Json)
    seen_at: Mapped[float] = mapped_column(Epoch, index=True)
    draining: Mapped[bool] = mapped_column(insert_default=False)
    drain_requested_at: Mapped[float | None] = mapped_column(Epoch)

    @property
    def takes_jobs(self) -> bool:
        """Whether it is neither stopping nor told to take no more."""
        return not self.draining and self.drain_requested_at is None
