"""The prior table, and what metrics make of a kernel's and a divergence's part of the score.

The numbers below are the table of docs/selection.md. Torch-free.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import TypeVar

from core.errors import InvalidInput
from core.profile import DatasetProfile, Estimate, HistoryUse, KernelMetrics
from core.spec import DivergenceName, KernelName

Z95 = 1.959963984540054


@dataclass(frozen=True)
class DivergencePrior:
    """What is believed of a divergence penalty before seeing the data.

    `gain` and `sd` in percent of log-loss; `basis` says what runs showed; the traits, in [0, 1],
    decide which metric moves it.
    """

    gain: float
    sd: float
    basis: str
    drift_control: float
    saturation: float
    geometry: float


_THIRD = "lowered log-loss or kept it, at a third of the drift, in earlier runs"
_NO_RUNS = "has no runs behind it yet"
# Runs before curvature scaling gave these a quarter of KL's strength: their own numbers say little.
_LIKE_KL = "is taken to do as KL, whose curvature it has; runs at a quarter of the strength only"
DIVERGENCES: dict[DivergenceName, DivergencePrior] = {
    DivergenceName.KL: DivergencePrior(1.5, 0.7, _THIRD, 0.7, 0.0, 0.0),
    DivergenceName.JENSEN_SHANNON: DivergencePrior(1.5, 1.0, _LIKE_KL, 0.7, 1.0, 0.0),
    DivergenceName.HELLINGER: DivergencePrior(1.5, 1.0, _LIKE_KL, 0.7, 1.0, 0.0),
    DivergenceName.RENYI: DivergencePrior(1.1, 1.0, _NO_RUNS, 0.4, 0.5, 0.0),
    DivergenceName.BHATTACHARYYA: DivergencePrior(1.1, 1.0, _NO_RUNS, 0.4, 0.5, 0.0),
    DivergenceName.WASSERSTEIN: DivergencePrior(1.8, 0.7, _THIRD, 0.7, 0.5, 1.0),
    DivergenceName.F_DIVERGENCE: DivergencePrior(1.1, 1.0, _NO_RUNS, 0.6, 0.0, 0.0),
}
# Percent of log-loss that a metric may move a divergence by, at the ends of metric and trait.
TILT = 0.4

# Percent of log-loss per unit of a kernel's signal, and what is unknown about a kernel anyway.
KPA_WEIGHT = 2.0
TAT_WEIGHT = 1.0
TAT_MARGIN = 0.1
KERNEL_SD = 0.3
# HMK evaluates four kernels: it has to win by more than its price.
KERNEL_COST: dict[KernelName, float] = {
    KernelName.RBF: 0.0,
    KernelName.POLYNOMIAL: 0.0,
    KernelName.MAHALANOBIS: 0.0,
    KernelName.SPECTRAL: 0.02,
    KernelName.HMK: 0.1,
}
# However many searches there were: what this dataset does otherwise is not known untried.
_LEAST_SD = 0.1
# alpha / beta of the runs that the priors come from (alpha 3, beta 0.5).
ALPHA_PER_BETA = 6.0
ALPHA_RANGE = (0.05, 20.0)
GAMMA_ORDERS, GAMMA_PREDICTS, GAMMA_NOTHING = 0.1, 0.05, 0.02


@dataclass(frozen=True)
class Part:
    """Contribution of a kernel or a divergence: mean, sd, readable reason, numbers behind it."""

    mean: float
    sd: float
    reason: str
    evidence: dict[str, float]


@dataclass(frozen=True)
class Shift:
    """What finished searches do to a part: its mean moves, its variance loses `explained`."""

    mean: float
    explained: float


@dataclass(frozen=True)
class Refinement:
    """Shifts of parts by name, none where finished searches move nothing, and a word on it."""

    shifts: Mapping[KernelName | DivergenceName, Shift]
    use: HistoryUse


NO_HISTORY = Refinement(
    shifts={},
    use=HistoryUse(searches=0, weight=0.0, sentence="No finished searches were asked."),
)
Name = TypeVar("Name", KernelName, DivergenceName)


def refined(parts: Mapping[Name, Part], history: Refinement) -> dict[Name, Part]:
    """Return the parts as finished searches have moved them."""
    found = {}
    for name, part in parts.items():
        shift = history.shifts.get(name)
        found[name] = (
            part
            if shift is None
            else Part(
                mean=part.mean + shift.mean,
                sd=math.sqrt(max(part.sd**2 - shift.explained, _LEAST_SD**2)),
                reason=f"{part.reason} (finished searches: {shift.mean:+.2f})",
                evidence=part.evidence | {f"{_kind(name)}_history_shift": shift.mean},
            )
        )
    return found


def _kind(name: KernelName | DivergenceName) -> str:
    return "kernel" if isinstance(name, KernelName) else "divergence"


def by_kernel(profile: DatasetProfile) -> dict[KernelName, KernelMetrics]:
    """Return the metrics of every kernel by name; InvalidInput when one is missing."""
    metrics = {KernelName(entry.kernel): entry for entry in profile.kernels}
    missing = [name.value for name in KernelName if name not in metrics]
    if missing:
        raise InvalidInput(
            f"the profile has no metrics of kernels {missing}; expected all of "
            f"{[name.value for name in KernelName]}",
            hint="compute the profile again with profile_dataset",
        )
    return metrics


def interval_sd(estimate: Estimate) -> float:
    return (estimate.high - estimate.low) / (2 * Z95)


def kernel_parts(metrics: dict[KernelName, KernelMetrics]) -> dict[KernelName, Part]:
    """Shrink each kernel's signal towards the mean of all as far as noise explains the spread.

    Empirical Bayes: tau^2 = max(0, var(signal) - mean(se^2)); deviation * tau^2/(tau^2 + se^2).
    Intervals of kernels share their pairs, so this shrinks too much rather than too little.
    """
    signal = {name: _signal(entry) for name, entry in metrics.items()}
    noise = {
        name: (KPA_WEIGHT * 2 * interval_sd(m.kpa)) ** 2 + (TAT_WEIGHT * interval_sd(m.tat)) ** 2
        for name, m in metrics.items()
    }
    centre = fmean(signal.values())
    between = max(0.0, variance(signal.values()) - fmean(noise.values()))
    parts = {}
    for name, entry in metrics.items():
        weight = between / (between + noise[name]) if between > 0.0 else 0.0
        parts[name] = Part(
            mean=weight * (signal[name] - centre) - KERNEL_COST[name],
            sd=math.sqrt(KERNEL_SD**2 + weight * noise[name]),
            reason=_kernel_reason(name, entry, tie=weight == 0.0),
            evidence={
                "pnd": entry.pnd.value,
                "pnav": entry.pnav.value,
                "tat": entry.tat.value,
                "tat_by_chance": _tat_by_chance(entry),
                "nag": entry.nag.value,
                "kpa": entry.kpa.value,
                "kpa_low": entry.kpa.low,
                "kpa_high": entry.kpa.high,
                "kernel_reliability": weight,
            },
        )
    return parts


def _signal(metrics: KernelMetrics) -> float:
    return KPA_WEIGHT * 2 * (metrics.kpa.value - 0.5) + TAT_WEIGHT * (
        metrics.tat.value - _tat_by_chance(metrics)
    )


def _tat_by_chance(metrics: KernelMetrics) -> float:
    """Return the TAT that a symmetric delta of this kernel's variance has without any signal.

    P(delta > 0.1 mean d) = 1 - Phi(0.1 / sqrt(PNAV)): a kernel whose distances scatter more
    passes the margin more often, on either side.
    """
    if metrics.pnav.value <= 0.0:
        return 0.0
    return 1.0 - NormalDist().cdf(TAT_MARGIN / math.sqrt(metrics.pnav.value))


def predicts(metrics: KernelMetrics) -> bool:
    return metrics.kpa.low > 0.5


def _orders(metrics: KernelMetrics) -> bool:
    return metrics.nag.low > 0.0


def gamma_of(metrics: KernelMetrics) -> float:
    if not predicts(metrics):
        return GAMMA_NOTHING
    return GAMMA_ORDERS if _orders(metrics) else GAMMA_PREDICTS


def _kernel_reason(name: KernelName, metrics: KernelMetrics, *, tie: bool) -> str:
    kpa = metrics.kpa
    span = f"{kpa.value:.2f} [{kpa.low:.2f}, {kpa.high:.2f}]"
    if not predicts(metrics):
        says = f"{name.value} predicts preference no better than chance (KPA {span})"
    elif _orders(metrics):
        says = f"{name.value} predicts preference (KPA {span}) and puts chosen nearer the prompt"
    else:
        says = f"{name.value} predicts preference (KPA {span}), nearness to the prompt does not"
    return f"{says} (the kernels tie)" if tie else says


# -------------------------------------------------------------- divergences


def _need(name: str, estimate: Estimate) -> tuple[float, float]:
    """Map a metric to a need in [0, 1] with its standard deviation."""

    def scale(x: float) -> float:
        positive = max(x, 0.0)
        return positive if name in ("support_overlap", "smoothness") else positive / (positive + 2)

    low, high = scale(estimate.low), scale(estimate.high)
    return min(scale(estimate.value), 1.0), (high - low) / (2 * Z95)


def divergence_parts(profile: DatasetProfile) -> dict[DivergenceName, Part]:
    reference = profile.reference
    overlap = _need("support_overlap", reference.support_overlap)
    tails = _need("kurtosis", reference.kurtosis)
    drift = _need("drift_magnitude", reference.drift_magnitude)
    smooth = _need("smoothness", reference.smoothness)
    parts = {}
    for name, prior in DIVERGENCES.items():
        tilts = (
            (prior.drift_control / 2, overlap),
            (prior.drift_control / 2, tails),
            (prior.saturation, drift),
            (prior.geometry, smooth),
        )
        mean = prior.gain + TILT * sum(trait * need for trait, (need, _) in tilts)
        var = prior.sd**2 + sum((TILT * trait * sd) ** 2 for trait, (_, sd) in tilts)
        parts[name] = Part(
            mean=mean,
            sd=math.sqrt(var),
            reason=_divergence_reason(name, prior, tilts),
            evidence={
                "prior_gain": prior.gain,
                "prior_sd": prior.sd,
                "support_overlap": reference.support_overlap.value,
                "kurtosis": reference.kurtosis.value,
                "drift_magnitude": reference.drift_magnitude.value,
                "smoothness": reference.smoothness.value,
            },
        )
    return parts


_TILT_WORDS = (
    "chosen and rejected look alike to the reference, which calls for drift control",
    "tokens with heavy tails call for drift control",
    "the policy has far to move and its pull saturates",
    "the reference is uncertain, and it knows which tokens are near each other",
)


def _divergence_reason(
    name: DivergenceName,
    prior: DivergencePrior,
    tilts: tuple[tuple[float, tuple[float, float]], ...],
) -> str:
    effects = [trait * need for trait, (need, _) in tilts]
    strongest = max(range(len(effects)), key=lambda index: effects[index])
    says = f"a {name.value} penalty {prior.basis}"
    if effects[strongest] < 0.1:
        return says
    return f"{says}; {_TILT_WORDS[strongest]}"
