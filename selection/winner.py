"""Which trial of a search wins, and which ones it is tied with; needs nothing but numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import InvalidInput
from selection.ties import LEVEL, SEED_NOISE, Entrant, Floats, Gap, Ints, gaps, holm

_AGREE = 1e-3


@dataclass(frozen=True, eq=False)
class FinishedTrial:
    """A trial as the winner is chosen from.

    `losses` (seeds, pairs) are those of every seed it was trained with, on the pairs that all
    trials are scored on, and `log_loss` their mean; where a trial's are lost, None, and
    `standard_error` stands for them: that of its log-loss minus the lowest trial's (0 for that).
    """

    number: int
    label: str
    log_loss: float | None
    drift: float | None
    feasible: bool
    standard_error: float = 0.0
    losses: Floats | None = None


@dataclass(frozen=True)
class Selection:
    """The winner, those it is tied with (by number) and a sentence that says how it was chosen.

    `gaps` is how far the others lie behind it, empty where no losses are at hand.
    """

    winner: int | None
    tied: tuple[int, ...]
    reason: str
    gaps: tuple[Gap, ...] = ()


@dataclass(frozen=True)
class _Measured:
    trial: FinishedTrial
    log_loss: float
    error: float

    @property
    def number(self) -> int:
        return self.trial.number


def select_winner(
    results: Sequence[FinishedTrial], group: Ints | None = None, *, seed_noise: float = SEED_NOISE
) -> Selection:
    """Choose the winner among feasible trials, and say which others it is not told apart from.

    The winner has the lowest calibrated log-loss, or, of those that lie above it by at most one
    standard error of their own paired difference, the least drift (the one-standard-error rule,
    Breiman et al. 1984: a preference, no test; two errors would hand most small searches to the
    trial that learned least). Equal drift: lower log-loss, then the earlier trial.

    Tied is every other trial that is not beaten at a level of 5 % over all comparisons (Holm):
    `selection.ties` where all losses are given with the prompts `group` (pairs,) of their pairs,
    else normal with the standard errors given. Both count the noise of seeds, `seed_noise` as a
    part of the log-loss where no second seed has shown it. Without a feasible measured trial there
    is no winner.

    Raises:
        InvalidInput: losses and log-losses disagree, or shapes differ.
    """
    measured = [
        (trial, trial.log_loss)
        for trial in results
        if trial.feasible and trial.log_loss is not None and math.isfinite(trial.log_loss)
    ]
    if not measured:
        return Selection(
            winner=None,
            tied=(),
            reason=f"None of {len(results)} trials ended with a log-loss within the constraints.",
        )
    lowest = min(measured, key=lambda entry: (entry[1], entry[0].number))[0]
    entrants = None if group is None else _entrants(measured)
    race = [_Measured(t, loss, _error(t, lowest, group, entrants)) for t, loss in measured]
    winner = _chosen(race, lowest)
    found: tuple[Gap, ...] = ()
    if entrants is None or group is None:
        beaten = _beaten_by_errors(race, winner, seed_noise)
    else:
        found = gaps(entrants, group, winner=winner.number, seed_noise=seed_noise)
        beaten = {gap.number for gap in found if gap.is_beaten}
    tied = tuple(
        sorted(m.number for m in race if m.number not in beaten and m.number != winner.number)
    )
    return Selection(winner.number, tied, _why(winner, lowest, tied, len(race)), found)


def _entrants(measured: Sequence[tuple[FinishedTrial, float]]) -> list[Entrant] | None:
    """Everybody's losses; None where some are lost.

    Raises:
        InvalidInput: a log-loss is not the mean of the losses.
    """
    found = []
    for trial, log_loss in measured:
        if trial.losses is None:
            return None
        entrant = Entrant(trial.number, np.asarray(trial.losses, dtype=np.float64))
        if not math.isclose(entrant.log_loss, log_loss, rel_tol=_AGREE):
            raise InvalidInput(
                f"trial {trial.number} has a log-loss of {log_loss} and losses of mean "
                f"{entrant.log_loss}; expected the mean over its seeds and pairs"
            )
        found.append(entrant)
    return found


def _error(
    trial: FinishedTrial,
    lowest: FinishedTrial,
    group: Ints | None,
    entrants: Sequence[Entrant] | None,
) -> float:
    """Standard error of a trial's difference from the lowest, over prompts."""
    if trial is lowest:
        return 0.0
    if entrants is None or group is None:
        return trial.standard_error
    by_number = {entrant.number: entrant.losses.mean(axis=0) for entrant in entrants}
    return paired_error(by_number[trial.number] - by_number[lowest.number], group)


def paired_error(differences: Floats, group: Ints) -> float:
    """Standard error of the mean of differences (pairs,) whose prompts are independent.

    sqrt(G/(G-1) sum_g (sum_{i in g} (v_i - mean))^2) / N (Cameron & Miller 2015); 0 for one prompt.
    """
    _, index = np.unique(group, return_inverse=True)
    sums = np.bincount(index, weights=differences - differences.mean())
    if sums.size < 2:
        return 0.0
    spread = float(np.square(sums).sum()) * sums.size / (sums.size - 1)
    return math.sqrt(spread) / differences.size


def _chosen(race: Sequence[_Measured], lowest: FinishedTrial) -> _Measured:
    assert lowest.log_loss is not None
    near = [m for m in race if m.log_loss <= lowest.log_loss + m.error]
    return min(
        near,
        key=lambda m: (
            math.inf if m.trial.drift is None else m.trial.drift,
            m.log_loss,
            m.number,
        ),
    )


def _beaten_by_errors(race: Sequence[_Measured], winner: _Measured, seed_noise: float) -> set[int]:
    """As `selection.ties`, with a normal in place of resamples.

    Two sides, times half of the trials, and Holm: as many comparisons as there are pairs of trials,
    since any of them might have been the best.
    """
    p_values = {}
    for m in race:
        if m.number == winner.number:
            continue
        error = math.hypot(m.error, winner.error, math.sqrt(2.0) * seed_noise * winner.log_loss)
        behind = m.log_loss - winner.log_loss
        worse = behind > 0.0 and error > 0.0
        two_sided = math.erfc(behind / error / math.sqrt(2.0)) if worse else 1.0
        p_values[m.number] = two_sided * len(race) / 2
    return {number for number, p_value in holm(p_values).items() if p_value <= LEVEL}


def _why(winner: _Measured, lowest: FinishedTrial, tied: tuple[int, ...], measured: int) -> str:
    name = f"Trial {winner.number} ({winner.trial.label})"
    if winner.trial is lowest:
        chosen = f"{name} has the lowest feasible log-loss, {winner.log_loss:.4f}"
    else:
        drift = "unknown" if winner.trial.drift is None else f"{winner.trial.drift:.4f}"
        chosen = (
            f"{name} has the least drift, {drift}, of those within one standard error of the "
            f"lowest feasible log-loss, {lowest.log_loss:.4f} of trial {lowest.number}"
        )
    others = measured - 1
    if not others:
        return f"{chosen}; no other trial is measured."
    if not tied:
        return f"{chosen}; chance of prompts and seeds does not explain how far the others lie off."
    return (
        f"{len(tied) + 1} trials tie: chance of prompts and seeds explains how far they lie apart. "
        f"{chosen}."
    )
