"""Which trial of a search wins, and which ones it is tied with; needs nothing but numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FinishedTrial:
    """A trial as the winner is chosen from.

    `standard_error` is that of its log-loss minus the best trial's, pair by pair (0 for the best).
    """

    number: int
    label: str
    log_loss: float | None
    drift: float | None
    feasible: bool
    standard_error: float = 0.0


@dataclass(frozen=True)
class Selection:
    """The winner, those it is tied with (by number) and a sentence that says how it was chosen."""

    winner: int | None
    tied: tuple[int, ...]
    reason: str


def select_winner(results: Sequence[FinishedTrial]) -> Selection:
    """Choose the best feasible calibrated log-loss; among ties the lower drift.

    Tied is a trial whose log-loss is above the lowest by at most one standard error of its own
    paired difference: the one-standard-error rule (Breiman et al. 1984), a preference for less
    drift and no test. Two errors would hand most small searches to the trial that learned least.
    Equal drift: lower log-loss, then the earlier trial. Without a feasible measured trial there
    is no winner.
    """
    measured = [
        (trial.log_loss, trial)
        for trial in results
        if trial.feasible and trial.log_loss is not None and math.isfinite(trial.log_loss)
    ]
    if not measured:
        return Selection(
            winner=None,
            tied=(),
            reason=f"None of {len(results)} trials ended with a log-loss within the constraints.",
        )
    lowest, best = min(measured, key=lambda entry: (entry[0], entry[1].number))
    ties = [entry for entry in measured if entry[0] <= lowest + entry[1].standard_error]
    _, winner = min(
        ties,
        key=lambda entry: (
            math.inf if entry[1].drift is None else entry[1].drift,
            entry[0],
            entry[1].number,
        ),
    )
    tied = tuple(sorted(trial.number for _, trial in ties if trial is not winner))
    return Selection(winner=winner.number, tied=tied, reason=_why(winner, best, tied))


def _why(winner: FinishedTrial, best: FinishedTrial, tied: tuple[int, ...]) -> str:
    if not tied:
        return (
            f"Trial {winner.number} ({winner.label}) has the lowest feasible log-loss, "
            f"{winner.log_loss:.4f}; no other comes within one standard error of the difference."
        )
    drift = "unknown" if winner.drift is None else f"{winner.drift:.4f}"
    return (
        f"{len(tied) + 1} trials tie: none is above the lowest feasible log-loss, "
        f"{best.log_loss:.4f} of trial {best.number}, by more than one standard error of the "
        f"difference; trial {winner.number} ({winner.label}) has the least drift of them, {drift}."
    )
