"""What a search is going to do: arms from the recommendation, rungs, what steps cost here."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from core.profile import RankedPair, Recommendation
from core.queue import QueueName
from core.run_spec import CandidateSpec, SearchSpec
from core.spec import KernelName, ObjectiveSpec
from models.repositories.workers import WorkerRepository
from selection.quote import plan_search
from selection.study import PLAIN, Arm, Budget, Plan, ladder
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.runs import RunRequest
from worker.jobs.scopes import Span
from worker.jobs.workbench import Workbench

log = logging.getLogger("kdpo.search")

LIVE_S = 60.0
"""A worker that was seen since then is counted on."""
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Rates:
    """Seconds here: of a step of plain DPO, of scoring, and of a pair's step over plain DPO's."""

    step: float
    score: float
    pairs: dict[str, float]


def arm_name(pair: RankedPair) -> str:
    """What an arm is called in the tables."""
    return f"{pair.kernel} × {pair.divergence}"


def make_plan(
    bench: Workbench, spec: SearchSpec, recommendation: Recommendation
) -> tuple[str, Plan]:
    """Return the plan of a search with the name of its shape; times a few steps for that.

    Arms have the strengths that were recommended, at the learning rate of the job.
    """
    whole = bench.plan(RunRequest("plan", ObjectiveSpec(), bench.learning_rate))
    rates = measure_rates(bench, recommendation.ranking)
    rate = bench.learning_rate
    plain = ObjectiveSpec(beta=recommendation.ranking[0].objective.beta)
    arms = [Arm(PLAIN, CandidateSpec(objective=plain, learning_rate=rate))]
    arms += [
        Arm(
            arm_name(pair),
            CandidateSpec(objective=pair.objective, learning_rate=rate),
            score=pair.score.value,
            cost=rates.pairs[arm_name(pair)],
        )
        for pair in recommendation.ranking
    ]
    return plan_search(
        arms=arms,
        rungs=ladder(whole.total_steps, warmup_steps=whole.warmup_steps),
        budget=Budget(
            gpu_seconds=spec.gpu_seconds,
            trials=spec.max_trials,
            deadline_seconds=spec.deadline_seconds,
        ),
        seed=bench.seed,
        step_seconds=rates.step,
        score_seconds=rates.score,
        drift_budget=spec.drift_budget,
        shape=spec.shape,
        workers=_workers(bench.context, spec),
    )


def _workers(context: JobContext, spec: SearchSpec) -> int:
    """How many will share the work of a search, as far as is known when it begins."""
    with context.database.reading() as session:
        live = WorkerRepository(session).ready(QueueName.GPU, within_s=LIVE_S)
    return max(1, min(live, spec.parallelism or live))


@dataclass
class _Stopwatch:
    """Hooks of a run that is only timed."""

    context: JobContext
    passed: list[float] = field(default_factory=lambda: [time.monotonic()])

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def stepped(self, step: int, total: int) -> None:  # noqa: ARG002
        self.passed.append(time.monotonic())

    def stopping(self) -> bool:
        return self.context.stopping()

    def raise_if_stopped(self) -> None:
        self.context.raise_if_stopped()

    @property
    def step(self) -> float | None:
        """Seconds of the fastest step, the first one warms up; None where none could be taken."""
        gaps = [b - a for a, b in zip(self.passed, self.passed[1:], strict=False)]
        return min(gaps[1:] or gaps, default=None)


def measure_rates(bench: Workbench, ranking: Sequence[RankedPair]) -> Rates:
    """Time steps of plain DPO, of every divergence with its best kernel, of a mixture; a scoring.

    A pair costs what its divergence does, times what a mixture costs over a single kernel. What
    cannot take a step here is thought to cost what plain DPO does: its trials will say why.
    """
    began = time.monotonic()
    plain = _timed(bench, ObjectiveSpec())
    step = time.monotonic() - began if plain.step is None else plain.step
    by_divergence: dict[str, float] = {}
    mixture = 1.0
    for pair in ranking:
        if pair.kernel != KernelName.HMK.value and pair.divergence not in by_divergence:
            by_divergence[pair.divergence] = _timed(bench, pair.objective).step or step
    mixed = next((pair for pair in ranking if pair.kernel == KernelName.HMK.value), None)
    if mixed is not None:
        single = by_divergence.get(mixed.divergence, step)
        mixture = max((_timed(bench, mixed.objective).step or single) / single, 1.0)
    started = time.monotonic()
    bench.measure(Split.VALIDATION, span=Span(0.0, 0.0))
    score = time.monotonic() - started
    if plain.step is not None:
        # What a task takes besides its steps: it scores, builds its objective, saves its point.
        score += plain.passed[1] - plain.passed[0] - plain.step
    return Rates(
        step=step,
        score=max(score, 0.0),
        pairs={
            arm_name(pair): by_divergence.get(pair.divergence, step)
            / step
            * (mixture if pair.kernel == KernelName.HMK.value else 1.0)
            for pair in ranking
        },
    )


def _timed(bench: Workbench, objective: ObjectiveSpec) -> _Stopwatch:
    request = RunRequest("timing", objective, bench.learning_rate, stop_after=_TIMED_STEPS)
    watch = _Stopwatch(bench.context)
    try:
        bench.time_steps(request, watch)
    except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        log.warning("%s cannot be timed: %s", objective.label, error)
    bench.context.raise_if_stopped()
    return watch
