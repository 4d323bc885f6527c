"""Plans and results for tests of the search by rungs."""

import math
from collections.abc import Callable
from dataclasses import replace

from core.lifecycle import EndedBy
from core.run_spec import CandidateSpec
from core.spec import (
    BASE_KERNELS,
    DivergenceName,
    KernelName,
    KernelTerm,
    ObjectiveSpec,
    PenaltyTerm,
)
from selection.quote import plan_search
from selection.rungs import decide
from selection.study import Arm, Budget, Ended, Plan, Running, Start, Stop, Study, Task

RATE = 1e-3
RUNGS = (20, 60, 200, 1000)


def arm(kernel: KernelName, divergence: DivergenceName, *, score: float = 0.0) -> Arm:
    objective = ObjectiveSpec(
        kernel_term=KernelTerm.model_validate({"kernel": kernel.value}),
        divergence_term=PenaltyTerm.model_validate({"divergence": divergence.value, "alpha": 0.6}),
    )
    return Arm(
        f"{kernel.value} × {divergence.value}",
        CandidateSpec(objective=objective, learning_rate=RATE),
        score=score,
    )


PLAIN = Arm("dpo", CandidateSpec(objective=ObjectiveSpec(), learning_rate=RATE))


def arms(number: int = 28) -> tuple[Arm, ...]:
    """Plain DPO and so many pairs; scores fall, so that the order is that of the list."""
    pairs = [(k, d) for d in DivergenceName for k in BASE_KERNELS][:number]
    return (PLAIN, *(arm(k, d, score=2.0 - 0.01 * i) for i, (k, d) in enumerate(pairs)))


def plan(
    *,
    number: int = 28,
    rungs: tuple[int, ...] = RUNGS,
    budget: Budget | None = None,
    shape: str | None = "usual",
    seed: int = 0,
    drift_budget: float | None = None,
) -> Plan:
    _, made = plan_search(
        arms=arms(number), rungs=rungs, budget=budget or Budget(), seed=seed, step_seconds=1.0,
        score_seconds=2.0, drift_budget=drift_budget, shape=shape,
    )  # fmt: skip
    return made


Score = Callable[[Task], float]


def quality(task: Task) -> float:
    """Log-loss of a world without noise: pairs differ by their place in the alphabet."""
    away = math.dist(task.trial.setting.point, (0.8, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0))
    merit = 0.0 if task.trial.arm == PLAIN.name else 1.0 + (hash_of(task.trial.arm) % 17) / 4.0
    return 0.69 - 0.002 * (1 + task.rung) * (merit - 0.5 * away**2)


def hash_of(text: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(text))


def finished(task: Task, *, score: Score = quality, seconds: float | None = None) -> Ended:
    steps = RUNGS[min(task.rung, 3)] - task.start
    return Ended(
        task,
        EndedBy.BUDGET,
        2.0 + steps if seconds is None else seconds,
        log_loss=score(task),
        drift=0.01 * (1 + task.rung),
    )


def run_alone(
    made: Plan, *, study: Study | None = None, score: Score = quality
) -> tuple[Study, list[Start], Stop]:
    """One worker to the end."""
    study = study or Study()
    starts: list[Start] = []
    while True:
        action = decide(made, study)
        if isinstance(action, Stop):
            return study, starts, action
        assert isinstance(action, Start), action
        assert len(starts) < 500
        starts.append(action)
        kept = tuple(task for task in study.waiting if task.key != action.task.key)
        ended = finished(action.task, score=score, seconds=action.expected_seconds)
        study = replace(study, ended=(*study.ended, ended), waiting=kept)


def running(study: Study, start: Start) -> Study:
    """The study once a worker has taken a task."""
    return replace(
        study,
        running=(*study.running, Running(start.task, start.limit_seconds)),
        waiting=tuple(task for task in study.waiting if task.key != start.task.key),
    )
