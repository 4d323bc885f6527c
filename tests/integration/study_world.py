"""Searches as workers would leave them: a plan, trials with their tasks, one that still runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from core.lifecycle import EndedBy
from core.run_spec import CandidateSpec, SearchSpec
from core.spec import KernelTerm, ObjectiveSpec, PenaltyTerm
from models.experiment import StudyRow
from models.repositories.jobs import Fence
from models.repositories.searches import SearchRepository, TaskEnd, TrialKey
from selection.draws import Setting
from selection.quote import plan_search
from selection.study import PLAIN, Arm, Budget, Plan
from selection.wire import plan_to_json, setting_to_json

RUNGS = (5, 20)
RATE = 1e-3


def pair(kernel: str, divergence: str) -> ObjectiveSpec:
    return ObjectiveSpec(
        beta=0.2,
        kernel_term=KernelTerm.model_validate({"kernel": kernel, "gamma": 0.05}),
        divergence_term=PenaltyTerm.model_validate({"divergence": divergence, "alpha": 1.2}),
    )


PLAIN_DPO = ObjectiveSpec(beta=0.1)
RBF = pair("rbf", "hellinger")
PAIRS = (RBF, pair("rbf", "kl"), pair("polynomial", "kl"), pair("hmk", "kl"))


def arm_of(objective: ObjectiveSpec) -> str:
    if objective.kernel_term is None or not isinstance(objective.divergence_term, PenaltyTerm):
        return PLAIN
    return f"{objective.kernel_term.kernel.type} × {objective.divergence_term.divergence.type}"


@dataclass(frozen=True)
class Made:
    """What a stored trial ended with at a rung; without a log-loss it diverged.

    `on` is what it showed at the rung after that one: log-loss, drift, seconds.
    """

    objective: ObjectiveSpec
    log_loss: float | None
    drift: float | None = 0.02
    seconds: float = 2.0
    error: float | None = 0.01
    feasible: bool = True
    learning_rate: float = RATE
    rung: int = 1
    repeat: int = 0
    ended_by: EndedBy = EndedBy.NAN
    on: tuple[float, float, float] | None = None


@dataclass
class Stored:
    """A search in the making: trials are added one after another."""

    session: Session
    fence: Fence
    study: StudyRow
    draws: Counter[str] = field(default_factory=Counter)

    def add(self, trial: Made, *, ended: bool = True) -> None:
        searches = SearchRepository(self.session)
        candidate = CandidateSpec(objective=trial.objective, learning_rate=trial.learning_rate)
        arm = arm_of(trial.objective)
        draw = self.draws[arm] - 1 if trial.repeat else self.draws[arm]
        self.draws[arm] = draw + 1
        key = TrialKey(arm, draw, trial.repeat)
        setting = Setting() if draw == 0 else Setting(learning_rate=1.0 + 0.01 * draw)
        for rung, shown in self._way(trial):
            record = searches.add(
                self.study, key, rung=rung, start=0 if rung == trial.rung else RUNGS[rung - 1],
                setting=setting_to_json(setting), origin="screen",
                candidate=candidate.model_dump(mode="json"), reason="every arm is screened",
            )  # fmt: skip
            label = candidate.objective.label
            searches.take(self.fence, self.study, record, limit_seconds=None, label=label)
            if ended:
                searches.finish(self.fence, self.study, record, shown)

    def _way(self, trial: Made) -> list[tuple[int, TaskEnd]]:
        failed = trial.log_loss is None
        metrics: dict[str, float | str] = {"message": "loss is NaN"}
        if not failed:
            metrics = {"accuracy": 0.6, "hmk/rbf": 0.5, "steps": float(RUNGS[trial.rung])}
        if trial.error is not None and not failed:
            metrics["standard_error"] = trial.error
        first = TaskEnd(
            ended_by=trial.ended_by if failed else EndedBy.BUDGET, seconds=trial.seconds,
            log_loss=trial.log_loss, drift=None if failed else trial.drift,
            feasible=trial.feasible and not failed, metrics=metrics,
            is_last=trial.rung == len(RUNGS) - 1,
        )  # fmt: skip
        if trial.on is None:
            return [(trial.rung, first)]
        log_loss, drift, seconds = trial.on
        limit = self.study.plan["drift_budget"]
        then = TaskEnd(
            ended_by=EndedBy.BUDGET, seconds=seconds, log_loss=log_loss, drift=drift,
            feasible=limit is None or drift <= limit, metrics={**metrics, "steps": 20.0},
            is_last=True,
        )  # fmt: skip
        return [(trial.rung, first), (trial.rung + 1, then)]


def made_plan(spec: SearchSpec) -> tuple[str, Plan]:
    plain = Arm(PLAIN, CandidateSpec(objective=PLAIN_DPO, learning_rate=RATE))
    others = [
        Arm(arm_of(each), CandidateSpec(objective=each, learning_rate=RATE), score=1.0)
        for each in PAIRS
    ]
    return plan_search(
        arms=[plain, *others], rungs=RUNGS, seed=0, step_seconds=0.1, score_seconds=0.2,
        budget=Budget(spec.gpu_seconds, spec.max_trials, spec.deadline_seconds),
        drift_budget=spec.drift_budget, shape=spec.shape,
    )  # fmt: skip


def store_search(
    session: Session,
    fence: Fence,
    owner_id: str,
    trials: Sequence[Made],
    *,
    spec: SearchSpec,
    running: bool = False,
) -> StudyRow:
    """A study of the job with these trials ended; with `running` one more is on its way."""
    shape, plan = made_plan(spec)
    study = SearchRepository(session).create(
        fence, owner_id=owner_id, spec=spec.model_dump(mode="json"), plan=plan_to_json(plan),
        shape=shape,
    )  # fmt: skip
    stored = Stored(session, fence, study)
    for trial in trials:
        stored.add(trial)
    if running:
        stored.add(Made(RBF, None), ended=False)
    return study


def end_summary(study_id: str, **summary: Any) -> dict[str, Any]:
    """What the step of the search leaves when it has ended."""
    return {
        "summary": {
            "study_id": study_id, "trials": 3, "infeasible": 0, "stopped_by": "finished", **summary
        }
    }  # fmt: skip
