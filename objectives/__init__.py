"""The maths of preference alignment with kernels and divergences (docs/maths.md)."""

from objectives.build import build_divergence, build_kernel, build_objective, link
from objectives.geometry import Geometry, fit_geometry
from objectives.hybrid import HybridObjective
from objectives.kernels.base import KernelModule
from objectives.mixture import MixtureKernel
from objectives.numerics import per_pair_mean, segment_sum, token_log_probs
from objectives.streaming import StreamedScores, stream_scores, streamed_divergence
from objectives.tiles import Head, StreamedDivergence
from objectives.types import Divergence, Kernel, ObjectiveOutput, PairEmbeddings, PreferenceBatch

__all__ = [
    "Divergence",
    "Geometry",
    "Head",
    "HybridObjective",
    "Kernel",
    "KernelModule",
    "MixtureKernel",
    "ObjectiveOutput",
    "PairEmbeddings",
    "PreferenceBatch",
    "StreamedDivergence",
    "StreamedScores",
    "build_divergence",
    "build_kernel",
    "build_objective",
    "fit_geometry",
    "link",
    "per_pair_mean",
    "segment_sum",
    "stream_scores",
    "streamed_divergence",
    "token_log_probs",
]
