"""Which trial of a search wins, and which ones it is tied with; needs nothing but numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import InvalidInput
from core.seeds import levels
from selection.ties import (
    LEVEL,
    SEED_NOISE,
    Entrant,
    Floats,
    Gap,
    Ints,
    SeedNoise,
    gaps,
    holm,
    on_level,
)

_AGREE = 1e-3


@dataclass(frozen=True, eq=False)
class FinishedTrial:
    """A configuration as the winner is chosen from.

    `log_losses` are those of every seed that it was trained with, by the number of the seed, empty
    where none was measured. `losses` (seeds, pairs) are the same before the mean over pairs, on the
    pairs that all are scored on; where they are lost, None, and `standard_error` stands for them:
    that of its log-loss minus the lowest one's (0 for that).
    """

    number: int
    label: str
    log_losses: Mapping[int, float]
    drift: float | None
    feasible: bool
    standard_error: float = 0.0
    losses: Floats | None = None

    @property
    def is_measured(self) -> bool:
        """Whether there are log-losses to compare."""
        return bool(self.log_losses) and all(map(math.isfinite, self.log_losses.values()))


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
    results: Sequence[FinishedTrial], group: Ints | None = None, *, noise: SeedNoise = SEED_NOISE
) -> Selection:
    """Choose the winner among feasible trials, and say which others it is not told apart from.

    The winner has the lowest calibrated log-loss, or, of those that lie above it by at most one
    standard error of their own paired difference, the least drift (the one-standard-error rule,
    Breiman et al. 1984: a preference, no test; two errors would hand most small searches to the
    trial that learned least). Equal drift: lower log-loss, then the earlier trial. Log-losses are
    those on one level of seeds (`core.seeds.levels`), which infeasible trials help to find.

    Tied is every other trial that is not beaten at a level of 5 % over all comparisons (Holm):
    `selection.ties` where all losses are given with the prompts `group` (pairs,) of their pairs,
    else normal with the standard errors given. Both count the noise of seeds. Without a feasible
    measured trial there is no winner.

    Raises:
        InvalidInput: losses and log-losses disagree, or shapes differ.
    """
    measured = [trial for trial in results if trial.is_measured]
    if not any(trial.feasible for trial in measured):
        return Selection(
            winner=None,
            tied=(),
            reason=f"None of {len(results)} trials ended with a log-loss within the constraints.",
        )
    entrants = None if group is None else _entrants(measured)
    # Losses and log-losses are to be on one level, which some infeasible trials may not tell of.
    known = measured if entrants is None else [t for t in measured if t.losses is not None]
    found = levels([trial.log_losses for trial in known])
    level = {trial.number: value for trial, value in zip(known, found, strict=True)}
    racing = [trial for trial in measured if trial.feasible]
    lowest = min(racing, key=lambda trial: (level[trial.number], trial.number))
    if entrants is None or group is None:
        errors = {t.number: 0.0 if t is lowest else t.standard_error for t in racing}
    else:
        pairs = dict(zip([e.number for e in entrants], on_level(entrants), strict=True))
        best = pairs[lowest.number]
        errors = {number: paired_error(own - best, group) for number, own in pairs.items()}
    race = [_Measured(trial, level[trial.number], errors[trial.number]) for trial in racing]
    winner = _chosen(race)
    apart: tuple[Gap, ...] = ()
    if entrants is None or group is None:
        beaten = _beaten_by_errors(race, winner, noise)
    else:
        apart = gaps(entrants, group, winner=winner.number, noise=noise)
        beaten = {gap.number for gap in apart if gap.is_beaten}
    tied = tuple(
        sorted(m.number for m in race if m.number not in beaten and m.number != winner.number)
    )
    return Selection(winner.number, tied, _why(race, winner, tied), apart)


def _entrants(measured: Sequence[FinishedTrial]) -> list[Entrant] | None:
    """Everybody's losses; None where some that are feasible are lost.

    Raises:
        InvalidInput: a log-loss is not the mean of its losses.
    """
    found = []
    for trial in measured:
        if trial.losses is None:
            if trial.feasible:
                return None
            continue
        losses = np.asarray(trial.losses, dtype=np.float64)
        entrant = Entrant(trial.number, losses, tuple(trial.log_losses), races=trial.feasible)
        said, shown = list(trial.log_losses.values()), losses.mean(axis=-1)
        if shown.shape != (len(said),) or not np.allclose(shown, said, rtol=_AGREE, atol=0.0):
            raise InvalidInput(
                f"trial {trial.number} has log-losses of {said} and losses of mean "
                f"{shown.tolist()}; expected the mean over pairs of every seed"
            )
        found.append(entrant)
    return found


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


def _lowest(race: Sequence[_Measured]) -> _Measured:
    return min(race, key=lambda m: (m.log_loss, m.number))


def _chosen(race: Sequence[_Measured]) -> _Measured:
    lowest = _lowest(race)
    near = [m for m in race if m.log_loss <= lowest.log_loss + m.error]
    return min(
        near,
        key=lambda m: (
            math.inf if m.trial.drift is None else m.trial.drift,
            m.log_loss,
            m.number,
        ),
    )


def _beaten_by_errors(race: Sequence[_Measured], winner: _Measured, noise: SeedNoise) -> set[int]:
    """As `selection.ties`, with a normal in place of resamples.

    Two sides, times half of the trials, and Holm: as many comparisons as there are pairs of trials,
    since any of them might have been the best.
    """
    p_values = {}
    for m in race:
        if m.number == winner.number:
            continue
        error = math.hypot(m.error, winner.error, math.sqrt(2.0) * noise.own * winner.log_loss)
        behind = m.log_loss - winner.log_loss
        worse = behind > 0.0 and error > 0.0
        two_sided = math.erfc(behind / error / math.sqrt(2.0)) if worse else 1.0
        p_values[m.number] = two_sided * len(race) / 2
    return {number for number, p_value in holm(p_values).items() if p_value <= LEVEL}


def _why(race: Sequence[_Measured], winner: _Measured, tied: tuple[int, ...]) -> str:
    name = f"Trial {winner.number} ({winner.trial.label})"
    lowest = _lowest(race)
    if winner is lowest:
        chosen = f"{name} has the lowest feasible log-loss, {winner.log_loss:.4f}"
    else:
        drift = "unknown" if winner.trial.drift is None else f"{winner.trial.drift:.4f}"
        chosen = (
            f"{name} has the least drift, {drift}, of those within one standard error of the "
            f"lowest feasible log-loss, {lowest.log_loss:.4f} of trial {lowest.number}"
        )
    if len(race) == 1:
        return f"{chosen}; no other trial is measured."
    if not tied:
        return f"{chosen}; chance of prompts and seeds does not explain how far the others lie off."
    return (
        f"{len(tied) + 1} trials tie: chance of prompts and seeds explains how far they lie apart. "
        f"{chosen}."
    )
