"""What finished searches say about kernels and divergences, and how far it may be believed.

Torch-free. Gains of trials over plain DPO are compared with the scores that the prior table gives
to the same pairs today; what is left over is explained by one effect of each kernel and one of each
divergence (ridge regression), near datasets counting more. How much of that moves a new ranking is
decided by predicting every past search from the others (docs/selection.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.profile import DatasetProfile, HistoryUse
from core.spec import DivergenceName, KernelName
from selection.parts import (
    Refinement,
    Shift,
    by_kernel,
    divergence_parts,
    kernel_parts,
)
from selection.prior import PRIOR, PriorTable

Floats = NDArray[np.float64]

MIN_SEARCHES = 5
MIN_TRIALS = 3
# Difference of a metric, each scaled to [0, 1], at which another dataset counts half.
NEAR = 0.15
OTHER_MODEL = 0.5
# A gain in percent is known no better than this from one short run.
NOISE_SD = 0.5

_NAMES: tuple[KernelName | DivergenceName, ...] = (*KernelName, *DivergenceName)


def _variances(prior: PriorTable) -> Floats:
    """What a dataset's own effects vary by, (12,)."""
    sds = [
        prior.divergence_sd if isinstance(n, DivergenceName) else prior.kernel_sd for n in _NAMES
    ]
    return np.square(sds)


@dataclass(frozen=True)
class Gain:
    """What a trial of a pair won over plain DPO of the same search, in percent of its log-loss.

    `kernel` is None for a divergence alone.
    """

    kernel: KernelName | None
    divergence: DivergenceName | None
    percent: float


@dataclass(frozen=True)
class PastSearch:
    """A finished search: the metrics of its data, its model, and the gains of its pairs."""

    profile: DatasetProfile
    model: str
    gains: tuple[Gain, ...]


def refine(
    profile: DatasetProfile,
    *,
    model: str,
    past: Sequence[PastSearch],
    prior: PriorTable = PRIOR,
) -> Refinement:
    """Return what finished searches say about a dataset, weighted by how well they predict.

    The weight is 0 below five searches, and where predicting each from the others does not lower
    the squared error by more than one standard error: history that does not carry over is left out.
    """
    searches = [search for search in past if len(search.gains) >= MIN_TRIALS]
    if len(searches) < MIN_SEARCHES:
        return Refinement(
            shifts={},
            use=HistoryUse(
                searches=len(searches),
                weight=0.0,
                sentence=f"{len(searches)} finished searches, fewer than {MIN_SEARCHES}: the "
                "ranking is that of the metrics and the prior table.",
            ),
        )
    variances = _variances(prior)
    rows = [_Rows.of(search, prior) for search in searches]
    weight = _weight(searches, rows, variances)
    if weight == 0.0:
        says = (
            f"{len(searches)} finished searches do not predict each other better than the metrics "
            "and the prior table do: they move nothing."
        )
        return Refinement(
            shifts={}, use=HistoryUse(searches=len(searches), weight=0.0, sentence=says)
        )
    near = [_nearness(profile, model, search) for search in searches]
    mean, left = _posterior(rows, near, variances)
    shifts = {
        name: Shift(
            mean=weight * float(mean[i]),
            explained=weight * float(variances[i] - left[i]),
        )
        for i, name in enumerate(_NAMES)
    }
    says = f"{len(searches)} finished searches have moved the scores (weight {weight:.2f})."
    return Refinement(
        shifts=shifts, use=HistoryUse(searches=len(searches), weight=weight, sentence=says)
    )


@dataclass(frozen=True)
class _Rows:
    """One search as equations: `design` (n, 12) of effects, `left` (n,) gain - score, centred.

    Centred within the search: the level of scores is a guess, and how hard the data are is not
    the merit of a pair.
    """

    design: Floats
    left: Floats

    @classmethod
    def of(cls, search: PastSearch, prior: PriorTable) -> "_Rows":
        kernels = kernel_parts(by_kernel(search.profile), prior=prior)
        divergences = divergence_parts(search.profile, prior=prior)
        design = np.zeros((len(search.gains), len(_NAMES)))
        left = np.zeros(len(search.gains))
        for row, gain in enumerate(search.gains):
            score = 0.0
            if gain.kernel is not None:
                score += kernels[gain.kernel].mean
                design[row, _NAMES.index(gain.kernel)] = 1.0
            if gain.divergence is not None:
                score += divergences[gain.divergence].mean
                design[row, _NAMES.index(gain.divergence)] = 1.0
            left[row] = gain.percent - score
        return cls(design - design.mean(0), left - left.mean())


def _posterior(
    rows: Sequence[_Rows], near: Sequence[float], variances: Floats
) -> tuple[Floats, Floats]:
    """Mean and variance (12,) of the effects: ridge with the prior's variances, weighted rows.

    The noise is all that is left over, effects included: it shrinks too much, never too little.
    """
    noise = max(NOISE_SD**2, float(np.mean(np.concatenate([r.left for r in rows]) ** 2)))
    precision = np.diag(1.0 / variances)
    moment = np.zeros(len(_NAMES))
    for row, weight in zip(rows, near, strict=True):
        precision += weight / noise * row.design.T @ row.design
        moment += weight / noise * row.design.T @ row.left
    covariance = np.linalg.inv(precision)
    mean: Floats = covariance @ moment
    variance: Floats = np.diagonal(covariance).copy()
    return mean, variance


def _weight(searches: Sequence[PastSearch], rows: Sequence[_Rows], variances: Floats) -> float:
    """How much of the effects to believe, in [0, 1]: the slope of left-out gains on them.

    0 unless the squared error falls by more than one standard error over the searches.
    """
    predicted = []
    for index, search in enumerate(searches):
        others = [i for i in range(len(searches)) if i != index]
        near = [_nearness(search.profile, search.model, searches[i]) for i in others]
        mean, _ = _posterior([rows[i] for i in others], near, variances)
        predicted.append(rows[index].design @ mean)
    power = sum(float(p @ p) for p in predicted)
    if power == 0.0:
        return 0.0
    along = sum(float(p @ r.left) for p, r in zip(predicted, rows, strict=True))
    slope = min(max(along / power, 0.0), 1.0)
    falls = [
        float(np.mean(r.left**2) - np.mean((r.left - slope * p) ** 2))
        for p, r in zip(predicted, rows, strict=True)
    ]
    error = float(np.std(falls, ddof=1)) / math.sqrt(len(falls))
    return slope if float(np.mean(falls)) > error else 0.0


def _nearness(profile: DatasetProfile, model: str, search: PastSearch) -> float:
    """1 for the same metrics and model, ½ where metrics differ by NEAR on average, in (0, 1]."""
    apart = (_coordinates(profile) - _coordinates(search.profile)) / NEAR
    near = 1.0 / (1.0 + float(np.mean(apart**2)))
    return near if search.model == model else OTHER_MODEL * near


def _coordinates(profile: DatasetProfile) -> Floats:
    reference = profile.reference
    tails = max(reference.kurtosis.value, 0.0)
    drift = reference.drift_magnitude.value
    length = abs(reference.length_bias.value)
    return np.array(
        [
            reference.support_overlap.value,
            reference.smoothness.value,
            reference.reference_accuracy.value,
            tails / (tails + 2.0),
            drift / (drift + 2.0),
            length / (length + 2.0),
            max(entry.kpa.value for entry in profile.kernels),
        ]
    )
