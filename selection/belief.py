"""What the results so far say of every trial at full length: a Gaussian posterior.

In percent of log-loss, the unit of the recommender's scores. At rung k a trial c shows

    y = 100 (-log loss) = level_k + s_k (z_c + u_kc) + e,
    z_c = b score_arm + kernel + divergence + pair + h(setting) - h(recommended),

s_k is how much of an effect shows at that length, u what a short run says wrongly, e the noise of
a seed and of a finite validation set. Kernel and divergence are parts of u as well as of z: what
learns fast at first does so in every pair. Levels are free: trials of the same rung and seed are
compared. How far z is a matter of kernel and divergence is given (_LASTING); the other sizes come
from the first rung, which all arms reach, by empirical Bayes: average over a grid, weighted by
marginal likelihood. A score is believed as far as the first rung bears it out (b).
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from selection.draws import DIMENSIONS, RECOMMENDED, Setting
from selection.study import Arm, Ended, Plan, Study

Floats = NDArray[np.float64]
Config = tuple[str, int]

_AT = np.log([0.02, 0.06, 0.2, 1.0])
_SIGNAL = (0.35, 0.55, 0.8, 1.0)
_CORRELATION = (0.6, 0.75, 0.9, 1.0)
_STEPS = np.log([5.0, 16.0, 60.0, 200.0])
_EARLY_SIGNAL = (0.25, 0.3, 1.0, 1.0)
_EARLY_CORRELATION = (0.33, 0.67, 1.0, 1.0)
_EARLY_SETTINGS = (0.1, 0.2, 0.7, 1.0)
_LEVEL_VARIANCE = 1e4
_SETTING_LENGTH = 1.0
"""In units of log factors: settings e times apart have a correlation of exp(-1/2)."""
_SHARED = 0.5
"""Part of a setting's effect that is the same in all arms."""
_LEAST_SETTING_SD = 3.0
_JITTER = 1e-9
_DRAWS, _DIGITS = 1024, 6

_SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0)
_SPLITS = (
    (0.05, 0.05, 0.9), (0.2, 0.4, 0.4), (0.1, 0.7, 0.2), (0.05, 0.93, 0.02), (0.48, 0.5, 0.02),
    (0.93, 0.05, 0.02),
)  # fmt: skip
_LASTING = (0.05, 0.65, 0.3)
"""How far effects at the end are a matter of kernel, divergence, and neither: divergences explain
most of what pairs at one setting differ by, kernels little (docs/search.md, recorded table)."""
_SLOPES = (0.0, 0.5, 1.0)
_SLOPE_PRIOR = (0.7, 0.2, 0.1)
"""Scores did hardly better than chance where they were compared with runs (docs/selection.md)."""
_NOISES = (0.15, 0.3, 0.6, 1.2)


@dataclass(frozen=True)
class _Named:
    """What a prior knows of an arm; plain DPO shares a kernel and a divergence with none."""

    name: str
    kernel: str
    divergence: str
    score: float

    @classmethod
    def of(cls, arm: Arm) -> "_Named":
        objective = arm.candidate.objective
        if arm.is_plain:
            return cls(arm.name, "plain", "plain", arm.score)
        return cls(arm.name, objective.kernel_name, objective.divergence_name, arm.score)


def signal(step: int, whole: int) -> float:
    """How much of an effect at full length shows after so many steps of it, s_k in (0, 1].

    .35, .55, .8, 1 at 2, 6, 20, 100 % of a long run, as the search was designed; times .25, .3, 1
    after 5, 16, 60 steps: between that and the less that runs of 80 steps show (docs/search.md).
    """
    return _at(step, whole, _SIGNAL, _EARLY_SIGNAL)


def misleading(step: int, whole: int) -> float:
    """Variance of what a rung says wrongly, u, as a multiple of that of effects: 1/rho^2 - 1.

    rho is the correlation with full length that is left without noise: .6, .75, .9, 1 at the same
    parts of a long run, times .33, .67, 1 after as many steps, on the same grounds.
    """
    return 1.0 / _at(step, whole, _CORRELATION, _EARLY_CORRELATION) ** 2 - 1.0


def misleading_settings(step: int, whole: int) -> float:
    """The same of settings: times .1, .2 after 5 and 16 steps, .7 after 60, 1 after 200.

    Who learns fast is ahead in a short run, good or not. All of it is assumed: four settings a
    dataset are recorded, which say hardly more than that the order changes.
    """
    return 1.0 / _at(step, whole, _CORRELATION, _EARLY_SETTINGS) ** 2 - 1.0


def _at(step: int, whole: int, parts: Sequence[float], early: Sequence[float]) -> float:
    if step == whole:
        return 1.0
    part = float(np.interp(math.log(step / whole), _AT, parts))
    return part * float(np.interp(math.log(step), _STEPS, early))


@dataclass(frozen=True)
class Sizes:
    """Standard deviations in percent at full length, the slope b of scores, the noise e.

    `split` is how far u is a matter of kernel, divergence, and neither.
    """

    spread: float
    split: tuple[float, float, float]
    slope: float
    noise: float

    @property
    def setting(self) -> float:
        """Of a setting's effect: tuning is worth about as much as the choice of a pair."""
        return max(self.spread, _LEAST_SETTING_SD)


@dataclass(frozen=True)
class Belief:
    """Posterior over trials by (arm, draw): mean (n,) and covariance (n, n), in percent won.

    Only differences mean something; higher is better.
    """

    configs: tuple[Config, ...]
    mean: Floats
    covariance: Floats
    sizes: Sizes

    @cached_property
    def index(self) -> dict[Config, int]:
        """Where each configuration stands."""
        return {config: i for i, config in enumerate(self.configs)}

    def value(self, config: Config) -> float:
        """Expected percent at full length, rounded: the last bits are those of a library."""
        return round(float(self.mean[self.index[config]]), 9)

    def improvement(self, config: Config, best: float) -> float:
        """E max(0, z - best), percent: what trying a configuration is expected to win."""
        i = self.index[config]
        sd = math.sqrt(max(float(self.covariance[i, i]), _JITTER))
        standard = NormalDist()
        ahead = (float(self.mean[i]) - best) / sd
        return round(sd * (ahead * standard.cdf(ahead) + standard.pdf(ahead)), 9)

    def set_apart(
        self, configs: Sequence[Config], beside: Sequence[Config], number: int
    ) -> list[Config]:
        """The so many configurations that, with `beside`, promise most together, in their order.

        Greedy: next comes who adds most to E max z over those before (a set function of falling
        gains, for which that is within 1 - 1/e of the best set: Nemhauser et al. 1978). The first
        is the best alone; one that is like those before it comes late, however good.
        """
        left, order = sorted(configs), list[Config]()
        if not left or number < 1:
            return []
        draws = self._draws([*left, *beside])
        best = np.full(_DRAWS, -np.inf)
        for config in beside:
            best = np.maximum(best, draws[config])
        while left and len(order) < number:
            gains = [round(float(np.maximum(best, draws[c]).mean()), _DIGITS) for c in left]
            found = max(zip(gains, left, strict=True), key=lambda e: (e[0], self.value(e[1])))[1]
            order.append(found)
            left.remove(found)
            best = np.maximum(best, draws[found])
        return order

    def _draws(self, configs: Sequence[Config]) -> dict[Config, Floats]:
        """Made-up truths of configurations, (draws,) each, in pairs that mirror each other.

        A configuration's own lots follow from its name: whoever else is there changes none of them.
        """
        at = [self.index[config] for config in configs]
        values, vectors = np.linalg.eigh(self.covariance[np.ix_(at, at)])
        root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
        normals = np.stack([_normals(config) for config in configs])
        away = root @ np.concatenate([normals, -normals], axis=1)
        return dict(zip(configs, self.mean[at][:, None] + away, strict=True))

    def beats(self, config: Config, other: Config, *, by: float) -> float:
        """P(config is better than other by more than `by` percent at full length)."""
        i, j = self.index[config], self.index[other]
        variance = self.covariance[i, i] + self.covariance[j, j] - 2 * self.covariance[i, j]
        gap = float(self.mean[i] - self.mean[j]) - by
        return NormalDist().cdf(gap / math.sqrt(max(float(variance), _JITTER)))


@lru_cache(maxsize=1024)
def _normals(config: Config) -> Floats:
    bits = hashlib.sha256(f"{config[0]}:{config[1]}".encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(bits, "big")).normal(size=_DRAWS // 2)


def believe(
    plan: Plan, study: Study, *, proposed: Mapping[Config, Setting] | None = None
) -> Belief:
    """The posterior after all measured results of a study, for its trials and for every arm.

    A pure function of its arguments: the order of results does not matter. `proposed` are settings
    of arms that nobody has tried.
    """
    measured = sorted((e for e in study.ended if e.is_measured), key=lambda e: e.task.key)
    points = _points(plan, study) | dict(proposed or {})
    configs = tuple(points)
    index = {config: i for i, config in enumerate(configs)}
    arms = {arm.name: arm for arm in plan.arms}
    sizes = _sizes(plan, measured)
    prior = np.array([sizes.slope * arms[arm].score for arm, _ in configs])
    named = {name: _Named.of(arm) for name, arm in arms.items()}
    who = [named[arm] for arm, _ in configs]
    settings = list(points.values())
    covariance = np.add(*_covariances(who, settings, sizes, split=_LASTING))
    if not measured:
        return Belief(configs, prior, covariance, sizes)
    rungs = np.array([ended.task.rung for ended in measured])
    repeats = np.array([ended.task.trial.repeat for ended in measured])
    stages = rungs + len(plan.rungs) * repeats
    where = np.array([index[ended.task.trial.config] for ended in measured])
    y = np.array([_percent(ended) for ended in measured])
    scale, wrong, wrong_settings = _rung_terms(plan)
    shown = scale[rungs]
    cross = covariance[:, where] * shown
    total = cross[where, :] * shown[:, None]
    pairs, tuned = _covariances(
        [who[i] for i in where], [settings[i] for i in where], sizes, split=sizes.split
    )
    misled = wrong[rungs] * pairs + wrong_settings[rungs] * tuned
    total += np.equal.outer(rungs, rungs) * np.outer(shown, shown) * misled
    total += sizes.noise**2 * np.eye(len(measured))
    total += _LEVEL_VARIANCE * np.equal.outer(stages, stages)
    gain = np.linalg.solve(total, cross.T).T
    # Levels are far from 0: without their means the solve would lose digits to them.
    residual = y - shown * prior[where]
    for stage in np.unique(stages):
        residual[stages == stage] -= residual[stages == stage].mean()
    return Belief(configs, prior + gain @ residual, covariance - gain @ cross.T, sizes)


def _points(plan: Plan, study: Study) -> dict[Config, Setting]:
    """Every arm at its recommended setting, then every other trial, in one fixed order."""
    points = {(arm.name, 0): RECOMMENDED for arm in plan.arms}
    for task in sorted(study.tasks, key=lambda task: task.key):
        points.setdefault(task.trial.config, task.trial.setting)
    return points


def _percent(ended: Ended) -> float:
    assert ended.log_loss is not None
    return -100.0 * math.log(max(ended.log_loss, 1e-6))


def _rung_terms(plan: Plan) -> tuple[Floats, Floats, Floats]:
    """s_k and Var u / Var z of every rung, of pairs and of settings, each (rungs,)."""
    whole = plan.rungs[-1]
    terms = [
        (signal(step, whole), misleading(step, whole), misleading_settings(step, whole))
        for step in plan.rungs
    ]
    scale, pairs, settings = np.array(terms).T
    return scale, pairs, settings


def _covariances(
    arms: Sequence[_Named],
    settings: Sequence[Setting],
    sizes: Sizes,
    *,
    split: tuple[float, float, float],
) -> tuple[Floats, Floats]:
    """Prior covariances (n, n) of what arms and what settings do, percent squared."""
    alike = np.tensordot(np.array(split), _same_parts(arms), axes=1)
    points = np.array([setting.point for setting in settings])
    at_origin = _nearness(points, np.zeros((1, DIMENSIONS)))
    # The effect of a setting is relative to the recommended one, where it is 0.
    tuned = _nearness(points, points) - at_origin - at_origin.T + 1.0
    pairs: Floats = sizes.spread**2 * alike
    return pairs, sizes.setting**2 * tuned * (_SHARED + (1.0 - _SHARED) * alike)


def _same_parts(arms: Sequence[_Named]) -> Floats:
    """Which share a kernel, a divergence, or are the same arm: (3, n, n) of 0 and 1."""
    names = (
        [arm.kernel for arm in arms],
        [arm.divergence for arm in arms],
        [arm.name for arm in arms],
    )
    return np.stack([np.equal.outer(a, a).astype(np.float64) for a in map(np.array, names)])


def _nearness(a: Floats, b: Floats) -> Floats:
    square = np.sum((a[:, None, :] - b[None, :, :]) ** 2, axis=2)
    found: Floats = np.exp(-0.5 * square / _SETTING_LENGTH**2)
    return found


def _sizes(plan: Plan, measured: Sequence[Ended]) -> Sizes:
    """Empirical Bayes on the first rung's results at recommended settings."""
    first = [
        ended
        for ended in measured
        if ended.task.rung == 0 and ended.task.trial.draw == 0 and ended.task.trial.repeat == 0
    ]
    arms = tuple(_Named.of(plan.arm(ended.task.trial.arm)) for ended in first)
    return _fitted(arms, tuple(_percent(ended) for ended in first), plan.rungs[0], plan.rungs[-1])


@lru_cache(maxsize=256)
def _fitted(arms: tuple[_Named, ...], percents: tuple[float, ...], step: int, whole: int) -> Sizes:
    """Posterior mean of the sizes over a grid, with equal prior weights but for the slopes.

    log N(y - s b score; 0, s^2 spread^2 (lasting + (1/rho^2 - 1) parts) + noise^2), the level free.
    """
    grid = list(itertools.product(_SPREADS, _SPLITS, _SLOPES, _NOISES))
    weights = np.array([_SLOPE_PRIOR[_SLOPES.index(slope)] for _, _, slope, _ in grid])
    weights /= weights.sum()
    if len(arms) >= 3:
        shown, wrong = signal(step, whole), misleading(step, whole)
        logs = _log_likelihoods(arms, np.array(percents), shown, wrong)
        weights *= np.exp(logs - logs.max())
        weights /= weights.sum()
    spreads, splits, slopes, noises = zip(*grid, strict=True)
    split = weights @ np.array(splits)
    return Sizes(
        spread=math.sqrt(float(weights @ np.square(spreads))),
        split=(float(split[0]), float(split[1]), float(split[2])),
        slope=float(weights @ np.array(slopes)),
        noise=math.sqrt(float(weights @ np.square(noises))),
    )


def _log_likelihoods(arms: Sequence[_Named], y: Floats, shown: float, wrong: float) -> Floats:
    """Log marginal likelihoods (grid,) in the order of the grid; the rung's level is projected out.

    With an orthonormal basis of what is orthogonal to 1, level and all, the spread and split share
    an eigenbasis over noises: one decomposition for each split.
    """
    n = len(arms)
    basis = np.linalg.svd(np.ones((1, n)))[2][1:]
    scores = np.array([arm.score for arm in arms])
    rests = np.stack([basis @ (y - shown * slope * scores) for slope in _SLOPES])
    same = _same_parts(arms)
    lasting = np.tensordot(np.array(_LASTING), same, axes=1)
    found = np.empty((len(_SPREADS), len(_SPLITS), len(_SLOPES), len(_NOISES)))
    for column, split in enumerate(_SPLITS):
        parts = lasting + wrong * np.tensordot(np.array(split), same, axes=1)
        values, vectors = np.linalg.eigh(basis @ parts @ basis.T)
        squares = (rests @ vectors) ** 2
        for row, spread in enumerate(_SPREADS):
            for depth, noise in enumerate(_NOISES):
                variance = shown**2 * spread**2 * np.maximum(values, 0.0) + noise**2
                found[row, column, :, depth] = -0.5 * (
                    np.log(variance).sum() + (squares / variance).sum(axis=1)
                )
    return found.reshape(-1)
