"""The search by rungs: what it does alone, with many workers, after crashes, with little money."""

import math
import random
from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidInput
from core.lifecycle import EndedBy
from selection.belief import believe
from selection.draws import RECOMMENDED, Setting
from selection.rungs import MATTERS, answer, decide
from selection.study import (
    HARD_LIMIT,
    Action,
    Budget,
    Ended,
    Origin,
    Plan,
    Running,
    Start,
    Stop,
    StoppedBy,
    Study,
    Task,
    Trial,
    Wait,
    ladder,
)
from tests.unit.selection.searches import (
    PLAIN,
    finished,
    hash_of,
    plan,
    quality,
    run_alone,
    running,
)

QUICK = settings(max_examples=6, deadline=None)


# -------------------------------------------------------------------- alone


def test_alone_it_goes_rung_by_rung_and_ends() -> None:
    made = plan()
    study, starts, stop = run_alone(made)
    assert stop.by in (StoppedBy.FINISHED, StoppedBy.DECIDED)
    rungs = [start.task.rung for start in starts if not start.task.trial.repeat]
    assert rungs == sorted(rungs)
    screened = [start.task.trial.arm for start in starts[:29]]
    assert screened == [arm.name for arm in made.arms]
    counts = Counter(start.task.rung for start in starts if not start.task.trial.repeat)
    # 12 + 4 draws; 7; 3, or fewer that are enough; plain DPO with 2 draws beside them.
    assert {rung: counts[rung] for rung in (0, 1, 2)} == {0: 29, 1: 12 + 4 + 1 + 2, 2: 7 + 1}
    assert counts[3] == 3 + 1 or (stop.by is StoppedBy.DECIDED and counts[3] >= 2)
    assert len(study.ended) == len({ended.task.key for ended in study.ended})


def test_a_trial_goes_on_where_it_stopped() -> None:
    made = plan()
    _, starts, _ = run_alone(made)
    at: dict[tuple[str, int, int], int] = {}
    for start in starts:
        assert start.task.start == at.get(start.task.trial.key, 0)
        assert start.stop == made.rungs[start.task.rung]
        at[start.task.trial.key] = start.stop


def test_the_best_pair_of_a_world_without_noise_wins() -> None:
    ahead = []
    for seed in range(4):
        made = plan(seed=seed)
        made = replace(made, shape=replace(made.shape, draws=6))
        study, _, _ = run_alone(made)
        found = answer(made, study)
        best = min(made.screened, key=lambda arm: _at_length(arm.name))
        assert math.log(_at_length(found.trial.arm) / _at_length(best.name)) < MATTERS / 100
        assert found.rung == 3
        assert found.log_loss is not None
        ahead.append(math.log(_at_length(best.name) / found.log_loss))
    assert fmean(ahead) > 0.001, "its strengths are tuned"


def _at_length(name: str) -> float:
    return quality(Task(Trial(name, 0, 0, RECOMMENDED, Origin.SCREEN), 3, 0))


def test_plain_dpo_is_tuned_as_often_as_a_leading_pair_and_goes_all_the_way() -> None:
    made = plan()
    _, starts, _ = run_alone(made)
    mine = [start.task for start in starts if start.task.trial.arm == PLAIN.name]
    draws = {task.trial.draw for task in mine}
    assert draws == set(range(made.shape.draws + 1))
    assert {task.rung for task in mine} == {0, 1, 2, 3}
    final = next(task for task in mine if task.rung == 3)
    losses = {t.trial.draw: quality(t) for t in mine if t.rung == 1}
    assert math.log(losses[final.trial.draw] / min(losses.values())) < MATTERS / 100


@pytest.mark.parametrize("rungs", [(50,), (20, 200), (3, 8, 20), (5, 15, 45, 130, 400)])
def test_any_number_of_rungs(rungs: tuple[int, ...]) -> None:
    made = plan(number=12, rungs=rungs)
    study, _starts, stop = run_alone(
        made, score=lambda task: 0.6 + 0.001 * (len(task.trial.arm) % 5)
    )
    assert stop.by in (StoppedBy.FINISHED, StoppedBy.DECIDED)
    at_end = {ended.task.trial.arm for ended in study.ended if ended.task.rung == len(rungs) - 1}
    assert PLAIN.name in at_end
    assert len(at_end) >= 2


def test_it_stops_when_the_rest_could_hardly_win() -> None:
    """One pair is far ahead at every rung, and nothing is drawn: no other finalist is needed."""
    made = plan()
    made = replace(made, shape=replace(made.shape, draws=0, kept=(8, 5, 4)))
    favourite = made.arms[5].name

    def far_ahead(task: Task) -> float:
        return (
            0.6
            - (0.05 if task.trial.arm == favourite else 0.0)
            - 0.0001 * hash_of(task.trial.arm) / 1e4
        )

    study, _, stop = run_alone(made, score=far_ahead)
    assert answer(made, study).trial.arm == favourite
    assert stop.by is StoppedBy.DECIDED
    assert len([ended for ended in study.ended if ended.task.rung == 3]) < 5


def test_equal_finalists_get_a_second_seed() -> None:
    made = plan(number=6)
    study, _, _ = run_alone(made, score=lambda task: 0.65 - 0.01 * task.rung)
    again = [ended.task for ended in study.ended if ended.task.trial.repeat]
    assert len(again) == made.shape.repeats
    assert all(task.rung == 3 and task.start == 0 for task in again)


def test_a_hard_second_seed_changes_no_order() -> None:
    """It costs all who have it 0.2, which is more than anything that arms differ by."""
    made = plan(number=6)

    def close(task: Task) -> float:
        merit = (hash_of(task.trial.arm) % 17) * 1e-4
        return 0.65 - 0.01 * task.rung - merit + 0.2 * task.trial.repeat

    study, _, _ = run_alone(made, score=close)
    finals = [ended for ended in study.ended if ended.task.rung == 3]
    repeated = {ended.task.trial.config for ended in finals if ended.task.trial.repeat}
    once = {ended.task.trial.config for ended in finals} - repeated
    assert repeated
    assert once
    found = answer(made, study)
    own = {e.task.trial.config: e.log_loss for e in finals if not e.task.trial.repeat}
    assert found.trial.config == min(own, key=lambda config: (own[config] or 0.0, config))
    assert found.log_loss == pytest.approx(own[found.trial.config])
    belief = believe(made, study)
    alone = believe(
        made, replace(study, ended=tuple(e for e in study.ended if not e.task.trial.repeat))
    )
    for config in repeated:
        for other in once:
            apart = belief.value(config) - belief.value(other)
            assert apart == pytest.approx(alone.value(config) - alone.value(other), abs=0.1)


# ------------------------------------------------------------- many workers


class Crowd:
    """Workers on one study that start, end, die and ask again in an order drawn by lot."""

    def __init__(self, made: Plan, *, workers: int, seed: int, deaths: float, wild: float = 0.0):
        self.plan, self.workers, self.deaths, self.wild = made, workers, deaths, wild
        self.rng = random.Random(seed)
        self.study = Study()
        self.started: Counter[tuple[str, int, int, int]] = Counter()
        self.lost: Counter[tuple[str, int, int, int]] = Counter()

    def run(self) -> Stop:
        for _ in range(3000):
            action = decide(self.plan, self.study)
            if self.rng.random() < 0.2:
                assert action == decide(self.plan, shuffled(self.study, self.rng))
            if isinstance(action, Stop):
                assert not self.study.running
                return action
            free = len(self.study.running) < self.workers
            if isinstance(action, Start) and free and self.rng.random() < 0.7:
                self.started[action.task.key] += 1
                self.study = running(self.study, action)
            elif self.study.running:
                self.one_ends()
            else:
                assert isinstance(action, Start), "nothing runs and nothing is to be started"
        raise AssertionError("the search does not end")

    def one_ends(self) -> None:
        one = self.rng.choice(self.study.running)
        left = tuple(r for r in self.study.running if r is not one)
        seconds = finished(one.task).seconds * math.exp(self.rng.gauss(0.0, self.wild))
        if self.rng.random() < self.deaths:
            self.lost[one.task.key] += 1
            self.study = replace(
                self.study,
                running=left,
                waiting=(*self.study.waiting, one.task),
                lost_seconds=self.study.lost_seconds + 0.5 * min(seconds, one.limit_seconds),
            )
            return
        if seconds > one.limit_seconds:
            ended = Ended(one.task, EndedBy.PRUNER, one.limit_seconds)
        else:
            ended = finished(one.task, seconds=seconds)
        self.study = replace(self.study, running=left, ended=(*self.study.ended, ended))


def shuffled(study: Study, rng: random.Random) -> Study:
    ended, going, waiting = list(study.ended), list(study.running), list(study.waiting)
    for part in (ended, going, waiting):
        rng.shuffle(part)
    return replace(study, ended=tuple(ended), running=tuple(going), waiting=tuple(waiting))


@QUICK
@given(workers=st.integers(1, 16), seed=st.integers(0, 10_000))
def test_no_task_is_doubled_and_none_is_lost_when_workers_die(workers: int, seed: int) -> None:
    crowd = Crowd(plan(number=8), workers=workers, seed=seed, deaths=0.2)
    stop = crowd.run()
    assert stop.by in (StoppedBy.FINISHED, StoppedBy.DECIDED)
    ended = Counter(e.task.key for e in crowd.study.ended)
    assert set(ended.values()) == {1}
    assert set(crowd.started) == set(ended), "what was started has ended, and nothing else"
    for key, times in crowd.started.items():
        assert times == 1 + crowd.lost[key], "a task is started again only when it was lost"
    at_end = {e.task.trial.arm for e in crowd.study.ended if e.task.rung == 3}
    assert PLAIN.name in at_end


@QUICK
@given(workers=st.integers(2, 16), seed=st.integers(0, 10_000), deaths=st.sampled_from([0.0, 0.2]))
def test_many_workers_and_their_deaths_train_what_one_would(
    workers: int, seed: int, deaths: float
) -> None:
    """All but the finalists that one worker would spare itself."""
    made = plan(number=8)
    alone, _, _ = run_alone(made)
    crowd = Crowd(made, workers=workers, seed=seed, deaths=deaths)
    crowd.run()

    def trained(study: Study, *, last: bool) -> set[tuple[Task, float | None]]:
        ended = (e for e in study.ended if (e.task.rung == made.last) is last)
        return {(e.task, e.log_loss) for e in ended}

    assert trained(crowd.study, last=False) == trained(alone, last=False)
    assert trained(crowd.study, last=True) >= trained(alone, last=True)


@QUICK
@given(
    workers=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    budget=st.floats(30.0, 9000.0),
    wild=st.floats(0.0, 1.0),
)
def test_the_budget_is_never_passed_by_more_than_two_percent(
    workers: int, seed: int, budget: float, wild: float
) -> None:
    made = plan(number=8, budget=Budget(gpu_seconds=budget), shape=None)
    crowd = Crowd(made, workers=workers, seed=seed, deaths=0.1, wild=wild)
    crowd.run()
    # A dead attempt is paid out of the same promise as the task that it leaves.
    assert crowd.study.spent_seconds - crowd.study.lost_seconds <= HARD_LIMIT * budget + 1e-6
    assert crowd.study.spent_seconds <= HARD_LIMIT * budget + 1e-6


@QUICK
@given(cut=st.integers(0, 80), seed=st.integers(0, 1000))
def test_after_a_restart_at_any_point_it_decides_the_same(cut: int, seed: int) -> None:
    """All that it goes by is the study: half of it told to another process changes nothing."""
    made = plan(number=10, seed=seed)
    study, starts, stop = run_alone(made)
    cut = min(cut, len(starts))
    again, rest, end = run_alone(plan(number=10, seed=seed), study=Study(ended=study.ended[:cut]))
    assert [start.task for start in rest] == [start.task for start in starts[cut:]]
    assert (again, end) == (study, stop)


def test_a_lost_task_is_handed_out_first_and_unchanged() -> None:
    made = plan(number=8)
    study = Study()
    first = decide(made, study)
    assert isinstance(first, Start)
    study = running(study, first)
    second = decide(made, study)
    assert isinstance(second, Start)
    study = running(study, second)
    study = replace(study, running=study.running[1:], waiting=(first.task,))
    again = decide(made, study)
    assert isinstance(again, Start)
    assert (again.task, again.candidate) == (first.task, first.candidate)


def test_a_hundred_workers_wait_rather_than_guess() -> None:
    """Before anything is known only the screening is worth doing, and plain DPO's draws are not."""
    made = plan(number=8)
    study = Study()
    actions: list[Action] = []
    for _ in range(100):
        actions.append(decide(made, study))
        if not isinstance(actions[-1], Start):
            break
        study = running(study, actions[-1])
    assert isinstance(actions[-1], Wait)
    assert len(study.running) == 9


def test_a_straggler_does_not_hold_up_the_rest() -> None:
    made = plan(number=28)
    study = Study()
    for _ in range(29):
        start = decide(made, study)
        assert isinstance(start, Start)
        study = running(study, start)
    slow, *others = study.running
    study = Study(running=(slow,), ended=tuple(finished(r.task) for r in others))
    action = decide(made, study)
    assert isinstance(action, Start)
    assert action.task.rung == 1


# -------------------------------------------------------------- constraints


def test_diverged_and_drifted_trials_do_not_go_on_nor_win() -> None:
    made = plan(number=8, drift_budget=0.05)
    study = Study()
    bad = {made.arms[1].name, made.arms[2].name}
    while not isinstance(action := decide(made, study), Stop):
        assert isinstance(action, Start)
        task = action.task
        ended = finished(task, score=lambda t: 0.3 if t.trial.arm in bad else quality(t))
        if task.trial.arm == made.arms[1].name:
            ended = Ended(task, EndedBy.NAN, 5.0)
        elif task.trial.arm == made.arms[2].name:
            ended = replace(ended, drift=0.06)
        study = replace(study, ended=(*study.ended, ended))
    assert {e.task.rung for e in study.ended if e.task.trial.arm in bad} == {0}
    assert answer(made, study).trial.arm not in bad
    assert all(e.drift is not None and e.drift <= 0.05 for e in answer(made, study).compared)


def test_when_all_diverge_it_ends_and_says_what_is_recommended() -> None:
    made = plan(number=4)
    study = Study()
    while not isinstance(action := decide(made, study), Stop):
        assert isinstance(action, Start)
        study = replace(study, ended=(*study.ended, Ended(action.task, EndedBy.OOM, 1.0)))
    assert {ended.task.rung for ended in study.ended} == {0}
    assert answer(made, study).rung is None


def test_there_is_an_answer_at_any_time() -> None:
    made = plan(number=10)
    assert answer(made, Study()).trial.arm == made.arms[1].name
    study, _, _ = run_alone(made)
    for cut in range(1, len(study.ended)):
        found = answer(made, Study(ended=study.ended[:cut]))
        assert found.rung is not None
        assert found.trial.config in {e.task.trial.config for e in found.compared}
        assert {e.task.rung for e in found.compared} == {found.rung}


# ------------------------------------------------------------------- budget


def test_what_is_left_over_goes_to_the_end_of_the_ladder() -> None:
    """With money for half of the plan there is still a finalist and plain DPO at full length."""
    made = plan(number=28, budget=Budget(gpu_seconds=3200.0), shape="usual")
    study, _, stop = run_alone(made)
    assert stop.by is StoppedBy.BUDGET
    at_end = {ended.task.trial.arm for ended in study.ended if ended.task.rung == 3}
    assert PLAIN.name in at_end
    assert len(at_end) == 2


def test_a_budget_of_trials_counts_trials_and_not_tasks() -> None:
    made = plan(number=28, budget=Budget(trials=12), shape=None)
    study, _, stop = run_alone(made)
    trials = {ended.task.trial.key for ended in study.ended}
    assert len(trials) <= 12
    assert len(study.ended) > len(trials)
    assert stop.by is not StoppedBy.DECIDED or len(trials) < 12


def test_nothing_is_started_that_would_end_after_the_deadline() -> None:
    made = plan(number=8, budget=Budget(deadline_seconds=500.0))
    start = decide(made, Study(elapsed_seconds=470.0))
    assert isinstance(start, Start)
    assert start.limit_seconds <= HARD_LIMIT * 500.0 - 470.0
    stop = decide(made, Study(elapsed_seconds=490.0))
    assert isinstance(stop, Stop)
    assert stop.by is StoppedBy.BUDGET


def test_an_extended_budget_goes_on_with_the_same_tasks() -> None:
    small = plan(number=10, budget=Budget(gpu_seconds=700.0), shape="usual")
    study, _, stop = run_alone(small)
    assert stop.by is StoppedBy.BUDGET
    large = replace(small, budget=Budget(gpu_seconds=20_000.0))
    more, starts, end = run_alone(large, study=study)
    assert end.by in (StoppedBy.FINISHED, StoppedBy.DECIDED)
    assert more.ended[: len(study.ended)] == study.ended
    assert not {start.task.key for start in starts} & {e.task.key for e in study.ended}


def test_a_trial_by_hand_makes_no_pair_a_leading_one_and_takes_no_draw() -> None:
    made = plan(number=6)
    worst = max(made.arms[1:], key=lambda arm: _at_length(arm.name))
    asked = Task(Trial(worst.name, 1, 0, Setting(beta=0.5), Origin.HAND), 1, 0)
    _, starts, _ = run_alone(made, study=Study(waiting=(asked,)))
    drawn = [
        start.task.trial
        for start in starts
        if start.task.trial.draw and start.task.start == 0 and start.task.trial.repeat == 0
    ]
    assert asked.trial in drawn
    own = Counter(trial.arm for trial in drawn if trial.origin is not Origin.HAND)
    assert len(own) == made.shape.leading + 1
    assert set(own.values()) == {made.shape.draws}
    assert worst.name not in own


def test_a_task_that_a_person_asked_for_is_done_and_races() -> None:
    made = plan(number=6)
    setting = Setting(learning_rate=2.0, beta=0.5)
    asked = Task(Trial(made.arms[3].name, 90, 0, setting, Origin.HAND), 1, 0)
    first = decide(made, Study(waiting=(asked,)))
    assert isinstance(first, Start)
    assert first.task == asked
    assert first.candidate.learning_rate == pytest.approx(2 * made.arms[3].candidate.learning_rate)
    study, starts, _ = run_alone(
        made,
        study=Study(waiting=(asked,)),
        score=lambda t: 0.2 if t.trial.draw == 90 else quality(t),
    )
    assert answer(made, study).trial == asked.trial
    drawn = {s.task.trial.draw for s in starts if s.task.trial.arm == made.arms[3].name}
    assert 90 in drawn


# ------------------------------------------------------------------ refusals


def test_what_cannot_be_is_refused() -> None:
    made = plan(number=4)
    trial = Trial("rbf × nothing", 0, 0, RECOMMENDED, Origin.SCREEN)
    with pytest.raises(InvalidInput, match="not in the plan"):
        decide(made, Study(waiting=(Task(trial, 0, 0),)))
    task = Task(Trial(made.arms[1].name, 0, 0, RECOMMENDED, Origin.SCREEN), 7, 0)
    with pytest.raises(InvalidInput, match="rung 7"):
        decide(made, Study(waiting=(task,)))
    with pytest.raises(InvalidInput, match="twice"):
        Study(waiting=(task,), running=(Running(task, 1.0),))
    assert not Ended(task, EndedBy.WORKER_LOST, 1.0).is_measured
    with pytest.raises(InvalidInput, match="no log_loss"):
        Ended(task, EndedBy.BUDGET, 1.0)
    with pytest.raises(InvalidInput, match="rising"):
        replace(made, rungs=(20, 20, 60, 100))
    with pytest.raises(InvalidInput, match="exactly one"):
        replace(made, arms=made.arms[1:])
    with pytest.raises(InvalidInput, match="above 0"):
        Budget(gpu_seconds=0.0)


# -------------------------------------------------------------------- ladder


def test_ladders() -> None:
    assert ladder(5000) == (100, 300, 1000, 5000)
    assert ladder(5000, warmup_steps=200) == (300, 1000, 5000)
    assert ladder(38, warmup_steps=4) == (6, 38)
    assert ladder(40) == (5, 8, 40)
    assert ladder(3) == (3,)
    with pytest.raises(InvalidInput, match="no rungs"):
        ladder(10, warmup_steps=10)


@given(total=st.integers(1, 100_000), share=st.floats(0.0, 0.5))
def test_ladders_rise_to_the_whole_run_and_start_after_the_warm_up(
    total: int, share: float
) -> None:
    warmup = min(math.ceil(share * total), total - 1)
    rungs = ladder(total, warmup_steps=warmup)
    assert list(rungs) == sorted(set(rungs))
    assert rungs[-1] == total
    assert rungs[0] > warmup
