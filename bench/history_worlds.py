"""Made-up services: finished searches, and new data that they say something about, or nothing.

Gains are percent of log-loss over plain DPO: today's score of a pair plus a merit of its kernel and
one of its divergence that no table knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np

from core.profile import DatasetProfile, Estimate
from core.spec import DivergenceName, KernelName
from selection.history import Gain, PastSearch, refine
from selection.parts import (
    NO_HISTORY,
    Refinement,
    by_kernel,
    divergence_parts,
    kernel_parts,
    refined,
)
from selection.prior import NOTHING_KNOWN

Pair = tuple[KernelName, DivergenceName]
Merits = Mapping[KernelName | DivergenceName, float]
PAIRS: tuple[Pair, ...] = tuple(product(KernelName, DivergenceName))
PRIOR = NOTHING_KNOWN
"""Merits are drawn with its deviations, whatever table is shipped."""
TRIALS = 12
GAIN_SD = 1.0
"""Percent: noise of a gain that a finished search has seen."""
MODEL = "a model"
_HALF = 0.02


class Past(StrEnum):
    """What finished searches have to do with the new data."""

    SAME = "have the merits of the new data"
    NOISE = "are noise: there are no merits"
    OWN = "have merits of their own each"
    REVERSE = "agree, and the new data are the reverse"


def merits(rng: np.random.Generator, *, scale: float = 1.0) -> Merits:
    """Merits of kernels and divergences, in percent."""
    return {
        **{k: scale * rng.normal(0, PRIOR.kernel_sd) for k in KernelName},
        **{d: scale * rng.normal(0, PRIOR.divergence_sd) for d in DivergenceName},
    }


def data(rng: np.random.Generator, template: DatasetProfile) -> DatasetProfile:
    """Metrics of some data: those of the template but for what searches are compared by."""
    kpa = rng.uniform(0.5, 0.8)
    reference = template.reference.model_copy(
        update={
            "support_overlap": _around(rng.uniform(0.4, 0.95)),
            "smoothness": _around(rng.uniform(0.2, 0.7)),
            "drift_magnitude": _around(rng.uniform(0.0, 1.0)),
            "kurtosis": _around(rng.uniform(0.0, 3.0)),
        }
    )
    kernels = tuple(k.model_copy(update={"kpa": _around(kpa)}) for k in template.kernels)
    return template.model_copy(update={"reference": reference, "kernels": kernels})


def _around(value: float) -> Estimate:
    return Estimate(value=value, low=value - _HALF, high=value + _HALF)


def scores(of: DatasetProfile, history: Refinement = NO_HISTORY) -> dict[Pair, float]:
    """What the recommender says of every pair, with finished searches or without."""
    kernels = refined(kernel_parts(by_kernel(of), prior=PRIOR), history)
    divergences = refined(divergence_parts(of, prior=PRIOR), history)
    return {(k, d): kernels[k].mean + divergences[d].mean for k, d in PAIRS}


def gains(of: DatasetProfile, has: Merits) -> dict[Pair, float]:
    """What pairs really win on these data."""
    return {(k, d): score + has[k] + has[d] for (k, d), score in scores(of).items()}


def search(
    rng: np.random.Generator, has: Merits, *, template: DatasetProfile, trials: int = TRIALS
) -> PastSearch:
    """A finished search on data of its own, of some pairs by lot."""
    of = data(rng, template)
    true = gains(of, has)
    tried = [PAIRS[i] for i in rng.choice(len(PAIRS), trials, replace=False)]
    return PastSearch(
        of, MODEL, tuple(Gain(k, d, true[k, d] + rng.normal(0, GAIN_SD)) for k, d in tried)
    )


@dataclass(frozen=True)
class Service:
    """New data with the true gains of pairs, and what finished searches make of it."""

    profile: DatasetProfile
    gains: Mapping[Pair, float]
    history: Refinement

    @property
    def cold(self) -> dict[Pair, float]:
        """Scores without finished searches."""
        return scores(self.profile)

    @property
    def warm(self) -> dict[Pair, float]:
        """Scores with them."""
        return scores(self.profile, self.history)

    def regret(self, said: Mapping[Pair, float]) -> float:
        """Percent of log-loss that the pair of the best score loses against the best pair."""
        return max(self.gains.values()) - self.gains[max(PAIRS, key=lambda pair: said[pair])]


def service(past: Past, searches: int, *, template: DatasetProfile, seed: int) -> Service:
    """A service drawn by lot; the same arguments give the same one."""
    rng = np.random.default_rng([seed, list(Past).index(past), searches])
    scale = 0.0 if past is Past.NOISE else 1.0
    shared = merits(rng, scale=scale)
    before = [
        search(rng, merits(rng) if past is Past.OWN else shared, template=template)
        for _ in range(searches)
    ]
    sign = -1.0 if past is Past.REVERSE else 1.0
    profile = data(rng, template)
    return Service(
        profile=profile,
        gains=gains(profile, {name: sign * value for name, value in shared.items()}),
        history=refine(profile, model=MODEL, past=before, prior=PRIOR),
    )
