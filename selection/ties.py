"""Which trials are told apart from the best one: a paired cluster bootstrap, seeds included.

A winner is the best of several, and the best of equals looks better than each of them. So a trial
that lies d behind the winner is asked: among equals, how often does this one lie so far behind the
*best* of all? (Hsu 1996, comparisons with the best.) Prompts are drawn whole and with replacement,
the same for all trials, so that how hard a pair is cancels. Seeds add a noise of their own, since a
second run of the very same configuration shows another log-loss; what a seed does to all trials
alike cancels where they share it (core/seeds.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidInput
from core.seeds import level_weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 10_000
LEVEL = 0.05
"""Of all comparisons of one search together: the chance to call any difference between equals."""
MIN_PROMPTS = 10
"""Below this many prompts nothing is called: a bootstrap of so few is not to be trusted."""
_CELLS = 1 << 22


@dataclass(frozen=True)
class SeedNoise:
    """What is known of seeds before any second one: standard deviations as parts of a log-loss.

    `own` is what a seed does to one trial and not to the others, `shared` what it does to all of
    them. Each counts as much as its `degrees` second seeds.
    """

    own: float
    shared: float
    own_degrees: float = 3.0
    shared_degrees: float = 2.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.own < math.inf and 0.0 <= self.shared < math.inf):
            raise InvalidInput(
                f"noise of seeds is {self.own} and {self.shared}; expected parts of a log-loss, "
                "0 or more"
            )


SEED_NOISE = SeedNoise(own=0.03, shared=0.06)
"""A guess: the recorded table (docs/search.md) has up to about as much of shared noise, and less of
own noise, but that of pairs as recommended. Where settings differ nothing is recorded."""


@dataclass(frozen=True, eq=False)
class Entrant:
    """A configuration at full length: per-pair losses (seeds, pairs) in nats, on the same pairs.

    `seeds` names the seed of each row, 0, 1, ... unless given: rows of equal names were trained
    with the same lots. One that does not race is compared with nobody and tells what seeds do.
    """

    number: int
    losses: Floats
    seeds: tuple[int, ...] = ()
    races: bool = True

    @property
    def labels(self) -> tuple[int, ...]:
        """The seed of each row."""
        return self.seeds or tuple(range(self.losses.shape[0]))


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


def on_level(entrants: Sequence[Entrant]) -> Floats:
    """Losses of the pairs (entrants, pairs), what seeds do to all alike taken off pair by pair."""
    weights = np.array(level_weights([entrant.labels for entrant in entrants]))
    found: Floats = weights @ np.concatenate([entrant.losses for entrant in entrants])
    return found


def gaps(
    entrants: Sequence[Entrant],
    group: Ints,
    *,
    winner: int,
    noise: SeedNoise = SEED_NOISE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Gap, ...]:
    """Compare every entrant with the winner, in the order given; the winner is left out.

    With m_i the mean loss of entrant i on one level of seeds (`core.seeds.levels`), m_i(b) that of
    resample b, and e_i the noise of seeds,

        p_j = (1 + #{b: T_j(b) - min_i T_i(b) >= m_j - m_winner}) / (1 + resamples),
        T_i(b) = t_b sqrt(G / (G - 1)) (m_i(b) - m_i) + e_i(b),
        e(b) = W (own(b) + shared(b)),

    then Holm over all j, the winner too: any of them might have been the one behind. G prompts;
    t_b makes the tails those of t with G - 1 degrees. W takes mean losses of single runs to levels;
    own(b) is a normal of each run and shared(b) one of each seed, their variances drawn from scaled
    inverse chi-squares: of the residuals of y_is = m_i + c_s and of the c_s, each together with
    what `noise` says before. Fewer than `MIN_PROMPTS` prompts: every p is 1.

    Args:
        entrants: losses (S_i, N) on the same N pairs.
        group: number of each pair's prompt, (N,).

    Raises:
        InvalidInput: shapes differ, numbers come twice, a loss is not finite, or the winner is not
            among those that race.
    """
    _check(entrants, group, winner)
    losses = on_level(entrants)
    racing = [i for i, entrant in enumerate(entrants) if entrant.races]
    numbers = [entrants[i].number for i in racing]
    means = losses[racing].mean(axis=1)
    best = numbers.index(winner)
    behind = means - means[best]
    _, index = np.unique(group, return_inverse=True)
    prompts = int(index.max()) + 1
    if prompts < MIN_PROMPTS:
        raw = dict.fromkeys(range(len(racing)), 1.0)
    else:
        rng = np.random.default_rng(seed)
        away = _of_prompts(losses[racing], index, prompts, resamples, rng)
        away += _of_seeds(entrants, noise, float(means[best]), resamples, rng)[:, racing]
        worse = (away - away.min(axis=1, keepdims=True) >= behind).sum(axis=0)
        raw = {i: (1.0 + float(times)) / (1.0 + resamples) for i, times in enumerate(worse)}
    adjusted = holm(raw)
    return tuple(
        Gap(number, float(behind[i]), adjusted[i]) for i, number in enumerate(numbers) if i != best
    )


def holm(p_values: Mapping[int, float]) -> dict[int, float]:
    """Adjusted p-values of Holm (1979): max over smaller ones of p_(k) (m - k + 1), at most 1."""
    found: dict[int, float] = {}
    highest = 0.0
    for k, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, p_values[name] * (len(p_values) - k)))
        found[name] = highest
    return found


def _check(entrants: Sequence[Entrant], group: Ints, winner: int) -> None:
    numbers = [entrant.number for entrant in entrants]
    racing = [entrant.number for entrant in entrants if entrant.races]
    if winner not in racing or len(set(numbers)) < len(numbers):
        raise InvalidInput(
            f"the winner is {winner} of {racing}; expected it once among different numbers"
        )
    for entrant in entrants:
        shape, labels = entrant.losses.shape, entrant.labels
        if len(shape) != 2 or shape[0] < 1 or shape[1] != group.size or group.size < 1:
            raise InvalidInput(
                f"losses of trial {entrant.number} have the shape {shape}, groups {group.shape}; "
                "expected (seeds, pairs) with the same pairs for all"
            )
        if len(set(labels)) < len(labels) or len(labels) != shape[0]:
            raise InvalidInput(
                f"losses of trial {entrant.number} are {shape[0]} rows of seeds {labels}; expected "
                "one row of each"
            )
        if not np.isfinite(entrant.losses).all():
            raise InvalidInput(f"losses of trial {entrant.number} are not all finite")


def _of_prompts(
    losses: Floats, index: Ints, prompts: int, resamples: int, rng: np.random.Generator
) -> Floats:
    """Deviations of resampled means from the means, (resamples, entrants), with the tails of t."""
    pairs = losses.T - losses.mean(axis=1)
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
    entrants: Sequence[Entrant],
    noise: SeedNoise,
    log_loss: float,
    resamples: int,
    rng: np.random.Generator,
) -> Floats:
    """Noise of the levels from seeds, nats, (resamples, entrants)."""
    y = np.concatenate([entrant.losses.mean(axis=1) for entrant in entrants])
    of = np.repeat(np.arange(len(entrants)), [len(entrant.labels) for entrant in entrants])
    names, seeds = np.unique([s for e in entrants for s in e.labels], return_inverse=True)
    entrant = np.equal.outer(of, np.arange(len(entrants))).astype(np.float64)
    centre = np.eye(of.size) - entrant @ np.linalg.pinv(entrant)
    seed = centre @ np.equal.outer(seeds, np.arange(names.size)).astype(np.float64)
    shifts = np.linalg.pinv(seed) @ (centre @ y)
    shared_degrees = int(np.linalg.matrix_rank(seed))
    rest = centre @ y - seed @ shifts
    own_degrees = of.size - len(entrants) - shared_degrees

    def drawn(guess: float, weight: float, total: float, degrees: int, columns: int) -> Floats:
        total += weight * (guess * log_loss) ** 2
        spread = np.sqrt(total / rng.chisquare(weight + degrees, size=(resamples, 1)))
        found: Floats = spread * rng.normal(size=(resamples, columns))
        return found

    own = drawn(noise.own, noise.own_degrees, float(rest @ rest), own_degrees, of.size)
    shared = drawn(
        noise.shared, noise.shared_degrees, float(shifts @ shifts), shared_degrees, names.size
    )
    weights = np.array(level_weights([each.labels for each in entrants]))
    found: Floats = (own + shared[:, seeds]) @ weights.T
    return found
