"""What selection measured and what it recommends, as plain values that go to JSON and back."""

from typing import Literal

from pydantic import Field

from core.data_report import TokenReport
from core.spec import MixtureWeights, ObjectiveSpec, SpecModel


class Estimate(SpecModel):
    """A value with its bootstrap interval (2.5 % and 97.5 % quantiles)."""

    value: float
    low: float
    high: float


class KernelMetrics(SpecModel):
    """Metrics of one kernel's geometry (docs/selection.md)."""

    kernel: str
    pnd: Estimate
    pnav: Estimate
    tat: Estimate
    nag: Estimate
    kpa: Estimate


class MixtureMetrics(KernelMetrics):
    """The same of a mixture with other weights than those it starts with."""

    weights: MixtureWeights


class ReferenceMetrics(SpecModel):
    """Metrics of the reference model on the data (docs/selection.md)."""

    support_overlap: Estimate
    drift_magnitude: Estimate
    kurtosis: Estimate
    smoothness: Estimate
    reference_accuracy: Estimate
    length_bias: Estimate = Field(description="Cohen's d of chosen against rejected token counts")


class SuspiciousPair(SpecModel):
    """A pair whose label the geometry contradicts."""

    id: str
    line: int = Field(description="its row in the upload")
    score: float = Field(description="held-out score, below 0: the rejected answer looks better")
    margin: float | None = Field(description="of the source, where it gives one")


class LabelNoise(SpecModel):
    """What can be said of wrong labels (docs/selection.md)."""

    verdict: Literal["estimate", "bound", "cannot_tell"] = Field(
        description="estimate: `flip_rate` is pinned down; bound: only `at_most` is; cannot_tell: "
        "the features predict no preference"
    )
    accuracy: Estimate = Field(description="of held-out scores against the labels")
    at_most: float | None = Field(
        ge=0.0,
        le=1.0,
        description="largest share of flipped labels that this accuracy leaves room for, with its "
        "interval; null: cannot tell",
    )
    flip_rate: Estimate | None = Field(
        description="share of labels turned round at random that explains the errors that stay "
        "where the scores are surest; null: not pinned down"
    )
    contradictions: int = Field(
        description="pairs of the dataset that an earlier one contradicts outright, kept ties aside"
    )
    contradictions_of: int
    suspicious: tuple[SuspiciousPair, ...] = Field(
        description="those of the measured pairs that the scores contradict most, at most 20; "
        "empty: cannot tell"
    )
    sentence: str


class DatasetProfile(SpecModel):
    """All metrics of one dataset under one reference model."""

    pairs: int
    prompts: int
    sampled_pairs: int = Field(description="pairs that were measured")
    sampled_prompts: int
    max_pairs: int = Field(
        description="above it whole prompts are drawn at random from `seed`, in a fixed order, "
        "until the next one would pass it; below it all pairs are measured"
    )
    sampled_tokens: int = Field(description="response tokens behind the kurtosis, an even sample")
    resamples: int = Field(description="bootstrap resamples of prompts behind each interval")
    seed: int
    kernels: tuple[KernelMetrics, ...]
    mixtures: tuple[MixtureMetrics, ...] = Field(
        description="mixtures of other weights than the even ones of `hmk` in `kernels`"
    )
    reference: ReferenceMetrics
    noise: LabelNoise | None = Field(default=None, description="null: measured before this was")


class Lead(SpecModel):
    """How far one is ahead of another; what both share cancels in the interval."""

    margin: Estimate
    confidence: float = Field(
        ge=0.0,
        le=1.0,
        description="how sure the prior-based scores are that it is ahead at all; not a statistic "
        "of training runs",
    )
    separated: bool = Field(description="whether the interval of the margin leaves out 0")


class Choice(SpecModel):
    """The kernel, or the divergence, that comes first, and whether the data say so."""

    name: str
    runner_up: str
    lead: Lead
    tied: tuple[str, ...] = Field(description="those that it is not separated from")
    sentence: str


class RankedPair(SpecModel):
    """One kernel and divergence with its score and why."""

    rank: int
    kernel: str
    divergence: str
    mode: Literal["penalty", "link"]
    score: Estimate = Field(
        description="a prior guess of the log-loss won over plain DPO, in percent, moved by the "
        "metrics; an order in which to try pairs, not a measured effect (docs/selection.md)"
    )
    behind: Lead | None = Field(description="the lead of rank 1 over this pair; null for rank 1")
    reason: str
    evidence: dict[str, float]
    objective: ObjectiveSpec


class HistoryUse(SpecModel):
    """What finished searches had to do with a ranking."""

    searches: int = Field(description="finished searches that could be compared")
    weight: float = Field(
        ge=0.0, le=1.0, description="how much of what they say has moved the scores; 0: nothing"
    )
    sentence: str


class Recommendation(SpecModel):
    """A ranking with an honest statement of how far the data separate it."""

    kernel: str
    divergence: str
    runner_up: RankedPair
    margin: float
    confidence: float = Field(
        ge=0.0,
        le=1.0,
        description="how sure the prior-based scores are that rank 1 is above rank 2; not a "
        "statistic of training runs",
    )
    separated: bool
    kernels_separated: bool = Field(
        description="the first kernel's KPA interval lies above chance and above that of every "
        "other kernel, its mixture aside"
    )
    kernel_choice: Choice
    divergence_choice: Choice
    tied_pairs: int = Field(description="pairs that rank 1 is not separated from")
    history: HistoryUse
    provisional: bool = Field(
        default=False, description="from a small part of the sample; the answer is still to come"
    )
    summary: str
    ranking: tuple[RankedPair, ...]
    profile: DatasetProfile
    data: TokenReport | None = Field(
        default=None, description="the training split as the model's tokenizer sees it"
    )
