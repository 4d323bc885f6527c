"""States of jobs, datasets and trials, and the legal moves between them."""

from enum import StrEnum


class JobStatus(StrEnum):
    """States of a job: OpenAI's six, `paused`, and `draft`, which OpenAI's form shows as queued.

    Terminal ones never change.
    """

    DRAFT = "draft"
    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return not JOB_TRANSITIONS[self]


JOB_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.DRAFT: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.VALIDATING_FILES: frozenset(
        {JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.QUEUED: frozenset(
        {JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.QUEUED,
            JobStatus.PAUSED,
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
            JobStatus.CANCELLED,
        }
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class JobKind(StrEnum):
    """What a job does; decides its id prefix, its queue and its function."""

    DATASET = "dataset"
    RECOMMENDATION = "recommendation"
    TRAINING = "training"
    EXPORT = "export"
    EVALUATION = "evaluation"
    SEARCH = "search"  # helps the search of another job


class Phase(StrEnum):
    """What a running job is doing now."""

    DOWNLOADING_DATA = "downloading_data"
    DOWNLOADING_MODEL = "downloading_model"
    CONVERTING = "converting"
    COMPUTING_METRICS = "computing_metrics"
    SEARCHING = "searching"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    UPLOADING = "uploading"
    FINALIZING = "finalizing"


class Attention(StrEnum):
    """Something a person should look at while the job goes on."""

    STALLED = "stalled"
    RETRYING = "retrying"
    LOW_DISK = "low_disk"
    BUDGET_90 = "budget_90"
    LOSS_DIVERGING = "loss_diverging"
    LIKELIHOOD_DISPLACEMENT = "likelihood_displacement"


class DatasetStatus(StrEnum):
    """States of a dataset."""

    VALIDATING = "validating"
    READY = "ready"
    READY_WITH_WARNINGS = "ready_with_warnings"
    INVALID = "invalid"
    CHECKED = "checked"  # read in a dry run: a report and no pairs
    DELETED = "deleted"  # kept for the jobs that name it; nobody is shown it

    @property
    def is_usable(self) -> bool:
        """Whether a job may be made from it."""
        return self in (DatasetStatus.READY, DatasetStatus.READY_WITH_WARNINGS)


class StepStatus(StrEnum):
    """States of one resumable step of a job."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"


class TrialStatus(StrEnum):
    """States of a trial: Optuna's own, lower-cased."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAIL = "fail"


class TaskStatus(StrEnum):
    """States of a task of a search: a trial on its way from one rung to the next."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class EndedBy(StrEnum):
    """Why a trial ended other than by reaching its budget of steps."""

    BUDGET = "budget"
    PRUNER = "pruner"
    NAN = "nan"
    OOM = "oom"
    WORKER_LOST = "worker_lost"
    USER = "user"


class AttemptOutcome(StrEnum):
    """How one attempt at a job ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    PREEMPTED = "preempted"
    PAUSED = "paused"
    RETRY = "retry"


class EventType(StrEnum):
    """Types of stored events."""

    JOB_STATUS = "job.status"
    JOB_PHASE = "job.phase"
    JOB_METRICS = "job.metrics"
    JOB_CHECKPOINT = "job.checkpoint"
    JOB_STEP = "job.step"
    JOB_WARNING = "job.warning"
    TRIAL_QUEUED = "trial.queued"
    TRIAL_STARTED = "trial.started"
    TRIAL_COMPLETED = "trial.completed"
    TRIAL_FAILED = "trial.failed"
    TRIAL_PRUNED = "trial.pruned"
    STUDY_QUOTED = "study.quoted"
    STUDY_CHANGED = "study.changed"
    RECOMMENDATION_UPDATED = "recommendation.updated"
    DONE = "done"
