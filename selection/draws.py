"""Settings of an arm's hyperparameters: what they are, and how the next one is drawn.

A setting multiplies what is recommended for its arm, so that one setting means the same for every
pair. The next one is drawn from a mix of three densities (PriorBand: Mallik et al., "PriorBand:
Practical Hyperparameter Optimization in the Age of Deep Learning", 2306.12370): around what is
recommended, around the best found so far, and uniform over the range.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.run_spec import CandidateSpec
from core.spec import MixtureKernelSpec, MixtureWeights, PenaltyTerm

Floats = NDArray[np.float64]

REACH = 4.0
"""A factor lies in [1/4, 4], the reach of the search space around its centre."""
_LOG_REACH = math.log(REACH)
PRIOR_SD = 0.7
"""Of the logarithm of a factor around the recommended one."""
INCUMBENT_SD = 0.35
ETA = 3
_WEIGHT_LOW, _WEIGHT_HIGH = 0.05, 0.95
# Weights of a mixture in [0.05, 0.95] are moved to [-log 4, log 4], the range of the factors.
_WEIGHT_SCALE = 2.0 * _LOG_REACH / (_WEIGHT_HIGH - _WEIGHT_LOW)
_RANGES = {"beta": (0.01, 2.0), "gamma": (0.01, 1.0), "alpha": (0.03, 30.0)}
"""Those of the search space (selection/space.py); a test compares them."""


class Density(StrEnum):
    """The three parts of the mix."""

    PRIOR = "prior"
    INCUMBENT = "incumbent"
    UNIFORM = "uniform"


@dataclass(frozen=True)
class Setting:
    """Factors on the recommended values of an arm; `mixture` replaces the weights of HMK.

    `mixture` is (tau_local, rbf, spectral), each in [0.05, 0.95].
    """

    learning_rate: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    alpha: float = 1.0
    mixture: tuple[float, float, float] | None = None

    @cached_property
    def point(self) -> tuple[float, ...]:
        """Coordinates (7,) in [-log 4, log 4], 0 the recommended value."""
        factors = (self.learning_rate, self.beta, self.gamma, self.alpha)
        weights = (0.5, 0.5, 0.5) if self.mixture is None else self.mixture
        return (
            *(math.log(factor) for factor in factors),
            *((weight - 0.5) * _WEIGHT_SCALE for weight in weights),
        )


RECOMMENDED = Setting()
DIMENSIONS = len(RECOMMENDED.point)


def setting_at(point: Sequence[float], *, mixture: bool) -> Setting:
    """The setting with these coordinates (7,), clipped to the range."""
    # exp(log 4) is not 4: without the clip a factor could leave the search space by an ulp.
    rate, beta, gamma, alpha = (min(max(math.exp(x), 1.0 / REACH), REACH) for x in point[:4])
    weights = [min(max(0.5 + x / _WEIGHT_SCALE, _WEIGHT_LOW), _WEIGHT_HIGH) for x in point[4:]]
    return Setting(
        learning_rate=rate,
        beta=beta,
        gamma=gamma,
        alpha=alpha,
        mixture=(weights[0], weights[1], weights[2]) if mixture else None,
    )


def candidate_at(candidate: CandidateSpec, setting: Setting) -> CandidateSpec:
    """What an arm's recommended candidate becomes at a setting, clipped to the search space.

    Factors of terms that the candidate lacks change nothing.
    """
    if setting == RECOMMENDED:
        return candidate
    objective = candidate.objective
    kernel, divergence = objective.kernel_term, objective.divergence_term
    if kernel is not None:
        kernel = kernel.model_copy(update={"gamma": _scaled("gamma", kernel.gamma, setting.gamma)})
        if setting.mixture is not None and isinstance(kernel.kernel, MixtureKernelSpec):
            tau_local, rbf, spectral = setting.mixture
            weights = MixtureWeights(tau_local=tau_local, rbf=rbf, spectral=spectral)
            mixed = kernel.kernel.model_copy(update={"weights": weights})
            kernel = kernel.model_copy(update={"kernel": mixed})
    if isinstance(divergence, PenaltyTerm):
        alpha = _scaled("alpha", divergence.alpha, setting.alpha)
        divergence = divergence.model_copy(update={"alpha": alpha})
    changed = objective.model_copy(
        update={
            "beta": _scaled("beta", objective.beta, setting.beta),
            "kernel_term": kernel,
            "divergence_term": divergence,
        }
    )
    rate = min(candidate.learning_rate * setting.learning_rate, 1.0)
    return CandidateSpec.model_validate({"objective": changed, "learning_rate": rate})


def _scaled(name: str, value: float, factor: float) -> float:
    if factor == 1.0:
        return value
    low, high = _RANGES[name]
    return min(max(value * factor, low), high)


def active_dimensions(candidate: CandidateSpec) -> tuple[int, ...]:
    """The coordinates of a setting that this candidate has: plain DPO has two, HMK seven."""
    objective = candidate.objective
    found = [0, 1]
    if objective.kernel_term is not None:
        found.append(2)
    if isinstance(objective.divergence_term, PenaltyTerm):
        found.append(3)
    if objective.kernel_term is not None and isinstance(
        objective.kernel_term.kernel, MixtureKernelSpec
    ):
        found += [4, 5, 6]
    return tuple(found)


def uniform_share(rung: int) -> float:
    """1 / (1 + 3^r): the higher the rung, the less is drawn from anywhere (2306.12370)."""
    return 1.0 / (1.0 + float(ETA) ** rung)


def incumbent_share(best: Sequence[Setting]) -> float:
    """How much of what is left goes to the incumbent rather than to the prior, in [0, 1).

    S_inc / (S_inc + S_prior), S = sum_i w_i p(x_i) over the best settings, best first, with
    weights falling linearly: where good settings lie away from what is recommended, the incumbent
    takes over (PriorBand, 2306.12370, section 5.2). Without any: 0.
    """
    if not best:
        return 0.0
    weights = np.arange(len(best), 0, -1, dtype=np.float64)
    points = np.array([setting.point for setting in best])
    prior = float(weights @ np.exp(_log_density(points, np.zeros(DIMENSIONS), PRIOR_SD)))
    incumbent = float(weights @ np.exp(_log_density(points, points[0], PRIOR_SD)))
    return incumbent / (incumbent + prior)


def _log_density(points: Floats, centre: Floats, sd: float) -> Floats:
    found: Floats = -0.5 * np.sum((points - centre) ** 2, axis=1) / sd**2
    return found


def draw(
    *,
    seed: str,
    dimensions: Sequence[int],
    rung: int,
    best: Sequence[Setting],
    tried: Sequence[Setting],
    pool: Sequence[Setting] = (),
) -> tuple[Setting, Density] | None:
    """Draw the next setting of an arm; the same arguments give the same setting on any machine.

    `dimensions` are the coordinates that the arm has; `best` its best settings, best first;
    `tried` all that it has had. With a `pool` one of its untried settings is drawn by the same
    densities, and None says that there is none left.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    uniform = uniform_share(rung)
    incumbent = (1.0 - uniform) * incumbent_share(best)
    lot = rng.random()
    if lot < uniform:
        density = Density.UNIFORM
    elif lot < uniform + incumbent:
        density = Density.INCUMBENT
    else:
        density = Density.PRIOR
    centre = np.array(best[0].point) if density is Density.INCUMBENT else np.zeros(DIMENSIONS)
    sd = INCUMBENT_SD if density is Density.INCUMBENT else PRIOR_SD
    if pool:
        return _from_pool(rng, density, centre, sd, [s for s in pool if s not in tried])
    point = np.zeros(DIMENSIONS)
    for axis in dimensions:
        if density is Density.UNIFORM:
            point[axis] = rng.uniform(-_LOG_REACH, _LOG_REACH)
        else:
            point[axis] = _truncated(rng, float(centre[axis]), sd)
    return setting_at(point.tolist(), mixture=max(dimensions) > 3), density


def _truncated(rng: np.random.Generator, centre: float, sd: float) -> float:
    """A normal within the range, by rejection; the centre lies in it, so half of it does."""
    while True:
        x = float(rng.normal(centre, sd))
        if abs(x) <= _LOG_REACH:
            return x


def _from_pool(
    rng: np.random.Generator,
    density: Density,
    centre: Floats,
    sd: float,
    left: Sequence[Setting],
) -> tuple[Setting, Density] | None:
    if not left:
        return None
    logs = np.zeros(len(left))
    if density is not Density.UNIFORM:
        logs = _log_density(np.array([setting.point for setting in left]), centre, sd)
    weights = np.exp(logs - logs.max())
    cumulated = np.cumsum(weights) / weights.sum()
    return left[min(int(np.searchsorted(cumulated, rng.random())), len(left) - 1)], density
