"""What the server answers, as typed values; members that a newer server adds are kept."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

ENDED = frozenset({"succeeded", "failed", "cancelled"})
RESTS = frozenset({"paused", "draft"})


class Thing(BaseModel):
    """Base of all answers: unknown members are attributes, too."""

    model_config = ConfigDict(extra="allow", frozen=True)


class ErrorItem(Thing):
    """One place that is wrong: a JSON pointer, a line where there is one, and what to do."""

    code: str
    detail: str
    pointer: str | None = None
    line: int | None = None
    count: int | None = None
    hint: str | None = None

    @property
    def place(self) -> str:
        """Where it is, with a colon; empty when that is not known."""
        parts = [f"line {self.line}"] if self.line is not None else []
        parts += [self.pointer] if self.pointer else []
        return f"{' '.join(parts)}: " if parts else ""


class Progress(Thing):
    """How far the present part of a job is."""

    fraction: float = 0.0
    unit: str = ""
    done: float = 0
    total: float = 0
    rate: float | None = None
    eta_seconds: float | None = None


class ProgressEvent(Thing):
    """Where a job is now, as an event stream tells it."""

    progress: Progress
    phase: str | None = None
    version: int | None = None


class QueuePlace(Thing):
    """Where a queued job stands; position 1 is next."""

    position: int | None = None
    ahead: int = 0


class JobError(Thing):
    """Why a job failed, or what a paused one waits for."""

    code: str = "internal"
    message: str = ""
    hint: str | None = None


class Step(Thing):
    """One resumable part of a job."""

    name: str
    status: str


class Job(Thing):
    """A job of any kind."""

    id: str
    status: str
    kind: str = "training"
    phase: str | None = None
    attempt: int = 0
    attention: list[str] = []
    created_at: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    version: int | None = None
    progress: Progress | None = None
    queue: QueuePlace | None = None
    steps: list[Step] = []
    dataset_id: str | None = None
    model: str | None = None
    seed: int = 0
    metadata: dict[str, str] = {}
    error: JobError | None = None
    result: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether the job has ended, whatever the way."""
        return self.status in ENDED

    @property
    def rests(self) -> bool:
        """Whether the job goes on only when somebody resumes it."""
        return self.status in RESTS

    @property
    def checkpoint_id(self) -> str | None:
        """The checkpoint that the job has published, of a training or export that succeeded."""
        result = self.result or {}
        run = result.get("run")
        found = run.get("checkpoint_id") if isinstance(run, dict) else result.get("checkpoint_id")
        return None if found is None else str(found)


class Event(Thing):
    """One event of a job; `seq` counts from 1 in each job."""

    id: str
    seq: int
    type: str
    level: str = "info"
    message: str = ""
    data: dict[str, Any] = {}
    created_at: int | None = None


class Update(Thing):
    """What `watch` tells: the job as it is now, and the event that said so, where one did."""

    job: Job
    event: Event | None = None


class MetricPoint(Thing):
    """The metrics of one step."""

    step: int
    values: dict[str, float | None]


class Metrics(Thing):
    """The metric series of one scope of a job."""

    job_id: str
    scope: str
    data: list[MetricPoint]


class Dataset(Thing):
    """Preference pairs as the server has read them."""

    id: str
    name: str = ""
    status: str
    version: int = 1
    job_id: str
    counts: dict[str, Any] | None = None
    error: JobError | None = None


class Row(Thing):
    """One line of a dataset."""

    number: int
    row: dict[str, Any]


class Estimate(Thing):
    """A value with its interval."""

    value: float
    low: float
    high: float


class RankedPair(Thing):
    """A kernel and a divergence, their score, and why."""

    rank: int
    kernel: str
    divergence: str
    mode: str = "penalty"
    score: Estimate
    reason: str = ""
    objective: dict[str, Any] = {}


class Choice(Thing):
    """The kernel, or the divergence, that comes first, and what can be said of it."""

    name: str
    runner_up: str = ""
    tied: list[str] = []
    sentence: str = ""


class Answer(Thing):
    """The pair that fits best, and how far the data separate it from the next."""

    kernel: str
    divergence: str
    confidence: float
    margin: float
    separated: bool
    summary: str
    runner_up: RankedPair | None = None
    kernel_choice: Choice | None = None
    divergence_choice: Choice | None = None


class Recommendation(Thing):
    """A recommendation; `answer` is there as soon as there is one, at first a provisional one."""

    id: str
    status: str
    provisional: bool = False
    job_id: str
    dataset_id: str
    model: str = ""
    seed: int = 0
    answer: Answer | None = Field(default=None, alias="recommendation")
    ranking: list[RankedPair] = []
    evidence: dict[str, Any] | None = None
    error: JobError | None = None


class WinRate(Thing):
    """How often a checkpoint's answer has a higher reward than its base's; a tie is one half."""

    reward_model: str
    prompts: int
    wins: int
    ties: int
    losses: int
    rate: Estimate
    difference: Estimate
    verdict: str
    sentence: str


class EvaluationResult(Thing):
    """Quality of a checkpoint on held-out pairs; `win_rate` where a reward model was named."""

    accuracy: Estimate
    log_loss: Estimate
    drift: Estimate
    measured: dict[str, Any] = {}
    win_rate: WinRate | None = None


class Evaluation(Thing):
    """An evaluation of a checkpoint; it has a `result` when it has succeeded."""

    id: str
    status: str
    checkpoint_id: str
    dataset_id: str
    split: str = "test"
    reward_model: str | None = None
    seed: int = 0
    metadata: dict[str, str] = {}
    result: EvaluationResult | None = None
    error: JobError | None = None


class EvaluationSample(Thing):
    """A held-out prompt, answered by base and checkpoint; rewards are None until it is scored."""

    number: int
    pair_id: str
    prompt: str
    base: str
    aligned: str
    base_reward: float | None = None
    aligned_reward: float | None = None


class Checkpoint(Thing):
    """Weights that a job has published."""

    id: str
    job_id: str
    kind: str = ""
    label: str = ""
    step: int = 0
    bytes: int = 0
    num_files: int = 0
    manifest_sha256: str | None = None
    metrics: dict[str, Any] = {}


class CheckpointFile(Thing):
    """One file of a checkpoint, as its manifest has it."""

    path: str
    bytes: int
    sha256: str


class Report(Thing):
    """What validation found; its many members are described in docs/datasets.md."""

    dataset_id: str
    status: str
    counts: dict[str, Any] | None = None


class MatrixCell(Thing):
    """One pair of the heat map."""

    kernel: str
    divergence: str
    rank: int
    score: Estimate
    tied: bool = False
    trials: int = 0


class Matrix(Thing):
    """The ranking as a heat map: kernels down, divergences across."""

    recommendation_id: str
    kernels: list[str]
    divergences: list[str]
    cells: list[MatrixCell]
