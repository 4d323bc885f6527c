"""A kernel's and a divergence's part of the score, from prior table and metrics; torch-free."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import TypeVar

from core.errors import InvalidInput
from core.profile import DatasetProfile, Estimate, HistoryUse, KernelMetrics
from core.spec import DivergenceName, KernelName
from selection.prior import PriorTable

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Traits:
    """What a divergence penalty is good at, in [0, 1]: which metric is thought to call for it."""

    drift_control: float
    saturation: float
    geometry: float


DIVERGENCES: dict[DivergenceName, Traits] = {
    DivergenceName.KL: Traits(0.7, 0.0, 0.0),
    DivergenceName.JENSEN_SHANNON: Traits(0.7, 1.0, 0.0),
    DivergenceName.HELLINGER: Traits(0.7, 1.0, 0.0),
    DivergenceName.RENYI: Traits(0.8, 0.0, 0.0),
    DivergenceName.BHATTACHARYYA: Traits(0.4, 0.5, 0.0),
    DivergenceName.WASSERSTEIN: Traits(0.7, 0.5, 1.0),
    DivergenceName.F_DIVERGENCE: Traits(0.6, 0.0, 0.0),
}

# A kernel's signal, in percent of log-loss where every unit of it is borne out.
KPA_WEIGHT = 2.0
TAT_WEIGHT = 1.0
TAT_MARGIN = 0.1
# HMK evaluates four kernels: it has to win by more than its price.
KERNEL_COST: dict[KernelName, float] = {
    KernelName.RBF: 0.0,
    KernelName.POLYNOMIAL: 0.0,
    KernelName.MAHALANOBIS: 0.0,
    KernelName.SPECTRAL: 0.02,
    KernelName.HMK: 0.1,
}
# Percent of log-loss; what moves a score by less is no reason.
_WORTH_SAYING = 0.1
# However many searches there were: what this dataset does otherwise is not known untried.
_LEAST_SD = 0.1
# alpha / beta of the runs that the prior comes from (alpha 0.6, beta 0.1).
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
class Signal:
    """A kernel's shrunk signal: deviation from the mean kernel, reliability, variance left."""

    deviation: float
    reliability: float
    variance: float


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


def shrunk_signals(metrics: Mapping[KernelName, KernelMetrics]) -> dict[KernelName, Signal]:
    """Each kernel's signal as a deviation from the mean of all, as far as noise allows.

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
    found = {}
    for name in metrics:
        weight = between / (between + noise[name]) if between > 0.0 else 0.0
        found[name] = Signal(weight * (signal[name] - centre), weight, weight * noise[name])
    return found


def kernel_parts(
    metrics: Mapping[KernelName, KernelMetrics], *, prior: PriorTable
) -> dict[KernelName, Part]:
    """What runs on public datasets say of each kernel, and its signal on these data."""
    parts = {}
    for name, signal in shrunk_signals(metrics).items():
        entry = metrics[name]
        parts[name] = Part(
            mean=prior.kernels[name] + prior.signal * signal.deviation - KERNEL_COST[name],
            sd=math.hypot(prior.kernel_sd, prior.signal * math.sqrt(signal.variance)),
            reason=_kernel_reason(name, entry, tie=signal.reliability == 0.0),
            evidence={
                "pnd": entry.pnd.value,
                "pnav": entry.pnav.value,
                "tat": entry.tat.value,
                "tat_by_chance": _tat_by_chance(entry),
                "nag": entry.nag.value,
                "kpa": entry.kpa.value,
                "kpa_low": entry.kpa.low,
                "kpa_high": entry.kpa.high,
                "kernel_reliability": signal.reliability,
                "kernel_prior_effect": prior.kernels[name],
                "kernel_signal_weight": prior.signal,
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


def _needs(profile: DatasetProfile) -> tuple[tuple[float, float], ...]:
    """The needs that a penalty may answer, in the order of `_TILT_WORDS`, with their deviations."""
    reference = profile.reference
    return (
        _need("support_overlap", reference.support_overlap),
        _need("kurtosis", reference.kurtosis),
        _need("drift_magnitude", reference.drift_magnitude),
        _need("smoothness", reference.smoothness),
    )


def _answers(traits: Traits) -> tuple[float, ...]:
    half = traits.drift_control / 2
    return (half, half, traits.saturation, traits.geometry)


def tilts(profile: DatasetProfile) -> dict[DivergenceName, float]:
    """How far the data call for each divergence, sum of trait times need."""
    needs = _needs(profile)
    return {
        name: sum(answer * need for answer, (need, _) in zip(_answers(traits), needs, strict=True))
        for name, traits in DIVERGENCES.items()
    }


def divergence_parts(profile: DatasetProfile, *, prior: PriorTable) -> dict[DivergenceName, Part]:
    """What runs on public datasets say of each divergence, and what these data call for."""
    reference, needs, called = profile.reference, _needs(profile), tilts(profile)
    parts = {}
    for name, traits in DIVERGENCES.items():
        answers = _answers(traits)
        spread = (prior.tilt * answer * sd for answer, (_, sd) in zip(answers, needs, strict=True))
        effects = [
            prior.tilt * answer * need for answer, (need, _) in zip(answers, needs, strict=True)
        ]
        parts[name] = Part(
            mean=prior.divergences[name] + prior.tilt * called[name],
            sd=math.hypot(prior.divergence_sd, *spread),
            reason=_divergence_reason(name, prior, effects),
            evidence={
                "divergence_prior_effect": prior.divergences[name],
                "divergence_prior_sd": prior.divergence_sd,
                "divergence_tilt_weight": prior.tilt,
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


def _divergence_reason(name: DivergenceName, prior: PriorTable, effects: list[float]) -> str:
    says = f"a {name.value} penalty has no runs behind it"
    if prior.datasets:
        effect = prior.divergences[name]
        says = (
            f"over {prior.datasets} public datasets a {name.value} penalty won {effect:+.2f} % of "
            "log-loss beside the mean penalty"
        )
    strongest = max(range(len(effects)), key=lambda index: effects[index])
    if effects[strongest] < _WORTH_SAYING:
        return says
    return f"{says}; {_TILT_WORDS[strongest]}"
