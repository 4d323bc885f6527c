"""SQL tables (not neural networks); importing the package knows them all, as Alembic needs."""

from models.audit import AuditEntry
from models.base import Base
from models.dataset import Dataset
from models.evaluation import AnsweredPrompt
from models.experiment import (
    Checkpoint,
    MetricPoint,
    RecommendationRow,
    ResumePoint,
    StudyRow,
    TaskRow,
    TrialRow,
)
from models.file import StoredFileRow, UploadPart, UploadSession
from models.job import Event, Job, JobAttempt, JobStep, Outbox, Worker
from models.owner import ApiKey, Owner
from models.quota import GpuUsage, QueueTurn, Quota
from models.replay import Replay
from models.webhook import Webhook, WebhookDelivery

__all__ = [
    "AnsweredPrompt",
    "ApiKey",
    "AuditEntry",
    "Base",
    "Checkpoint",
    "Dataset",
    "Event",
    "GpuUsage",
    "Job",
    "JobAttempt",
    "JobStep",
    "MetricPoint",
    "Outbox",
    "Owner",
    "QueueTurn",
    "Quota",
    "RecommendationRow",
    "Replay",
    "ResumePoint",
    "StoredFileRow",
    "StudyRow",
    "TaskRow",
    "TrialRow",
    "UploadPart",
    "UploadSession",
    "Webhook",
    "WebhookDelivery",
    "Worker",
]
