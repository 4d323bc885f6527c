"""Which parameters of a search mattered: PED-ANOVA, and how large it is when nothing does.

Importance is how far the density of a parameter among the best trials is from its density among
all of them (Watanabe, Bansal and Hutter 2023, arXiv:2304.10255; for parameters that only some
trials use, arXiv:2601.20800), as Optuna computes it. It tells where the best trials lie, not that
moving a parameter would move the result.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial

from core.lifecycle import TrialStatus
from core.run_spec import CandidateSpec
from selection.optuna_copy import TrialRecord, frozen_trials

MIN_TRIALS = 20
MIN_USED = 5
# Optuna asks for at least five trials above its quantile.
_TOP_TRIALS = 5
_TOP_SHARE = 0.1
# A result above all but one of 39 shuffled ones has p <= 2/40 (Besag and Clifford 1989).
_SHUFFLES = 39
_PASSED = 2
_AT = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class ParameterImportance:
    """One parameter; without an importance, `reason` says why.

    `noise` is what it has to exceed: with the results shuffled among the trials, the largest of
    all importances, each relative to its own mean, is above it in 5 of 100 cases.
    """

    name: str
    trials: int
    importance: float | None = None
    share: float | None = None
    noise: float | None = None
    above_noise: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Importances:
    """Parameters, most important first; none when there are too few trials."""

    trials: int
    needed: int
    top_share: float | None
    parameters: tuple[ParameterImportance, ...]
    sentence: str


def importances(
    trials: Sequence[tuple[CandidateSpec, float]], *, target: str, seed: int = 0
) -> Importances:
    """Return how much each parameter mattered for a low value of `target`.

    Needs 20 trials with a finite value; a parameter needs 5 that use it and two values.
    Deterministic given the seed, which decides the shuffles.
    """
    measured = [(candidate, value) for candidate, value in trials if math.isfinite(value)]
    if len(measured) < MIN_TRIALS:
        return _none(
            len(measured),
            f"{len(measured)} trials have a {target}; with less than {MIN_TRIALS} an importance "
            "would be noise, so none is given.",
        )
    values = np.array([value for _, value in measured])
    share = max(_TOP_SHARE, _TOP_TRIALS / len(measured))
    if len(np.unique(values)) < 2:
        return _none(len(measured), f"All {len(measured)} trials have the same {target}.")
    study = _study([candidate for candidate, _ in measured])
    usable, unusable = _sorted_out(study.get_trials(deepcopy=False))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
    found = _evaluate(evaluator, study, usable, values)
    noise = _noise(evaluator, study, usable, values, seed=seed)
    total = sum(found.values())
    ranked = sorted(usable, key=lambda name: (-found[name], name))
    parameters = tuple(
        ParameterImportance(
            name=name,
            trials=usable[name],
            importance=found[name],
            share=found[name] / total if total > 0 else 0.0,
            noise=noise[name],
            above_noise=found[name] > noise[name],
        )
        for name in ranked
    )
    return Importances(
        trials=len(measured),
        needed=MIN_TRIALS,
        top_share=share,
        parameters=parameters + unusable,
        sentence=_sentence(parameters, target=target, trials=len(measured), share=share),
    )


def _none(trials: int, sentence: str) -> Importances:
    return Importances(
        trials=trials, needed=MIN_TRIALS, top_share=None, parameters=(), sentence=sentence
    )


def _study(candidates: Sequence[CandidateSpec]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        frozen_trials(
            [
                TrialRecord(
                    number=number,
                    candidate=candidate,
                    status=TrialStatus.COMPLETE,
                    value=0.0,
                    started=_AT,
                )
                for number, candidate in enumerate(candidates)
            ]
        )
    )
    return study


def _sorted_out(
    trials: Sequence[FrozenTrial],
) -> tuple[dict[str, int], tuple[ParameterImportance, ...]]:
    """Return the parameters that can be judged with the trials that use them, and the others."""
    seen: dict[str, list[object]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            seen.setdefault(name, []).append(value)
    usable: dict[str, int] = {}
    unusable: list[ParameterImportance] = []
    for name, found in sorted(seen.items()):
        if len(found) < MIN_USED:
            reason = f"used by {len(found)} trials; {MIN_USED} are needed"
        elif len(set(found)) < 2:
            reason = f"has the same value in all {len(found)} trials that use it"
        else:
            usable[name] = len(found)
            continue
        unusable.append(ParameterImportance(name=name, trials=len(found), reason=reason))
    return usable, tuple(unusable)


def _evaluate(
    evaluator: PedAnovaImportanceEvaluator,
    study: optuna.Study,
    usable: Mapping[str, int],
    values: NDArray[np.float64],
) -> dict[str, float]:
    if not usable:
        return {}
    with warnings.catch_warnings():
        # That a low target is the better one, and that one trial alone has no density: both meant.
        warnings.simplefilter("ignore", UserWarning)
        found = evaluator.evaluate(
            study, list(usable), target=lambda trial: float(values[trial.number])
        )
    return {name: float(value) for name, value in found.items()}


def _noise(
    evaluator: PedAnovaImportanceEvaluator,
    study: optuna.Study,
    usable: Mapping[str, int],
    values: NDArray[np.float64],
    *,
    seed: int,
) -> dict[str, float]:
    """Single-step maximum over all parameters (Westfall and Young 1993) of shuffled values."""
    if not usable:
        return {}
    random = np.random.default_rng(seed)
    names = list(usable)
    shuffled = np.empty((_SHUFFLES, len(names)))
    for row in shuffled:
        found = _evaluate(evaluator, study, usable, random.permutation(values))
        row[:] = [found[name] for name in names]
    mean = shuffled.mean(axis=0)
    largest = (shuffled / np.where(mean > 0, mean, 1.0)).max(axis=1)
    factor = float(np.sort(largest)[-_PASSED])
    return {name: factor * float(level) for name, level in zip(names, mean, strict=True)}


def _sentence(
    parameters: Sequence[ParameterImportance], *, target: str, trials: int, share: float
) -> str:
    best = f"the best {share:.0%} of {trials} trials by {target}"
    clear = [parameter.name for parameter in parameters if parameter.above_noise]
    if not clear:
        return f"No parameter sets {best} apart more than shuffled results would."
    return f"More than shuffled results would, {best} are set apart by: {', '.join(clear)}."
