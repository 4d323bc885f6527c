"""What a recommendation looks like from outside: the answer, its ranking, the heat map."""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Literal

from pydantic import Field
from sqlalchemy.orm import Session

from app.job_views import JobError, Progress, QueuePlace, job_error, progress_view
from app.responses import Schema, unix
from core.data_report import TokenReport
from core.lifecycle import JobStatus
from core.profile import Choice, DatasetProfile, Estimate, HistoryUse, RankedPair, Recommendation
from core.run_spec import CandidateSpec
from core.spec import DivergenceName, KernelName
from models.experiment import RecommendationRow, TrialRow
from models.job import Job
from models.repositories.jobs import JobRepository


class Answer(Schema):
    """The pair that fits best, and how far the data separate it from the next."""

    kernel: str
    divergence: str
    confidence: float
    margin: float
    runner_up: RankedPair
    separated: bool
    kernels_separated: bool
    kernel_choice: Choice
    divergence_choice: Choice
    tied_pairs: int
    history: HistoryUse
    summary: str


class MatrixCell(Schema):
    """One kernel–divergence pair of the heat map."""

    kernel: str
    divergence: str
    rank: int
    score: Estimate
    recommended: bool
    tied: bool = Field(description="the data do not separate the recommended pair from this one")
    trials: int = Field(description="ended with a log-loss, in your searches on the same data")
    failed_trials: int = Field(description="ended without one")


class RecommendationMatrix(Schema):
    """The ranking as a heat map: cells row by row, kernels down and divergences across."""

    object: Literal["recommendation.matrix"] = "recommendation.matrix"
    recommendation_id: str
    status: JobStatus
    provisional: bool
    kernels: list[str]
    divergences: list[str]
    cells: list[MatrixCell] = Field(description="empty while there is no answer")
    plain_trials: int = Field(description="trials of plain DPO, which is no cell")
    other_trials: int = Field(description="trials with a kernel or a divergence alone")


class RecommendationView(Schema):
    """A recommendation; the answer is there as soon as there is one."""

    id: str
    object: Literal["recommendation"] = "recommendation"
    status: JobStatus
    provisional: bool
    job_id: str
    dataset_id: str
    model: str
    seed: int
    created_at: int
    started_at: int | None
    finished_at: int | None
    progress: Progress | None
    queue: QueuePlace
    recommendation: Answer | None
    ranking: list[RankedPair]
    evidence: DatasetProfile | None
    data: TokenReport | None = Field(
        description="the training split as the model's tokenizer sees it"
    )
    metadata: dict[str, str]
    error: JobError | None


def recommendation_view(
    session: Session, job: Job, row: RecommendationRow | None
) -> RecommendationView:
    """Return the view; what a fine-tuning job made on its way is finished when it is stored."""
    on_the_way = row is not None and row.id != job.id
    status = JobStatus.SUCCEEDED if on_the_way else job.status
    found = None if row is None else Recommendation.model_validate(row.result)
    ahead = JobRepository(session).queue_position(job)
    return RecommendationView(
        id=job.id if row is None else row.id,
        status=status,
        provisional=found is not None and (found.provisional or not status.is_terminal),
        job_id=job.id,
        dataset_id=(job.dataset_id or "") if row is None else row.dataset_id,
        model=(job.model or "") if row is None else row.model,
        seed=job.seed,
        created_at=int(job.created_at if row is None or not on_the_way else row.created_at),
        started_at=unix(job.started_at),
        finished_at=unix(row.created_at if row is not None and on_the_way else job.finished_at),
        progress=None if on_the_way else progress_view(job),
        queue=QueuePlace(position=None if ahead is None else ahead + 1, ahead=ahead or 0),
        recommendation=None if found is None else _answer(found),
        ranking=[] if found is None else list(found.ranking),
        evidence=None if found is None else found.profile,
        data=None if found is None else found.data,
        metadata=job.labels,
        error=None if on_the_way else job_error(job.error),
    )


def _answer(found: Recommendation) -> Answer:
    return Answer(
        kernel=found.kernel,
        divergence=found.divergence,
        confidence=found.confidence,
        margin=found.margin,
        runner_up=found.runner_up,
        separated=found.separated,
        kernels_separated=found.kernels_separated,
        kernel_choice=found.kernel_choice,
        divergence_choice=found.divergence_choice,
        tied_pairs=found.tied_pairs,
        history=found.history,
        summary=found.summary,
    )


def matrix_view(view: RecommendationView, trials: Sequence[TrialRow]) -> RecommendationMatrix:
    """Return the heat map of a recommendation and of the trials on its data."""
    tried: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    plain = other = 0
    for trial in trials:
        objective = CandidateSpec.model_validate(trial.candidate).objective
        if objective.is_plain_dpo:
            plain += 1
        elif objective.kernel_term is None or objective.divergence_term is None:
            other += 1
        else:
            counter = failed if trial.log_loss is None else tried
            counter[objective.kernel_name, objective.divergence_name] += 1
    order = {
        (kernel.value, divergence.value): number
        for number, (kernel, divergence) in enumerate(product(KernelName, DivergenceName))
    }
    cells = [
        MatrixCell(
            kernel=pair.kernel,
            divergence=pair.divergence,
            rank=pair.rank,
            score=pair.score,
            recommended=pair.rank == 1,
            tied=pair.behind is not None and not pair.behind.separated,
            trials=tried[pair.kernel, pair.divergence],
            failed_trials=failed[pair.kernel, pair.divergence],
        )
        for pair in sorted(view.ranking, key=lambda pair: order[pair.kernel, pair.divergence])
    ]
    return RecommendationMatrix(
        recommendation_id=view.id,
        status=view.status,
        provisional=view.provisional,
        kernels=[name.value for name in KernelName],
        divergences=[name.value for name in DivergenceName],
        cells=cells,
        plain_trials=plain,
        other_trials=other,
    )
