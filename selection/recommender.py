"""From a dataset's metrics to a ranking of kernel–divergence pairs; torch-free.

A score is a prior guess of the relative reduction of calibrated log-loss against plain DPO, in
percent: an order in which to try pairs (docs/selection.md).
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import TypeVar

from core.profile import (
    Choice,
    DatasetProfile,
    Estimate,
    HistoryUse,
    KernelMetrics,
    Lead,
    RankedPair,
    Recommendation,
)
from core.spec import (
    BASE_KERNELS,
    DivergenceName,
    KernelName,
    KernelTerm,
    ObjectiveSpec,
    PenaltyTerm,
)
from selection.parts import (
    ALPHA_PER_BETA,
    ALPHA_RANGE,
    NO_HISTORY,
    Z95,
    Part,
    Refinement,
    by_kernel,
    divergence_parts,
    gamma_of,
    kernel_parts,
    predicts,
    refined,
)
from selection.prior import PRIOR, PriorTable

Pair = tuple[KernelName, DivergenceName]
Name = TypeVar("Name", KernelName, DivergenceName)


def recommend(
    profile: DatasetProfile,
    *,
    beta: float = 0.1,
    history: Refinement = NO_HISTORY,
    prior: PriorTable = PRIOR,
) -> Recommendation:
    """Rank the 28 kernel–divergence pairs and the 7 of the mixture.

    score(k, d) = level + kernel part + divergence part (docs/selection.md); the interval joins the
    bootstrap of the metrics with what the prior leaves open. Raises InvalidInput when the profile
    lacks a kernel.
    """
    metrics = by_kernel(profile)
    kernels = refined(kernel_parts(metrics, prior=prior), history)
    divergences = refined(divergence_parts(profile, prior=prior), history)
    pairs = [(kernel, divergence) for kernel in KernelName for divergence in DivergenceName]
    # sorted() is stable: what ties stays in the order of the enums, simplest first.
    pairs.sort(key=lambda pair: kernels[pair[0]].mean + divergences[pair[1]].mean, reverse=True)
    best = pairs[0]
    ranking = tuple(
        _ranked(
            rank,
            pair,
            parts=(kernels[pair[0]], divergences[pair[1]]),
            behind=None
            if rank == 1
            else _lead(_differing(best, pair, kernels=kernels, divergences=divergences)),
            gamma=gamma_of(metrics[pair[0]]),
            beta=beta,
            prior=prior,
        )
        for rank, pair in enumerate(pairs, start=1)
    )
    lead = ranking[1].behind
    assert lead is not None, "only the first pair is behind none"
    kernels_separated = _kernels_separated(best[0], metrics)
    tied_pairs = sum(pair.behind is not None and not pair.behind.separated for pair in ranking)
    return Recommendation(
        kernel=ranking[0].kernel,
        divergence=ranking[0].divergence,
        runner_up=ranking[1],
        margin=lead.margin.value,
        confidence=lead.confidence,
        separated=lead.separated,
        kernels_separated=kernels_separated,
        kernel_choice=_choice("kernel", best[0], kernels),
        divergence_choice=_choice("divergence", best[1], divergences),
        tied_pairs=tied_pairs,
        history=history.use,
        summary=_summary(
            ranking,
            metrics,
            kernels_separated=kernels_separated,
            tied_pairs=tied_pairs,
            history=history.use,
            prior=prior,
        ),
        ranking=ranking,
        profile=profile,
    )


def _kernels_separated(best: KernelName, metrics: dict[KernelName, KernelMetrics]) -> bool:
    """Whether the first kernel's KPA interval lies above chance and above every other's.

    The mixture contains the other four and does not count against them.
    """
    rivals = [name for name in BASE_KERNELS if name is not best]
    low = metrics[best].kpa.low
    return low > 0.5 and all(low > metrics[name].kpa.high for name in rivals)


# ------------------------------------------------------------------ ranking


def _ranked(
    rank: int,
    pair: Pair,
    *,
    parts: tuple[Part, Part],
    behind: Lead | None,
    gamma: float,
    beta: float,
    prior: PriorTable,
) -> RankedPair:
    kernel, divergence = pair
    alpha = min(max(ALPHA_PER_BETA * beta, ALPHA_RANGE[0]), ALPHA_RANGE[1])
    return RankedPair(
        rank=rank,
        kernel=kernel.value,
        divergence=divergence.value,
        mode="penalty",
        score=_interval(
            prior.level + sum(part.mean for part in parts),
            math.hypot(prior.level_sd, *(part.sd for part in parts)),
        ),
        behind=behind,
        reason=f"{parts[0].reason}; {parts[1].reason}.",
        evidence=parts[0].evidence | parts[1].evidence,
        objective=ObjectiveSpec(
            beta=beta,
            kernel_term=KernelTerm.model_validate({"kernel": kernel.value, "gamma": gamma}),
            divergence_term=PenaltyTerm.model_validate(
                {"divergence": divergence.value, "alpha": alpha}
            ),
        ),
    )


def _interval(mean: float, sd: float) -> Estimate:
    return Estimate(value=mean, low=mean - Z95 * sd, high=mean + Z95 * sd)


def _differing(
    first: Pair,
    second: Pair,
    *,
    kernels: Mapping[KernelName, Part],
    divergences: Mapping[DivergenceName, Part],
) -> list[tuple[Part, Part]]:
    """Parts of the first pair beside those of the second; what both share is left out."""
    parts = []
    if first[0] is not second[0]:
        parts.append((kernels[first[0]], kernels[second[0]]))
    if first[1] is not second[1]:
        parts.append((divergences[first[1]], divergences[second[1]]))
    return parts


def _lead(parts: list[tuple[Part, Part]]) -> Lead:
    margin = sum(ahead.mean - other.mean for ahead, other in parts)
    sd = math.hypot(*(part.sd for both in parts for part in both))
    return Lead(
        margin=_interval(margin, sd),
        confidence=NormalDist().cdf(margin / sd),
        separated=margin > Z95 * sd,
    )


def _choice(what: str, best: Name, parts: Mapping[Name, Part]) -> Choice:
    """Say which kernel or divergence comes first and from which others the data separate it."""
    others = sorted(
        (name for name in parts if name is not best),
        key=lambda name: parts[name].mean,
        reverse=True,
    )
    leads = {name: _lead([(parts[best], parts[name])]) for name in others}
    tied = tuple(name.value for name in others if not leads[name].separated)
    first = leads[others[0]]
    says = (
        f"{best.value} is the {what} to take: it leads {others[0].value}, the next, by "
        f"{first.margin.value:.2f} [{first.margin.low:.2f}, {first.margin.high:.2f}]."
        if not tied
        else f"{best.value} is the first {what}, but the data do not separate it from "
        f"{_listed(tied)} (lead over {others[0].value} {first.margin.value:.2f} "
        f"[{first.margin.low:.2f}, {first.margin.high:.2f}])."
    )
    return Choice(name=best.value, runner_up=others[0].value, lead=first, tied=tied, sentence=says)


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _summary(
    ranking: tuple[RankedPair, ...],
    metrics: dict[KernelName, KernelMetrics],
    *,
    kernels_separated: bool,
    tied_pairs: int,
    history: HistoryUse,
    prior: PriorTable,
) -> str:
    first, second = ranking[0], ranking[1]
    name, rival = (f"{pair.kernel} × {pair.divergence}" for pair in (first, second))
    ties = f"{tied_pairs} of the {len(ranking) - 1} others tie with it"
    if second.behind is None or not second.behind.separated:
        head = (
            f"{name} comes first, but the data do not separate it from {rival}, the next; {ties}."
        )
    else:
        who = "The data" if history.weight == 0.0 else "The data and finished searches"
        rest = f"; {ties}" if tied_pairs else ", and above all others"
        head = f"{who} put {name} above {rival}, the next{rest}."
    best = metrics[KernelName(first.kernel)].kpa
    span = f"{best.value:.2f} [{best.low:.2f}, {best.high:.2f}]"
    if not any(predicts(entry) for entry in metrics.values()):
        tail = (
            "No kernel predicts preference better than chance on these embeddings: the labels may "
            "be noise to this model, and a kernel term has nothing to say."
        )
    elif kernels_separated:
        tail = f"Kernels differ: {first.kernel} predicts preference best (KPA {span})."
    else:
        tail = f"Kernels are a tie (KPA of {first.kernel} {span})."
    basis = "No runs are known: the order is argued from the metrics alone."
    if prior.datasets:
        basis = (
            f"The order is mostly what runs on {prior.datasets} public datasets showed, not these "
            "data."
        )
    return f"{head} {tail} {history.sentence if history.weight > 0.0 else basis}"
