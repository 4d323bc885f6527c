"""Importances find what a result was made from, say when they cannot, and are Optuna's own."""

import math

import numpy as np
import optuna
import pytest
from optuna.importance import PedAnovaImportanceEvaluator

from core.run_spec import CandidateSpec
from core.spec import ObjectiveSpec
from selection.importance import MIN_TRIALS, Importances, importances
from selection.optuna_copy import TrialRecord, frozen_trials
from selection.space import SearchSpace

Trials = list[tuple[CandidateSpec, float]]


def candidates(count: int, *, seed: int = 0) -> list[CandidateSpec]:
    """Draws from the whole search space."""
    space = SearchSpace(1e-3)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    asked = (study.ask(fixed_distributions=space.distributions) for _ in range(count))
    return [space.candidate_of(trial.params) for trial in asked]


def by_beta(count: int, *, seed: int = 0) -> Trials:
    return [
        (candidate, 0.5 + abs(math.log(candidate.objective.beta / 0.2)))
        for candidate in candidates(count, seed=seed)
    ]


def named(found: Importances) -> dict[str, float | None]:
    return {parameter.name: parameter.importance for parameter in found.parameters}


def test_the_parameter_that_makes_the_result_comes_first() -> None:
    found = importances(by_beta(80), target="log_loss")
    assert found == importances(by_beta(80), target="log_loss")
    first = found.parameters[0]
    assert first.name == "beta"
    assert first.above_noise is True
    assert first.trials == found.trials == 80
    assert found.top_share == 0.1
    assert "beta" in found.sentence
    shares = [parameter.share for parameter in found.parameters if parameter.share is not None]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == sorted(shares, reverse=True)


def test_importances_are_those_of_optuna() -> None:
    trials = by_beta(60)
    study = optuna.create_study()
    study.add_trials(
        frozen_trials(
            [
                TrialRecord(
                    number=number, candidate=candidate, status="complete", value=value,  # type: ignore[arg-type]
                    started=optuna.trial.create_trial(value=0.0).datetime_start,  # type: ignore[arg-type]
                )
                for number, (candidate, value) in enumerate(trials)
            ]
        )
    )  # fmt: skip
    ours = {k: v for k, v in named(importances(trials, target="log_loss")).items() if v is not None}
    names = list(ours)
    theirs = PedAnovaImportanceEvaluator(target_quantile=0.1).evaluate(study, names)
    assert ours == pytest.approx({name: theirs[name] for name in names})


def test_shuffled_results_make_nothing_important_but_rarely() -> None:
    raised = 0
    for seed in range(6):
        drawn = candidates(20, seed=seed)
        noise = np.random.default_rng(seed).random(20)
        found = importances(list(zip(drawn, noise.tolist(), strict=True)), target="log_loss")
        raised += any(parameter.above_noise for parameter in found.parameters)
    assert raised <= 2  # 6 times 1 in 20: more than 2 has a chance of 0.2 %


def test_too_few_trials_have_no_importance() -> None:
    trials = [*by_beta(MIN_TRIALS - 1), (candidates(1)[0], math.inf)]
    found = importances(trials, target="log_loss")
    assert (found.trials, found.needed, found.parameters) == (19, 20, ())
    assert found.sentence.startswith("19 trials have a log_loss")
    assert importances(by_beta(MIN_TRIALS), target="log_loss").parameters


def test_equal_results_have_no_importance() -> None:
    found = importances([(candidate, 0.5) for candidate in candidates(25)], target="log_loss")
    assert found.parameters == ()
    assert found.sentence == "All 25 trials have the same log_loss."


def test_parameters_that_cannot_be_judged_say_why() -> None:
    plain = [
        (CandidateSpec(objective=ObjectiveSpec(beta=beta), learning_rate=1e-3), beta)
        for beta in np.linspace(0.05, 1.0, 25).tolist()
    ]
    kernels = [c for c in candidates(60) if c.objective.kernel_name == "rbf"][:2]
    found = importances([*plain, *((c, 2.0) for c in kernels)], target="log_loss")
    reasons = {p.name: p.reason for p in found.parameters if p.importance is None}
    assert reasons["gamma"] == "used by 2 trials; 5 are needed"
    only_plain = importances(plain, target="log_loss")
    reasons = {p.name: p.reason for p in only_plain.parameters if p.importance is None}
    assert reasons["learning_rate"] == "has the same value in all 25 trials that use it"
    assert named(only_plain)["beta"] is not None
