"""Tasks of searches as their repository takes and gives them."""

from dataclasses import dataclass
from typing import Any

from core.lifecycle import EndedBy, TrialStatus
from models.experiment import TaskRow, TrialRow


@dataclass(frozen=True)
class TaskRecord:
    """A task with its trial."""

    task: TaskRow
    trial: TrialRow

    def facts(self) -> dict[str, Any]:
        """Return both as `selection.wire.TaskFacts` has them."""
        task, trial = self.task, self.trial
        return {
            "arm": trial.arm, "draw": trial.draw, "repeat": trial.repeat,
            "setting": trial.setting, "origin": trial.origin, "rung": task.rung,
            "start": task.start, "status": task.status, "limit_seconds": task.limit_seconds,
            "seconds": task.seconds, "lost_seconds": task.lost_seconds,
            "ended_by": task.ended_by, "log_loss": task.log_loss, "drift": task.drift,
        }  # fmt: skip


@dataclass(frozen=True)
class TrialKey:
    """What tells a trial from every other one of its search."""

    arm: str
    draw: int
    repeat: int


@dataclass(frozen=True)
class TaskEnd:
    """What came of a task: `log_loss` and `drift` where its rung was reached."""

    ended_by: EndedBy
    seconds: float
    log_loss: float | None
    drift: float | None
    feasible: bool
    metrics: dict[str, float | str]
    is_last: bool

    @property
    def trial_status(self) -> TrialStatus:
        """What becomes of its trial."""
        if self.ended_by is EndedBy.BUDGET:
            return TrialStatus.COMPLETE if self.is_last else TrialStatus.WAITING
        return TrialStatus.PRUNED if self.ended_by is EndedBy.PRUNER else TrialStatus.FAIL
