"""What public datasets say of kernels and divergences before the user's data are seen; torch-free.

The numbers are printed by `python -m bench.selection --prior` from the kept table of trained pairs
(`make bench-selection`); docs/selection.md says how they are fitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from core.spec import DivergenceName, KernelName


@dataclass(frozen=True)
class PriorTable:
    """Effects in percent of plain DPO's calibrated log-loss; more is better.

    `level` is what a pair wins on average, `level_sd` how that differs between datasets: it moves
    all pairs alike. `divergences` and `kernels` are effects beside it, `divergence_sd` and
    `kernel_sd` what a new dataset's own effects differ from them. `tilt` is the effect of a metric
    of the reference at the ends of need and trait, `signal` that of a kernel's own signal, both
    nonnegative: 0 where trained runs say the contrary of what the metric was thought to.
    """

    datasets: int
    level: float
    level_sd: float
    divergences: Mapping[DivergenceName, float]
    divergence_sd: float
    kernels: Mapping[KernelName, float]
    kernel_sd: float
    tilt: float
    signal: float


NOTHING_KNOWN = PriorTable(
    datasets=0,
    level=0.0,
    level_sd=5.0,
    divergences=dict.fromkeys(DivergenceName, 0.0),
    divergence_sd=1.0,
    kernels=dict.fromkeys(KernelName, 0.0),
    kernel_sd=0.3,
    tilt=0.4,
    signal=1.0,
)
"""No runs at all: the metrics alone, with the weights that their arguments suggest."""


PRIOR = PriorTable(
    datasets=4,
    level=4.09,
    level_sd=7.59,
    divergences={
        DivergenceName.KL: 0.01,
        DivergenceName.JENSEN_SHANNON: 0.03,
        DivergenceName.HELLINGER: 0.08,
        DivergenceName.RENYI: -0.1,
        DivergenceName.BHATTACHARYYA: 0.16,
        DivergenceName.WASSERSTEIN: -0.4,
        DivergenceName.F_DIVERGENCE: 0.22,
    },
    divergence_sd=0.33,
    kernels={
        KernelName.RBF: 0.0,
        KernelName.POLYNOMIAL: 0.0,
        KernelName.MAHALANOBIS: 0.0,
        KernelName.SPECTRAL: 0.0,
        KernelName.HMK: 0.0,
    },
    kernel_sd=0.14,
    tilt=0.48,
    signal=0.91,
)
"""What the runs of docs/selection.md give."""
