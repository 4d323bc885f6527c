"""Which trials are told apart from the best one: a paired cluster bootstrap, seeds included.

A winner is the best of several, and the best of equals looks better than each of them. So a trial
that lies d behind the winner is asked: among equals, how often does this one lie so far behind the
*best* of all? (Hsu 1996, comparisons with the best.) Prompts are drawn whole and with replacement,
the same for all trials, so that how hard a pair is cancels; seeds add a noise of their own, since a
second run of the very same configuration shows another log-loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 10_000
LEVEL = 0.05
"""Of all comparisons of one search together: the chance to call any difference between equals."""
MIN_PROMPTS = 10
"""Below this many prompts nothing is called: a bootstrap of so few is not to be trusted."""
SEED_NOISE = 0.02
"""Standard deviation of log-loss over seeds, as a part of it, where no trial has a second one."""
SEED_NOISE_DEGREES = 3.0
"""What that guess counts for, in degrees of freedom: as much as three second seeds."""
_CELLS = 1 << 22


@dataclass(frozen=True, eq=False)
class Entrant:
    """A configuration at full length: per-pair losses (seeds, pairs) in nats, on the same pairs."""

    number: int
    losses: Floats

    @property
    def log_loss(self) -> float:
        """Mean over seeds and pairs."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class Gap:
    """How far a trial lies behind the winner, nats, and how often one of equals would."""

    number: int
    behind: float
    p_value: float
    """Adjusted for all trials that the winner is compared with (Holm 1979)."""

    @property
    def is_beaten(self) -> bool:
        """Whether the winner is called better than this one."""
        return self.p_value <= LEVEL


def gaps(
    entrants: Sequence[Entrant],
    group: Ints,
    *,
    winner: int,
    seed_noise: float = SEED_NOISE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Gap, ...]:
    """Compare every entrant with the winner, in the order given; the winner is left out.

    With m_i(b) the mean loss of entrant i in resample b, m_i its own, and e_i the noise of seeds,

        p_j = (1 + #{b: T_j(b) - min_i T_i(b) >= m_j - m_winner}) / (1 + resamples),
        T_i(b) = c_b sqrt(G / (G - 1)) (m_i(b) - m_i) + e_i(b),   e_i(b) = s_b z_i(b) / sqrt(S_i),

    then Holm over all j, the winner too: any of them might have been the one behind. G prompts;
    c_b makes the tails those of t with G - 1 degrees. S_i seeds of entrant i, z normal; s_b^2 is
    drawn from the scaled inverse chi-square of the variance between seeds of the same entrant,
    pooled over all. Where none has a second seed it is the guess `seed_noise`, a part of the
    winner's log-loss, with `SEED_NOISE_DEGREES` degrees. Fewer than `MIN_PROMPTS` prompts: every p
    is 1.

    Args:
        entrants: losses (S_i, N) on the same N pairs.
        group: number of each pair's prompt, (N,).

    Raises:
        InvalidInput: shapes differ, numbers come twice, a loss is not finite, or the winner is not
            among them.
    """
    _check(entrants, group, winner, seed_noise)
    means = np.array([entrant.log_loss for entrant in entrants])
    best = next(i for i, entrant in enumerate(entrants) if entrant.number == winner)
    behind = means - means[best]
    _, index = np.unique(group, return_inverse=True)
    prompts = int(index.max()) + 1
    if prompts < MIN_PROMPTS:
        raw = dict.fromkeys(range(len(entrants)), 1.0)
    else:
        rng = np.random.default_rng(seed)
        away = _of_prompts(entrants, index, prompts, resamples, rng)
        away += _of_seeds(entrants, seed_noise * means[best], resamples, rng)
        worse = (away - away.min(axis=1, keepdims=True) >= behind).sum(axis=0)
        raw = {i: (1.0 + float(times)) / (1.0 + resamples) for i, times in enumerate(worse)}
    adjusted = holm(raw)
    return tuple(
        Gap(entrant.number, float(behind[i]), adjusted[i])
        for i, entrant in enumerate(entrants)
        if i != best
    )


def holm(p_values: Mapping[int, float]) -> dict[int, float]:
    """Adjusted p-values of Holm (1979): max over smaller ones of p_(k) (m - k + 1), at most 1."""
    found: dict[int, float] = {}
    highest = 0.0
    for k, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, p_values[name] * (len(p_values) - k)))
        found[name] = highest
    return found


def _check(entrants: Sequence[Entrant], group: Ints, winner: int, seed_noise: float) -> None:
    numbers = [entrant.number for entrant in entrants]
    if winner not in numbers or len(set(numbers)) < len(numbers):
        raise InvalidInput(
            f"the winner is {winner} of {numbers}; expected it once among different numbers"
        )
    for entrant in entrants:
        shape = entrant.losses.shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] != group.size or group.size < 1:
            raise InvalidInput(
                f"losses of trial {entrant.number} have the shape {shape}, groups {group.shape}; "
                "expected (seeds, pairs) with the same pairs for all"
            )
        if not np.isfinite(entrant.losses).all():
            raise InvalidInput(f"losses of trial {entrant.number} are not all finite")
    if not 0.0 <= seed_noise < math.inf:
        raise InvalidInput(f"seed_noise is {seed_noise}; expected a part of a log-loss, 0 or more")


def _of_prompts(
    entrants: Sequence[Entrant],
    index: Ints,
    prompts: int,
    resamples: int,
    rng: np.random.Generator,
) -> Floats:
    """Deviations of resampled means from the means, (resamples, entrants), with the tails of t."""
    pairs = np.stack([entrant.losses.mean(axis=0) for entrant in entrants], axis=1)
    pairs = pairs - pairs.mean(axis=0)
    sums = np.stack([np.bincount(index, weights=column) for column in pairs.T], axis=1)
    counts = np.bincount(index).astype(np.float64)
    rows = max(1, _CELLS // prompts)
    even = np.full(prompts, 1.0 / prompts)
    parts = []
    for start in range(0, resamples, rows):
        drawn = rng.multinomial(prompts, even, size=min(rows, resamples - start)).astype(np.float64)
        parts.append((drawn @ sums) / (drawn @ counts)[:, None])
    degrees = prompts - 1
    tails = np.sqrt(degrees / rng.chisquare(degrees, size=(resamples, 1)))
    found: Floats = np.concatenate(parts) * tails * math.sqrt(prompts / degrees)
    return found


def _of_seeds(
    entrants: Sequence[Entrant], guess: float, resamples: int, rng: np.random.Generator
) -> Floats:
    """Noise of the means from seeds, nats, (resamples, entrants)."""
    means = [entrant.losses.mean(axis=1) for entrant in entrants]
    seeds = np.array([of.size for of in means])
    degrees = float((seeds - 1).sum())
    total = sum(float(np.square(of - of.mean()).sum()) for of in means)
    if degrees == 0.0:
        degrees, total = SEED_NOISE_DEGREES, SEED_NOISE_DEGREES * guess**2
    spread = np.sqrt(total / rng.chisquare(degrees, size=(resamples, 1)))
    found: Floats = spread * rng.normal(size=(resamples, len(entrants))) / np.sqrt(seeds)
    return found
