"""The driver is deterministic, survives a kill at any write, and searches better than chance."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from core.errors import InvalidInput
from core.lifecycle import EndedBy, TrialStatus
from core.run_spec import CandidateSpec, SearchSpec
from core.spec import (
    ObjectiveSpec,
)
from selection.recommender import recommend
from selection.search import Proposal, SearchDriver, TrialOutcome, initial_candidates
from selection.space import SearchSpace
from tests.unit.selection.samples import profile

RATE = 2e-3
BASELINE = [("baseline", CandidateSpec(objective=ObjectiveSpec(), learning_rate=RATE))]


def first_candidates(max_trials: int = 4) -> list[tuple[str, CandidateSpec]]:
    spec = SearchSpec(max_trials=max_trials)
    found = initial_candidates(recommend(profile()), spec=spec, learning_rate=RATE, seed=0)
    return [*found]


def surface(candidate: CandidateSpec) -> float:
    """A smooth log-loss with its optimum at beta 0.3, rate 1.5e-3, a Wasserstein penalty."""
    objective = candidate.objective
    loss = 0.45 + 0.02 * math.log(objective.beta / 0.3) ** 2
    loss += 0.02 * math.log(candidate.learning_rate / 1.5e-3) ** 2
    loss += 0.0 if objective.divergence_name == "wasserstein" else 0.05
    return loss + (0.0 if objective.kernel_name in ("rbf", "none") else 0.02)


def outcome_of(proposal: Proposal) -> TrialOutcome:
    """What a trial of that candidate gives; every fifth number diverges, some drift too far."""
    if proposal.number % 5 == 3:
        return TrialOutcome(None, None, False, TrialStatus.FAIL, EndedBy.NAN)
    drift = 0.2 / (1.0 + proposal.candidate.learning_rate * 1e3)
    return TrialOutcome(
        surface(proposal.candidate), drift, drift <= 0.1, TrialStatus.COMPLETE, EndedBy.BUDGET
    )


def measured(
    log_loss: float | None = 0.5, *, drift: float = 0.01, feasible: bool = True
) -> TrialOutcome:
    return TrialOutcome(log_loss, drift, feasible, TrialStatus.COMPLETE, EndedBy.BUDGET)


def failed(ended_by: EndedBy) -> TrialOutcome:
    return TrialOutcome(None, None, False, TrialStatus.FAIL, ended_by)


def driver_on(
    storage: BaseStorage,
    *,
    max_trials: int = 7,
    initial: list[tuple[str, CandidateSpec]] | None = None,
    seed: int = 7,
    rate: float = RATE,
) -> SearchDriver:
    return SearchDriver(
        storage=storage,
        study_name="study_test",
        initial=first_candidates() if initial is None else initial,
        spec=SearchSpec(max_trials=max_trials, drift_budget=0.1),
        learning_rate=rate,
        seed=seed,
    )


def run(driver: SearchDriver) -> list[Proposal]:
    proposals = []
    while (proposal := driver.next()) is not None:
        proposals.append(proposal)
        driver.tell(proposal.number, outcome_of(proposal))
    return proposals


def stored(storage: BaseStorage) -> list[tuple[Any, ...]]:
    """Everything that a later trial or the choice of a winner can depend on."""
    trials = optuna.load_study(study_name="study_test", storage=storage).trials
    return [(t.number, t.state, t.values, t.params, t.constraints, t.user_attrs) for t in trials]


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[Proposal], list[tuple[Any, ...]]]:
    storage = InMemoryStorage()
    return run(driver_on(storage)), stored(storage)


# --------------------------------------------------------------- determinism


def test_the_sequence_is_a_function_of_seed_and_results(undisturbed):
    assert run(driver_on(InMemoryStorage())) == undisturbed[0]
    other = run(driver_on(InMemoryStorage(), seed=8))
    assert other[:4] == undisturbed[0][:4]
    assert all(a != b for a, b in zip(other[4:], undisturbed[0][4:], strict=True))


def test_initial_candidates_come_first_and_then_the_sampler(undisturbed):
    proposals = undisturbed[0]
    assert [(p.origin, p.candidate) for p in proposals[:4]] == first_candidates()
    assert [p.number for p in proposals] == list(range(7))
    assert {p.origin for p in proposals[4:]} == {"sampler"}
    assert len({p.candidate.model_dump_json() for p in proposals}) == 7


def test_results_before_a_trial_change_it_once_the_sampler_learns():
    """Same seed, same number, other results: another candidate."""

    def last(sign: float) -> Proposal:
        driver = driver_on(InMemoryStorage(), max_trials=12)
        found = None
        while (proposal := driver.next()) is not None:
            found = proposal
            driver.tell(proposal.number, measured(sign * surface(proposal.candidate)))
        assert found is not None
        return found

    assert last(1.0) != last(-1.0)


def test_a_raised_budget_goes_on_with_the_same_sequence(undisturbed):
    storage = InMemoryStorage()
    first = run(driver_on(storage, max_trials=5))
    more = run(driver_on(storage, max_trials=7))
    assert first + more == undisturbed[0]


# -------------------------------------------------------------------- crashes


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the driver may catch it."""


class Executioner:
    """Kills the process once before and once after every distinct write to storage."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[object, ...]] = Counter()
        self.kills = 0

    def around(self, key: tuple[object, ...], write: Callable[[], Any]) -> Any:
        self.seen[key] += 1
        if self.seen[key] == 1:
            self.kills += 1
            raise KilledError(f"before {key}")
        result = write()
        if self.seen[key] == 2:
            self.kills += 1
            raise KilledError(f"after {key}")
        return result


WRITES = (
    "create_new_study",
    "set_study_user_attr",
    "create_new_trial",
    "_create_new_trial",  # what Optuna calls on an RDBStorage behind its cache
    "set_trial_param",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
)


def mortal(storage: BaseStorage, executioner: Executioner) -> BaseStorage:
    """Put the executioner before every write of a real storage."""
    for name in WRITES:
        method = getattr(storage, name, None)
        if method is None:
            continue

        def write(*args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            at = (
                len(storage.get_all_trials(args[0]))
                if "new_trial" in _name
                else (*args[:2], kwargs.get("key"))
            )
            return executioner.around((_name, str(at)), lambda: _method(*args, **kwargs))

        setattr(storage, name, write)
    return storage


@pytest.fixture(params=["journal", "sqlite"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], BaseStorage]]:
    """Open the same storage as a new process would; the connections of the old one are dropped."""
    opened: list[RDBStorage] = []

    def open_storage() -> BaseStorage:
        if request.param == "journal":
            return JournalStorage(JournalFileBackend(str(tmp_path / "optuna.log")))
        opened.append(RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}"))
        return opened[-1]

    yield open_storage
    for storage in opened:
        storage.remove_session()
        storage.engine.dispose()


def test_killed_before_and_after_every_write_the_search_ends_the_same(reopen, undisturbed):
    executioner = Executioner()
    handed_out: dict[int, Proposal] = {}
    finished = False
    while not finished:
        try:
            driver = driver_on(mortal(reopen(), executioner))
            while (proposal := driver.next()) is not None:
                assert handed_out.setdefault(proposal.number, proposal) == proposal
                driver.tell(proposal.number, outcome_of(proposal))
            finished = True
        except KilledError:
            continue
    # twice each: the study, its plan; the creation of a trial, its constraints, its end
    constraints = sum(len(trial[4]) for trial in undisturbed[1])
    assert executioner.kills >= 2 * (2 + 7 + constraints + 7)
    assert list(handed_out.values()) == undisturbed[0]
    assert stored(reopen()) == undisturbed[1]


def test_a_driver_dropped_between_ask_and_tell_hands_the_trial_out_again(reopen, undisturbed):
    proposals = []
    while (proposal := driver_on(reopen()).next()) is not None:
        restarted = driver_on(reopen())
        assert restarted.next() == proposal
        proposals.append(proposal)
        restarted.tell(proposal.number, outcome_of(proposal))
    assert proposals == undisturbed[0]
    assert stored(reopen()) == undisturbed[1]


def test_the_stored_plan_wins_over_another_one_after_a_restart():
    storage = InMemoryStorage()
    first = driver_on(storage).next()
    assert first is not None
    again = driver_on(storage, initial=BASELINE)
    assert again.next() == first
    again.tell(0, outcome_of(first))
    following = again.next()
    assert following is not None
    assert (following.origin, following.candidate) == first_candidates()[1]


@pytest.mark.parametrize("change", [{"seed": 8}, {"rate": 1e-3}])
def test_another_seed_or_learning_rate_on_the_same_study_is_refused(change: dict[str, Any]):
    storage = InMemoryStorage()
    driver_on(storage, initial=BASELINE)
    with pytest.raises(InvalidInput, match="was started with"):
        driver_on(storage, initial=BASELINE, **change)


def test_an_initial_candidate_outside_of_the_space_is_refused_before_anything_runs():
    outside = [("recommended", CandidateSpec(objective=ObjectiveSpec(), learning_rate=0.5))]
    storage = InMemoryStorage()
    with pytest.raises(InvalidInput, match="learning_rate"):
        driver_on(storage, initial=outside)
    assert driver_on(storage, initial=BASELINE).next() is not None


# ----------------------------------------------------------------------- tell


def told(outcome: TrialOutcome) -> optuna.trial.FrozenTrial:
    storage = InMemoryStorage()
    driver = driver_on(storage, initial=BASELINE)
    assert driver.next() is not None
    driver.tell(0, outcome)
    return optuna.load_study(study_name="study_test", storage=storage).trials[0]


def test_a_measured_trial_is_complete_with_its_drift_constraint():
    trial = told(measured(0.5, drift=0.04))
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.5)
    assert trial.constraints == {"drift": pytest.approx(-0.06), "unusable": 0.0}


def test_drift_over_budget_is_infeasible_by_as_much_as_it_is_over():
    trial = told(measured(0.4, drift=0.3, feasible=False))
    assert trial.constraints == {"drift": pytest.approx(0.2), "unusable": 0.0}


def test_infeasible_for_another_reason_is_infeasible():
    assert told(measured(0.4, drift=0.01, feasible=False)).constraints["unusable"] > 0


@pytest.mark.parametrize(
    "outcome",
    [failed(EndedBy.NAN), failed(EndedBy.OOM), measured(math.nan), measured(math.inf)],
    ids=["nan", "oom", "nan loss", "inf loss"],
)
def test_divergence_and_out_of_memory_are_facts_about_the_candidate(outcome: TrialOutcome):
    trial = told(outcome)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, math.inf)
    assert max(trial.constraints.values()) > 1e3


def test_an_infeasible_trial_is_never_the_best_one():
    storage = InMemoryStorage()
    driver = driver_on(storage)
    for outcome in (measured(0.6), measured(0.1, drift=0.5, feasible=False), failed(EndedBy.NAN)):
        proposal = driver.next()
        assert proposal is not None
        driver.tell(proposal.number, outcome)
    assert optuna.load_study(study_name="study_test", storage=storage).best_trial.number == 0


def test_pruned_and_user_ended_trials_are_finished_without_a_value():
    pruned = TrialOutcome(0.4, 0.01, True, TrialStatus.PRUNED, EndedBy.PRUNER)
    assert (told(pruned).state, told(pruned).values) == (TrialState.PRUNED, None)
    assert told(failed(EndedBy.USER)).state is TrialState.FAIL


def test_a_lost_worker_leaves_the_trial_open():
    driver = driver_on(InMemoryStorage(), initial=BASELINE)
    proposal = driver.next()
    assert proposal is not None
    driver.tell(0, failed(EndedBy.WORKER_LOST))
    assert driver.next() == proposal
    driver.tell(0, measured())
    following = driver.next()
    assert following is not None
    assert following.number == 1


def test_telling_again_changes_nothing():
    storage = InMemoryStorage()
    driver = driver_on(storage, initial=BASELINE)
    assert driver.next() is not None
    driver.tell(0, measured(0.5))
    before = stored(storage)
    driver.tell(0, measured(0.1, drift=0.9, feasible=False))
    driver.tell(0, failed(EndedBy.NAN))
    assert stored(storage) == before


@pytest.mark.parametrize("number", [-1, 1])
def test_an_unknown_number_is_refused(number: int):
    driver = driver_on(InMemoryStorage(), initial=BASELINE)
    assert driver.next() is not None
    with pytest.raises(InvalidInput, match="has not been handed out"):
        driver.tell(number, measured())


def test_outcomes_that_contradict_themselves_are_refused():
    driver = driver_on(InMemoryStorage(), initial=BASELINE)
    assert driver.next() is not None
    with pytest.raises(InvalidInput, match="needs a log_loss"):
        driver.tell(0, measured(None))
    running = TrialOutcome(0.5, 0.1, True, TrialStatus.RUNNING, EndedBy.BUDGET)
    with pytest.raises(InvalidInput, match="received status 'running'"):
        driver.tell(0, running)


def test_optuna_prints_nothing(capfd: pytest.CaptureFixture[str]):
    run(driver_on(InMemoryStorage(), max_trials=6))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


# ---------------------------------------------------------------- the sampler


def random_losses(count: int, *, seed: int) -> list[float]:
    space = SearchSpace(RATE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [
        surface(space.candidate_of(study.ask(space.distributions).params)) for _ in range(count)
    ]


def search(evaluate: Callable[[CandidateSpec], TrialOutcome], *, seed: int) -> list[CandidateSpec]:
    driver = driver_on(InMemoryStorage(), max_trials=30, initial=BASELINE, seed=seed)
    tried = []
    while (proposal := driver.next()) is not None:
        tried.append(proposal.candidate)
        driver.tell(proposal.number, evaluate(proposal.candidate))
    return tried


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sampler_learns_where_the_surface_is_low(seed: int):
    """The last third of 30 trials loses much less than random ones do, on average."""
    tried = search(lambda candidate: measured(surface(candidate)), seed=seed)
    learned = sum(surface(candidate) for candidate in tried[20:]) / 10
    blind = sum(random_losses(200, seed=seed)) / 200
    assert learned - 0.45 < 0.7 * (blind - 0.45)


def test_the_sampler_learns_to_keep_the_drift_budget():
    """Low log-loss lies at high rates; only when they drift too far do late trials avoid them."""

    def cautious(*, drifting: bool) -> int:
        def evaluate(candidate: CandidateSpec) -> TrialOutcome:
            rate = candidate.learning_rate
            drift = 0.1 * rate / RATE if drifting else 0.0
            return measured(1.0 - math.log(rate), drift=drift, feasible=drift <= 0.1)

        return sum(c.learning_rate <= RATE for c in search(evaluate, seed=0)[15:])

    assert cautious(drifting=True) > cautious(drifting=False) + 3
