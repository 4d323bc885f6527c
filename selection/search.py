"""Ask and tell: which candidate is tried next.

What trial n is depends on the seed, n and the results told before, and on nothing else: a trial is
sampled in a throw-away copy of the history and then written with all its parameters in one storage
call. A process killed at any point and started again on the same storage goes on where it was.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import optuna
from optuna.trial import FrozenTrial, TrialState

from core.errors import InvalidInput
from core.lifecycle import EndedBy, TrialStatus
from core.profile import RankedPair, Recommendation
from core.run_spec import CandidateSpec, SearchSpec
from core.spec import (
    ObjectiveSpec,
)
from selection.space import Params, SearchSpace

Origin = Literal["baseline", "recommended", "coverage", "sampler"]

_PLAN = "kdpo_plan"
_ORIGIN = "kdpo_origin"
_DRIFT = "drift"
_UNUSABLE = "unusable"
# Above every drift violation, so that a diverged trial ranks below one that drifts too far.
_UNUSABLE_VIOLATION = 1e6
_STARTUP_TRIALS = 10


@dataclass(frozen=True)
class Proposal:
    """A trial to run; its number is that of Optuna's trial."""

    number: int
    candidate: CandidateSpec
    origin: Origin


@dataclass(frozen=True)
class TrialOutcome:
    """What came of a trial; `log_loss` is the calibrated preference log-loss, lower is better.

    `drift` is the mean token KL(policy || reference) in nats; `feasible` says whether the trial
    kept every constraint, the drift budget among them.
    """

    log_loss: float | None
    drift: float | None
    feasible: bool
    status: TrialStatus
    ended_by: EndedBy


class SearchDriver:
    """Hands out the trials of one study and takes their outcomes, one at a time.

    `storage` is built by the caller; `initial` is tried first, in order, then a multivariate TPE.
    On a study that exists already its stored initial candidates win over `initial`. Raises
    InvalidInput when seed or learning rate are not those of the study, or when an initial
    candidate lies outside of the search space.
    """

    def __init__(
        self,
        *,
        storage: optuna.storages.BaseStorage,
        study_name: str,
        initial: Sequence[tuple[str, CandidateSpec]],
        spec: SearchSpec,
        learning_rate: float,
        seed: int,
    ) -> None:
        self._spec = spec
        self._seed = seed
        self._space = SearchSpace(learning_rate)
        self._storage = storage
        # This study only stores: its sampler is never asked.
        # Optuna would say every storage call on stderr; our events say what happens to trials.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=storage,
            study_name=study_name,
            direction="minimize",
            sampler=optuna.samplers.RandomSampler(seed=seed),
            load_if_exists=True,
        )
        self._initial = self._plan(initial)

    def next(self) -> Proposal | None:
        """Return the trial to run now, the unfinished one first; None when all have been told."""
        trials = self._trials()
        for trial in trials:
            if trial.state is TrialState.RUNNING:
                return self._proposal(trial)
        number = len(trials)
        if number >= self._spec.max_trials:
            return None
        if number < len(self._initial):
            origin, candidate = self._initial[number]
            params = self._space.params_of(candidate)
        else:
            origin, params = "sampler", self._sample(number, trials)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=self._space.distributions,
                user_attrs={_ORIGIN: origin},
            )
        )
        return self._proposal(self._trials()[number])

    def tell(self, number: int, outcome: TrialOutcome) -> None:
        """Record what came of a trial; telling a finished trial again changes nothing.

        A measured trial is complete, with its constraint. NaN and out-of-memory are facts about
        the candidate: complete and infeasible. A lost worker is not: the trial stays open and
        `next` hands it out again. Raises InvalidInput for an unknown number or an outcome that
        contradicts itself.
        """
        trials = self._trials()
        if not 0 <= number < len(trials):
            raise InvalidInput(
                f"trial {number} has not been handed out; the study holds {len(trials)} trials"
            )
        if trials[number].state.is_finished() or outcome.ended_by is EndedBy.WORKER_LOST:
            return
        verdict = _verdict(outcome, drift_budget=self._spec.drift_budget)
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        trial = optuna.trial.Trial(self._study, trial_id)
        for name, violation in verdict.constraints:
            # Set before a crash: the value is there already and Optuna would warn.
            if name not in trial.constraints:
                trial.set_constraint(name, violation)
        self._study.tell(number, verdict.value, state=verdict.state, skip_if_finished=True)

    def _plan(
        self, initial: Sequence[tuple[str, CandidateSpec]]
    ) -> list[tuple[Origin, CandidateSpec]]:
        identity = {"seed": self._seed, "learning_rate": self._space.learning_rate}
        stored = self._study.user_attrs.get(_PLAN)
        if stored is None:
            for _, candidate in initial:
                self._space.params_of(candidate)
            entries = [[origin, candidate.model_dump(mode="json")] for origin, candidate in initial]
            stored = json.dumps({**identity, "initial": entries}, sort_keys=True)
            self._study.set_user_attr(_PLAN, stored)
        plan = json.loads(stored)
        found = {key: plan[key] for key in identity}
        if found != identity:
            raise InvalidInput(
                f"study {self._study.study_name!r} was started with {found}, now {identity} is "
                "given; a study goes on with what it was started with",
                hint="use another study name for another search",
            )
        return [
            (_origin(origin), CandidateSpec.model_validate(candidate))
            for origin, candidate in plan["initial"]
        ]

    def _trials(self) -> list[FrozenTrial]:
        return sorted(self._study.get_trials(deepcopy=False), key=lambda trial: trial.number)

    def _proposal(self, trial: FrozenTrial) -> Proposal:
        return Proposal(
            number=trial.number,
            candidate=self._space.candidate_of(trial.params),
            origin=_origin(trial.user_attrs[_ORIGIN]),
        )

    def _sample(self, number: int, history: Sequence[FrozenTrial]) -> Params:
        """Draw the parameters of trial `number` from the results before it; nothing is stored."""
        sampler = optuna.samplers.TPESampler(
            seed=_bits(f"{self._seed}:{number}"),
            n_startup_trials=min(_STARTUP_TRIALS, max(len(self._initial), 4)),
            multivariate=True,
            constant_liar=False,
        )
        scratch = optuna.create_study(direction="minimize", sampler=sampler)
        scratch.add_trials(history)
        return scratch.ask(fixed_distributions=self._space.distributions).params


def _origin(value: object) -> Origin:
    match value:
        case "baseline" | "recommended" | "coverage" | "sampler":
            return value
        case _:
            raise InvalidInput(
                f"origin of a trial is {value!r}; expected one of {list(get_args(Origin))}"
            )


def _bits(text: str) -> int:
    """Return 32 bits of a hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclass(frozen=True)
class _Verdict:
    """What Optuna is told of a trial."""

    state: TrialState
    value: float | None
    constraints: tuple[tuple[str, float], ...]


def _verdict(outcome: TrialOutcome, *, drift_budget: float | None) -> _Verdict:
    infeasible = _Verdict(TrialState.COMPLETE, math.inf, ((_UNUSABLE, _UNUSABLE_VIOLATION),))
    match outcome.status:
        case TrialStatus.COMPLETE:
            if outcome.log_loss is None:
                raise InvalidInput("a complete trial needs a log_loss; received none")
            if not math.isfinite(outcome.log_loss):
                return infeasible
            return _Verdict(
                TrialState.COMPLETE, outcome.log_loss, _constraints(outcome, drift_budget)
            )
        case TrialStatus.PRUNED:
            # Its log-loss is that of a shorter run and must not be compared: pruned ones rank last.
            return _Verdict(TrialState.PRUNED, None, ())
        case TrialStatus.FAIL:
            if outcome.ended_by in (EndedBy.NAN, EndedBy.OOM):
                return infeasible
            return _Verdict(TrialState.FAIL, None, ())
        case TrialStatus.WAITING | TrialStatus.RUNNING:
            raise InvalidInput(
                f"a trial is told when it has ended; received status {outcome.status.value!r}",
                hint="hand an unfinished trial out again with next()",
            )
        case _:
            assert_never(outcome.status)


def _constraints(
    outcome: TrialOutcome, drift_budget: float | None
) -> tuple[tuple[str, float], ...]:
    """Violations, at most 0 where the constraint is kept; every complete trial states both."""
    over = -1.0
    if drift_budget is not None and outcome.drift is not None:
        over = outcome.drift - drift_budget
    other = 0.0 if outcome.feasible or over > 0.0 else 1.0
    return ((_DRIFT, over), (_UNUSABLE, other))


# ------------------------------------------------------- the first candidates


def initial_candidates(
    recommendation: Recommendation, *, spec: SearchSpec, learning_rate: float, seed: int
) -> list[tuple[Origin, CandidateSpec]]:
    """Return what is tried before the sampler: plain DPO, the top pairs, then coverage.

    Top pairs (a quarter of the trials, one to three) differ in their divergences. Coverage gives
    every divergence and every kernel that has no trial yet one, as far as `spec.max_trials`
    allows, in the order of the ranking; which uncovered kernel meets which divergence is drawn
    from `seed`, so that the two are not confounded over many searches. Last comes the first
    divergence without a kernel: it tells what the kernel adds.
    """
    ranking = recommendation.ranking
    beta = ranking[0].objective.beta
    picked: list[tuple[Origin, RankedPair]] = []
    divergences = list(dict.fromkeys(pair.divergence for pair in ranking))
    kernels = list(dict.fromkeys(pair.kernel for pair in ranking))
    top = min(3, max(1, (spec.max_trials - 1) // 4))
    for divergence in divergences[:top]:
        best = next(pair for pair in ranking if pair.divergence == divergence)
        picked.append(("recommended", best))
    tried = {pair.kernel for _, pair in picked}
    fresh = [name for name in kernels if name not in tried]
    fresh.sort(key=lambda name: _bits(f"{seed}:{name}"))
    by_names = {(pair.kernel, pair.divergence): pair for pair in ranking}
    for divergence in divergences[top:]:
        kernel = fresh.pop() if fresh else ranking[0].kernel
        picked.append(("coverage", by_names[kernel, divergence]))
    picked += [("coverage", by_names[kernel, divergences[0]]) for kernel in fresh]
    objectives: list[tuple[Origin, ObjectiveSpec]] = [
        ("baseline", ObjectiveSpec(beta=beta)),
        *((origin, pair.objective) for origin, pair in picked),
        ("coverage", ranking[0].objective.model_copy(update={"kernel_term": None})),
    ]
    return [
        (origin, CandidateSpec(objective=objective, learning_rate=learning_rate))
        for origin, objective in objectives[: spec.max_trials]
    ]
