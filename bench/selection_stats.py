"""How well a ranking that was made from metrics agrees with one that was trained; numbers only."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.profile import Estimate
from worker.training.evaluate import bootstrap_mean

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], float]

RESAMPLES = 1000
TOP = 10
_Z975 = 1.959963984540054


@dataclass(frozen=True)
class Case:
    """The P pairs of one dataset and seed: what was recommended, and what training them gave.

    `scores` (P,), higher is better; `order`, numbers of the pairs as they are recommended, best
    first; `losses` (P, N) and `plain` (N,), calibrated log-losses on N validation pairs of each
    pair and of plain DPO; `group` (N,), the prompts of those.
    """

    data: str
    seed: int
    scores: Floats
    order: Sequence[int]
    losses: Floats
    plain: Floats
    group: Ints

    @property
    def trained(self) -> Floats:
        """Log-loss of each pair, (P,)."""
        trained: Floats = self.losses.mean(axis=1)
        return trained


def kendall_tau(first: Floats, second: Floats) -> float:
    """Kendall's tau-b of two scores of the same things, (concordant - discordant) / √(n₁ n₂).

    n₁ and n₂ count the pairs of things that each does not tie (Kendall 1945). One that ties all of
    them orders nothing: 0. Domain: two or more things.
    """
    if first.shape != second.shape or first.ndim != 1 or first.size < 2:
        raise ValueError(
            f"received scores of shapes {first.shape} and {second.shape}, expected two of the same "
            "length, at least 2"
        )
    upper = np.triu_indices(first.size, k=1)
    a = np.sign(first[:, None] - first[None, :])[upper]
    b = np.sign(second[:, None] - second[None, :])[upper]
    untied = float(np.abs(a).sum() * np.abs(b).sum())
    return float((a * b).sum()) / math.sqrt(untied) if untied else 0.0


def rank_of(number: int, losses: Floats) -> float:
    """Place of a thing when the smallest loss is 1; of equal ones the mean of their places."""
    below = int((losses < losses[number]).sum())
    equal = int((losses == losses[number]).sum())
    return below + (equal + 1) / 2


def best_is_within(order: Sequence[int], losses: Floats, *, top: int = TOP) -> bool:
    """Whether a thing of the smallest loss is among the first `top` of `order`."""
    return bool(losses[list(order[:top])].min() == losses.min())


def regret(loss: float, losses: Floats) -> float:
    """How much a loss is above the smallest of `losses`.

    The smallest of many noisy losses is too small by chance, so that this is too large, by the same
    amount for whatever is compared; differences of regrets are free of it.
    """
    return loss - float(losses.min())


def over_prompts(case: Case, statistic: Statistic, *, seed: int = 0) -> Estimate:
    """A statistic of the trained log-losses (P,) with its interval over validation prompts.

    Percentiles over resamples of whole prompts, widened to hold the value itself: resampling adds
    noise to a ranking and pulls its agreement with another towards 0.
    """
    _, index = np.unique(case.group, return_inverse=True)
    prompts = int(index.max()) + 1
    counts = np.bincount(index).astype(np.float64)
    sums = np.stack([np.bincount(index, weights=row, minlength=prompts) for row in case.losses])
    draws = np.random.default_rng(seed).multinomial(
        prompts, np.full(prompts, 1.0 / prompts), size=RESAMPLES
    )
    means = (draws @ sums.T) / (draws @ counts)[:, None]
    low, high = np.quantile([statistic(losses) for losses in means], [0.025, 0.975])
    value = statistic(case.trained)
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def over_datasets(cases: Sequence[Case], values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean over cases with its interval over datasets; all cases of a dataset come along.

    Cases of one dataset share its pairs. The interval is widened for how few datasets there are;
    one dataset alone has no spread, and its interval is the value.
    """
    names = sorted({case.data for case in cases})
    group = np.array([names.index(case.data) for case in cases], dtype=np.int64)
    return bootstrap_mean(np.array(values, dtype=np.float64), group, seed=seed)


def share(hits: int, trials: int) -> Estimate:
    """A share with Wilson's 95 % interval (1927), which is not empty at 0 and 1.

    Domain: 0 <= hits <= trials, trials >= 1.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"received {hits} of {trials}, expected at least one trial, hits in it")
    value, z2 = hits / trials, _Z975**2
    centre = (value + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z975 * math.sqrt(value * (1 - value) / trials + z2 / (4 * trials**2))
    half /= 1 + z2 / trials
    low = centre - half if hits else 0.0
    high = centre + half if hits < trials else 1.0
    return Estimate(value=value, low=low, high=high)
