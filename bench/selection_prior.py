"""Fits the prior table of `selection/prior.py` to trained pairs of several datasets.

`python -m bench.selection --prior` prints what `bench/tables/selection.jsonl` gives.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from core.profile import DatasetProfile
from core.spec import BASE_KERNELS, DivergenceName, KernelName
from selection.parts import by_kernel, shrunk_signals, tilts
from selection.prior import NOTHING_KNOWN, PriorTable

Floats = NDArray[np.float64]
MIN_DATASETS = 2
LEAST_SD = 0.1
"""Percent: few datasets that happen to agree do not make an effect certain."""


@dataclass(frozen=True)
class Evidence:
    """One dataset, means over its seeds.

    `gains` (kernels, divergences), percent of plain DPO's log-loss; `tilts` (divergences,), how far
    the metrics call for each; `signals` (kernels,), shrunk deviations.
    """

    gains: Floats
    tilts: Floats
    signals: Floats

    @classmethod
    def of(cls, gains: Sequence[Floats], profiles: Sequence[DatasetProfile]) -> "Evidence":
        """Means over the seeds of a dataset."""
        called = [tilts(profile) for profile in profiles]
        said = [shrunk_signals(by_kernel(profile)) for profile in profiles]
        return cls(
            gains=np.mean(gains, axis=0),
            tilts=np.mean([[each[name] for name in DivergenceName] for each in called], axis=0),
            signals=np.mean(
                [[each[name].deviation for name in BASE_KERNELS] for each in said], axis=0
            ),
        )


def fit_prior(evidence: Sequence[Evidence]) -> PriorTable:
    """The table that some datasets give; with fewer than two, what is believed without any.

    Gains are centred in each dataset, and averaged over kernels (divergences) or over divergences
    (kernels). Each is an effect, plus the slope on its metric, plus what is the dataset's own.
    Slopes are of least squares within a divergence or kernel, joined with the weight that the
    metric's argument suggests, at least 0; effects are shrunk towards 0 by τ²/(τ² + s²/A), s² the
    variance of what is the datasets' own, A their number; a new dataset deviates by s √(1 + 1/A).
    """
    if len(evidence) < MIN_DATASETS:
        return NOTHING_KNOWN
    levels = np.array([each.gains.mean() for each in evidence])
    gains = [each.gains - each.gains.mean() for each in evidence]
    divergences = _effects(
        np.stack([g.mean(axis=0) for g in gains]),
        np.stack([e.tilts for e in evidence]),
        believed=NOTHING_KNOWN.tilt,
    )
    kernels = _effects(
        np.stack([g.mean(axis=1) for g in gains]),
        np.stack([e.signals for e in evidence]),
        believed=NOTHING_KNOWN.signal,
    )
    spread = float(levels.std(ddof=1)) * math.sqrt(1.0 + 1.0 / len(evidence))
    return PriorTable(
        datasets=len(evidence),
        level=float(levels.mean()),
        level_sd=spread,
        divergences=dict(zip(DivergenceName, divergences.means, strict=True)),
        divergence_sd=divergences.sd,
        # Nobody trained the mixture: it is taken to do as the mean of what it mixes.
        kernels={KernelName.HMK: 0.0, **dict(zip(BASE_KERNELS, kernels.means, strict=True))},
        kernel_sd=kernels.sd,
        tilt=divergences.slope,
        signal=kernels.slope,
    )


@dataclass(frozen=True)
class _Effects:
    means: list[float]
    sd: float
    slope: float


def _effects(gains: Floats, metric: Floats, *, believed: float) -> _Effects:
    """Effects of things over datasets, both arguments (datasets, things), gains centred."""
    number = gains.shape[0]
    x = metric - metric.mean(axis=1, keepdims=True)
    x_mean, y_mean = x.mean(axis=0), gains.mean(axis=0)
    slope = _slope(x - x_mean, gains - y_mean, believed=believed)
    left = (gains - y_mean) - slope * (x - x_mean)
    own = float((left**2).sum()) / ((number - 1) * gains.shape[1])
    means = y_mean - slope * x_mean
    between = max(0.0, float(means.var(ddof=1)) - own / number)
    kept = between / (between + own / number) if between > 0.0 else 0.0
    sd = max(LEAST_SD, math.sqrt(own * (1.0 + 1.0 / number)))
    return _Effects(means=[kept * float(mean) for mean in means], sd=sd, slope=slope)


def _slope(x: Floats, y: Floats, *, believed: float) -> float:
    """Least squares through 0 over datasets (rows), joined with what is believed without them.

    The belief is as wide as it is large; the error of the slope is clustered by dataset. Where the
    metric does not vary the belief stays: nothing was said against it.
    """
    power = float((x**2).sum())
    if power == 0.0:
        return believed
    slope = float((x * y).sum()) / power
    number = x.shape[0]
    clusters = (x * (y - slope * x)).sum(axis=1)
    error = float((clusters**2).sum()) * number / (number - 1) / power**2
    doubt = believed**2
    joined = (slope * doubt + believed * error) / (doubt + error)
    return max(0.0, joined)


def without(evidence: Mapping[str, Evidence], name: str) -> PriorTable:
    """The table of all datasets but one."""
    return fit_prior([each for data, each in evidence.items() if data != name])


def rounded(table: PriorTable, digits: int = 2) -> PriorTable:
    """The table as it is written down."""
    return replace(
        table,
        level=round(table.level, digits),
        level_sd=round(table.level_sd, digits),
        divergences={name: round(x, digits) for name, x in table.divergences.items()},
        divergence_sd=round(table.divergence_sd, digits),
        kernels={name: round(x, digits) for name, x in table.kernels.items()},
        kernel_sd=round(table.kernel_sd, digits),
        tilt=round(table.tilt, digits),
        signal=round(table.signal, digits),
    )
