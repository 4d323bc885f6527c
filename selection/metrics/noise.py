"""How many labels are wrong: what held-out scores leave room for, and what they pin down."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from core.profile import Estimate, LabelNoise, SuspiciousPair
from selection.metrics.bootstrap import estimate
from selection.metrics.kpa import WIDENING, accuracy_of

MOST_SUSPICIOUS = 20
# Wider than that an interval of the flip rate pins nothing down.
PINNED_WIDTH = 0.2
_RATES = 51
_SLOPES = 24


@dataclass(frozen=True)
class Origin:
    """Where a measured pair is from."""

    id: str
    line: int
    margin: float | None


@dataclass(frozen=True)
class LabelFacts:
    """What is known of the labels beside the features: origins of the pairs, contradictions."""

    origins: tuple[Origin, ...]
    contradictions: int
    contradictions_of: int


def label_noise(scores: Tensor, weights: Tensor, *, facts: LabelFacts | None) -> LabelNoise:
    """Estimate the share of wrong labels from held-out scores (N,), positive where they agree.

    `weights` (B, N) are those of the resamples, row 0 of the data. `facts.origins` are of the N
    pairs. With an accuracy not above chance nothing can be told.
    """
    right = estimate(accuracy_of(scores, weights))
    rate: Estimate | None = None
    at_most: float | None = None
    suspicious: tuple[SuspiciousPair, ...] = ()
    if right.low > 0.5:
        at_most = 1.0 - right.low
        rate = estimate(_widened(flip_rates(scores, weights)))
        suspicious = () if facts is None else _suspicious(scores, facts.origins)
    pinned = rate is not None and rate.high - rate.low <= PINNED_WIDTH
    contradictions = 0 if facts is None else facts.contradictions
    of = 0 if facts is None else facts.contradictions_of
    return LabelNoise(
        verdict="cannot_tell" if rate is None else "estimate" if pinned else "bound",
        accuracy=right,
        at_most=at_most,
        flip_rate=rate if pinned else None,
        contradictions=contradictions,
        contradictions_of=of,
        suspicious=suspicious,
        sentence=_sentence(at_most, rate if pinned else None, contradictions, of),
    )


def flip_rates(scores: Tensor, weights: Tensor) -> Tensor:
    """Maximum-likelihood flip rate under each row of weights (B, N), in [0, 0.5], (B,).

    P(label agrees | s) = r + (1 - 2r) sigmoid(c |s|) for the side that the score s takes: labels
    with odds c s, of which a share r is turned round at random (a psychometric function with
    lapses, Wichmann & Hill 2001; r is identified where sigmoid saturates). Over a grid of r and c.
    """
    level = scores.abs().median().clamp_min(1e-12)
    slopes = torch.logspace(-1.5, 2.0, _SLOPES, dtype=torch.float64) / level
    clean = logsigmoid(slopes.unsqueeze(-1) * scores.double()).exp()
    rates = torch.linspace(0.0, 0.5, _RATES, dtype=torch.float64)
    found = torch.full((weights.shape[0],), -torch.inf)
    best = torch.zeros(weights.shape[0], dtype=torch.float64)
    for rate in rates:
        likelihood = (rate + (1.0 - 2.0 * rate) * clean).clamp_min(1e-12).log()
        value = (weights @ likelihood.float().T).amax(-1)
        best = torch.where(value > found, rate, best)
        found = torch.maximum(value, found)
    return best


def _widened(values: Tensor) -> Tensor:
    """The fits share their data, as those behind KPA do."""
    return (values[0] + WIDENING * (values - values[0])).clamp(0.0, 0.5)


def _suspicious(scores: Tensor, origins: tuple[Origin, ...]) -> tuple[SuspiciousPair, ...]:
    order = scores.argsort(stable=True)[:MOST_SUSPICIOUS].tolist()
    return tuple(
        SuspiciousPair(
            id=origins[row].id, line=origins[row].line, score=float(scores[row]),
            margin=origins[row].margin,
        )
        for row in order
        if float(scores[row]) < 0.0
    )  # fmt: skip


def _sentence(at_most: float | None, rate: Estimate | None, contradictions: int, of: int) -> str:
    if at_most is None:
        says = "These features predict no preference, so they cannot tell how many labels are wrong"
    elif rate is None:
        says = (
            f"At most {at_most:.0%} of the labels can be wrong as far as these features tell; how "
            "many are cannot be pinned down"
        )
    else:
        says = (
            f"About {rate.value:.0%} of the labels ({rate.low:.0%} to {rate.high:.0%}) look turned "
            f"round, at most {at_most:.0%} can be as far as these features tell"
        )
    if of:
        says += f"; {contradictions} of {of} pairs contradict another outright"
    return says + "."
