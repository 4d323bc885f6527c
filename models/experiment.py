"""What jobs produce: recommendations, studies, trials, metrics, resume points, checkpoints."""

from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import EndedBy, TaskStatus, TrialStatus
from models.base import Base, Identified, Owned
from models.types import EnumText, Epoch, Json, db_now


class RecommendationRow(Identified, Owned, Base):
    __tablename__ = "recommendation"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), unique=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    model: Mapped[str] = mapped_column(String(512))
    result: Mapped[dict[str, Any]] = mapped_column(Json)


class StudyRow(Identified, Owned, Base):
    """One search; `name` is the study's name in Optuna's own storage.

    `plan` is what `selection.study.Plan` says, `quotes` what was promised when; it is over when
    `ended_at` is set. Whoever decides what comes next holds the lock of this row.
    """

    __tablename__ = "study"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), unique=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    spec: Mapped[dict[str, Any]] = mapped_column(Json)
    plan: Mapped[dict[str, Any]] = mapped_column(Json)
    shape: Mapped[str] = mapped_column(String(20))
    quotes: Mapped[list[dict[str, Any]]] = mapped_column(Json, insert_default=list)
    stopped_by: Mapped[str | None] = mapped_column(String(20))
    stop_reason: Mapped[str | None] = mapped_column(String(500))
    ended_at: Mapped[float | None] = mapped_column(Epoch)


class TrialRow(Identified, Owned, Base):
    """A configuration of a search; its figures are those of the highest rung that it has reached.

    `arm`, `draw` and `repeat` say which one it is, `setting` where it lies in its arm.
    """

    __tablename__ = "trial"
    __table_args__ = (
        UniqueConstraint("study_id", "number"),
        UniqueConstraint("study_id", "arm", "draw", "repeat"),
    )

    study_id: Mapped[str] = mapped_column(ForeignKey("study.id"))
    number: Mapped[int] = mapped_column(Integer)
    arm: Mapped[str] = mapped_column(String(100))
    draw: Mapped[int] = mapped_column(Integer)
    repeat: Mapped[int] = mapped_column(Integer)
    setting: Mapped[dict[str, Any]] = mapped_column(Json)
    rung: Mapped[int | None] = mapped_column(Integer)
    status: Mapped[TrialStatus] = mapped_column(EnumText(TrialStatus))
    ended_by: Mapped[EndedBy | None] = mapped_column(EnumText(EndedBy))
    origin: Mapped[str] = mapped_column(String(20))
    candidate: Mapped[dict[str, Any]] = mapped_column(Json)
    log_loss: Mapped[float | None] = mapped_column(Double)
    drift: Mapped[float | None] = mapped_column(Double)
    feasible: Mapped[bool | None] = mapped_column()
    metrics: Mapped[dict[str, Any]] = mapped_column(Json, insert_default=dict)
    gpu_seconds: Mapped[float] = mapped_column(Double, insert_default=0.0)
    finished_at: Mapped[float | None] = mapped_column(Epoch)


class TaskRow(Identified, Base):
    """A trial on its way to a rung: the unit of work of a search, of which there is one row.

    A running one belongs to an attempt at a job and is waiting again when that has ended otherwise
    than by finishing it. `seconds` are those of the last attempt, `lost_seconds` of all others.
    """

    __tablename__ = "task"
    __table_args__ = (UniqueConstraint("trial_id", "rung"),)

    study_id: Mapped[str] = mapped_column(ForeignKey("study.id"), index=True)
    trial_id: Mapped[str] = mapped_column(ForeignKey("trial.id"))
    rung: Mapped[int] = mapped_column(Integer)
    start: Mapped[int] = mapped_column(Integer)
    status: Mapped[TaskStatus] = mapped_column(EnumText(TaskStatus))
    reason: Mapped[str] = mapped_column(String(200))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("job.id"))
    attempt: Mapped[int | None] = mapped_column(Integer)
    limit_seconds: Mapped[float | None] = mapped_column(Double)
    seconds: Mapped[float] = mapped_column(Double, insert_default=0.0)
    lost_seconds: Mapped[float] = mapped_column(Double, insert_default=0.0)
    losses: Mapped[int] = mapped_column(Integer, insert_default=0)
    ended_by: Mapped[EndedBy | None] = mapped_column(EnumText(EndedBy))
    log_loss: Mapped[float | None] = mapped_column(Double)
    drift: Mapped[float | None] = mapped_column(Double)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json, insert_default=dict)
    started_at: Mapped[float | None] = mapped_column(Epoch)
    finished_at: Mapped[float | None] = mapped_column(Epoch)


class MetricPoint(Base):
    """Training metrics of one step under TRL's names; `scope` is `trial:3`, `train`, `baseline`."""

    __tablename__ = "metric_point"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    scope: Mapped[str] = mapped_column(String(40), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    metrics: Mapped[dict[str, Any]] = mapped_column("values", Json)
    created_at: Mapped[float] = mapped_column(Epoch, insert_default=db_now())


class ResumePoint(Base):
    """A folder from which a killed run goes on; trusted only when its manifest verifies."""

    __tablename__ = "resume_point"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    scope: Mapped[str] = mapped_column(String(40), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    path: Mapped[str] = mapped_column(String(1024))
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Epoch, insert_default=db_now())


class Checkpoint(Identified, Owned, Base):
    """A published folder; `path` is relative to the artifact folder.

    `title` is the owner's own label. `warned_h` is how many hours before the end the last warning
    was. A deleted row stays until its folder is removed.
    """

    __tablename__ = "checkpoint"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), index=True)
    attempt: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(20))
    label: Mapped[str] = mapped_column(String(40))
    step: Mapped[int] = mapped_column(Integer)
    path: Mapped[str] = mapped_column(String(1024))
    files: Mapped[list[dict[str, Any]]] = mapped_column(Json)
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    title: Mapped[str | None] = mapped_column(String(200))
    pinned: Mapped[bool] = mapped_column(insert_default=False)
    expires_at: Mapped[float | None] = mapped_column(Epoch, index=True)
    warned_h: Mapped[int | None] = mapped_column(Integer)
    deleted_at: Mapped[float | None] = mapped_column(Epoch)
