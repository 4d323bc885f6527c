"""Watching a run on validation: its best weights so far, and when it has stopped to get better."""

import math
from dataclasses import dataclass, field

from torch import Tensor

_BEST = "best."
Values = dict[str, int | float | None]


@dataclass
class Watch:
    """Scores of a run; lower is better, and of equal ones the first counts."""

    patience: int | None = None
    scored_step: int = 0
    best_step: int | None = None
    best_log_loss: float = math.inf
    since_best: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def record(self, step: int, log_loss: float, weights: dict[str, Tensor]) -> None:
        """Take the score of the weights after `step`; `weights` are copies."""
        self.scored_step = step
        if log_loss < self.best_log_loss:
            self.best_step, self.best_log_loss, self.since_best = step, log_loss, 0
            self.best = weights
        else:
            self.since_best += 1

    @property
    def is_over(self) -> bool:
        """Whether so many scores without a better one are enough."""
        return self.patience is not None and self.since_best >= self.patience

    def values(self) -> Values:
        """What is no tensor, as JSON has it."""
        return {
            "scored_step": self.scored_step,
            "best_step": self.best_step,
            "best_log_loss": None if self.best_step is None else self.best_log_loss,
            "since_best": self.since_best,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The best weights by the names that a point has for them."""
        return {f"{_BEST}{name}": value for name, value in self.best.items()}

    def restore(self, values: Values, tensors: dict[str, Tensor]) -> None:
        """Go on from what `values` and `tensors` returned."""
        best_step, best = values["best_step"], values["best_log_loss"]
        self.scored_step = int(values["scored_step"] or 0)
        self.best_step = None if best_step is None else int(best_step)
        self.best_log_loss = math.inf if best is None else float(best)
        self.since_best = int(values["since_best"] or 0)
        self.best = {
            name.removeprefix(_BEST): value
            for name, value in tensors.items()
            if name.startswith(_BEST)
        }
