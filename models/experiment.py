"""What jobs produce: recommendations, studies, trials, metrics, resume points, checkpoints."""

from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import EndedBy, TrialStatus
from models.base import Base, Identified, Owned
from models.types import EnumText, Epoch, Json, db_now


class RecommendationRow(Identified, Owned, Base):
    __tablename__ = "recommendation"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), unique=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    model: Mapped[str] = mapped_column(String(512))
    result: Mapped[dict[str, Any]] = mapped_column(Json)


class StudyRow(Identified, Owned, Base):
    """One search; `name` is the study's name in Optuna's own storage."""

    __tablename__ = "study"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), unique=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    spec: Mapped[dict[str, Any]] = mapped_column(Json)


class TrialRow(Identified, Owned, Base):
    __tablename__ = "trial"
    __table_args__ = (UniqueConstraint("study_id", "number"),)

    study_id: Mapped[str] = mapped_column(ForeignKey("study.id"))
    number: Mapped[int] = mapped_column(Integer)
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
    """A published folder; `path` is relative to the artifact folder."""

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
