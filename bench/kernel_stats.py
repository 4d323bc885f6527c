"""Variants of `bench.kernel_term` against γ = 0 at equal drift; numbers only."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.profile import Estimate
from worker.training.evaluate import Measured, bootstrap_mean, fit_temperature, trial_score

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 2000
_NEWTON_STEPS = 50


@dataclass(frozen=True)
class Point:
    """A policy on validation, its adapter times `scale`: drift, and margins (N,)."""

    scale: float
    drift: float
    margins: Floats


@dataclass(frozen=True)
class Case:
    """One dataset and seed: prompts of the N validation pairs, log-odds of functions, runs.

    `runs` are by variant; points in the order of scales, the trained adapter's last.
    """

    data: str
    seed: int
    prompt: Ints
    log_odds: Mapping[str, Floats]
    runs: Mapping[str, Sequence[Point]]

    @cached_property
    def fold(self) -> Ints:
        """The half that each pair is in, whole prompts, (N,)."""
        _, index = np.unique(self.prompt, return_inverse=True)
        fold: Ints = index.astype(np.int64) % 2
        return fold


@dataclass(frozen=True)
class Scored:
    """Calibrated log-loss and whether the order is right, of N pairs, (N,) each."""

    losses: Floats
    right: Floats


@dataclass(frozen=True)
class Difference:
    """A variant minus γ = 0 on the same pairs, (N,) each; `drift` is that of the variant."""

    losses: Floats
    right: Floats
    drift: float


def at_drift(points: Sequence[Point], drift: float) -> Floats:
    """Margins (N,) of a run scaled down to a drift; above all of its points, those of the farthest.

    Linear in √drift between points and from the reference, whose margins are 0: near it margins
    grow with the scale of the adapter, and KL with its square.
    """
    ordered = sorted(points, key=lambda point: point.drift)
    ways = np.sqrt([0.0, *(point.drift for point in ordered)])
    margins = [np.zeros_like(ordered[0].margins), *(point.margins for point in ordered)]
    way = math.sqrt(drift)
    after = int(np.searchsorted(ways, way))
    if after == 0:
        return margins[0]
    if after == len(ways):
        return margins[-1]
    share = (way - ways[after - 1]) / (ways[after] - ways[after - 1])
    between: Floats = (1.0 - share) * margins[after - 1] + share * margins[after]
    return between


def common_drift(first: Sequence[Point], second: Sequence[Point]) -> float:
    """The smaller of the drifts that two runs have at their ends."""
    return min(first[-1].drift, second[-1].drift)


def scored(case: Case, margins: Floats) -> Scored:
    """As a trial is scored: the temperature of each half of the prompts is fitted on the other."""
    zeros, ones = np.zeros_like(margins), np.ones_like(margins)
    found = trial_score(Measured(margins, zeros, ones, ones, zeros, case.fold))
    return Scored(losses=found.losses, right=_right(margins))


def scored_together(case: Case, margins: Floats, log_odds: Floats) -> Scored:
    """Score b margin + c f(y+ - y-), both strengths of each half fitted on the other half."""
    combined = np.zeros_like(margins)
    for side in (0, 1):
        others, own = case.fold != side, case.fold == side
        b, c = fit_strengths(margins[others], log_odds[others])
        combined[own] = b * margins[own] + c * log_odds[own]
    return Scored(losses=np.logaddexp(0.0, -combined), right=_right(combined))


def fit_strengths(first: Floats, second: Floats) -> tuple[float, float]:
    """The b, c >= 0 that minimise the smoothed log-loss of b first + c second, as one b does.

    Newton on a convex function of two numbers; where one comes out negative, the better one alone.
    """
    features = np.stack([first, second], axis=1)
    spread = np.abs(features).mean(axis=0)
    if not spread.all():
        return fit_temperature(first), fit_temperature(second)
    scaled = features / spread
    smoothing = 1.0 / (first.size + 2)
    strengths = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        right = 0.5 * (1.0 + np.tanh(0.5 * scaled @ strengths))
        slope = scaled.T @ (right - (1.0 - smoothing)) / first.size
        curvature = (scaled * (right * (1.0 - right))[:, None]).T @ scaled / first.size
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), slope)
        strengths = strengths - step * min(1.0, 5.0 / max(1e-12, float(np.abs(step).max())))
        if float(np.abs(step).max()) < 1e-9:
            break
    if (strengths >= 0.0).all():
        b, c = strengths / spread
        return float(b), float(c)
    alone = ((fit_temperature(first), 0.0), (0.0, fit_temperature(second)))
    return min(alone, key=lambda pair: float(np.logaddexp(0.0, -features @ pair).mean()))


def against(case: Case, variant: str, plain: str) -> Difference:
    """A variant minus γ = 0 at the largest drift that both reach."""
    drift = common_drift(case.runs[variant], case.runs[plain])
    ours = scored(case, at_drift(case.runs[variant], drift))
    theirs = scored(case, at_drift(case.runs[plain], drift))
    return Difference(ours.losses - theirs.losses, ours.right - theirs.right, drift)


def at_end(case: Case, variant: str, plain: str) -> Difference:
    """A variant minus γ = 0 after the same steps, whatever each one's drift."""
    last = case.runs[variant][-1]
    ours, theirs = scored(case, last.margins), scored(case, case.runs[plain][-1].margins)
    return Difference(ours.losses - theirs.losses, ours.right - theirs.right, last.drift)


def together(case: Case, variant: str, function: str, plain: str) -> Difference:
    """A variant with f beside it at prediction, minus γ = 0 alone, at equal drift."""
    drift = common_drift(case.runs[variant], case.runs[plain])
    margins = at_drift(case.runs[variant], drift)
    ours = scored_together(case, margins, case.log_odds[function])
    theirs = scored(case, at_drift(case.runs[plain], drift))
    return Difference(ours.losses - theirs.losses, ours.right - theirs.right, drift)


def alone(case: Case, function: str, plain: str) -> Difference:
    """The function without a policy, minus γ = 0 at the end of its run."""
    last = case.runs[plain][-1]
    ours, theirs = scored(case, case.log_odds[function]), scored(case, last.margins)
    return Difference(ours.losses - theirs.losses, ours.right - theirs.right, last.drift)


def over_prompts(
    cases: Sequence[Case], differences: Sequence[Difference], of: Callable[[Difference], Floats]
) -> Estimate:
    """Mean over the pairs of all cases; the interval is over the prompts of these datasets.

    A prompt that several seeds validate on comes along whole.
    """
    keys = [f"{case.data}:{prompt}" for case in cases for prompt in case.prompt]
    _, group = np.unique(keys, return_inverse=True)
    values = np.concatenate([of(difference) for difference in differences])
    return bootstrap_mean(values, group.astype(np.int64), seed=0, resamples=RESAMPLES)


def over_datasets(
    cases: Sequence[Case], differences: Sequence[Difference], of: Callable[[Difference], Floats]
) -> Estimate:
    """Mean over cases; the interval is over datasets, all seeds of one come along.

    It is widened for how few there are; one dataset has no spread, and its interval is the value.
    """
    names = sorted({case.data for case in cases})
    group = np.array([names.index(case.data) for case in cases], dtype=np.int64)
    values = np.array([float(of(difference).mean()) for difference in differences])
    return bootstrap_mean(values, group, seed=0, resamples=RESAMPLES)


def _right(margins: Floats) -> Floats:
    right: Floats = (margins > 0).astype(np.float64) + 0.5 * (margins == 0)
    return right
