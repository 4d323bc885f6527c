"""Where a search stands: a plan and a study, with what follows from both, and what they can pay."""

import math
from collections.abc import Sequence
from functools import cached_property

from core.errors import InvalidInput
from core.run_spec import CandidateSpec
from selection.belief import Belief, Config, believe
from selection.draws import candidate_at
from selection.quote import Costs, costs_of
from selection.study import (
    HARD_LIMIT,
    Ended,
    Origin,
    Plan,
    Start,
    Study,
    Task,
    Trial,
    failed_tasks,
    places_left,
)

_RESERVE_AT_MOST = 0.7
_PATIENCE = 4.0


def candidate_of(plan: Plan, trial: Trial) -> CandidateSpec:
    """What a trial trains."""
    return candidate_at(plan.arm(trial.arm).candidate, trial.setting)


class Standing:
    """A plan and a study with what follows from both, each computed once."""

    def __init__(self, plan: Plan, study: Study) -> None:
        self.plan = plan
        self.study = study
        self.tasks = {task.key: task for task in study.tasks}
        self.measured = sorted((e for e in study.ended if e.is_measured), key=lambda e: e.task.key)
        self._beliefs: dict[int, Belief] = {}
        self.trials = {task.trial.key: task.trial for task in self.tasks.values()}
        for task in self.tasks.values():
            plan.arm(task.trial.arm)
            if not 0 <= task.rung <= plan.last:
                raise InvalidInput(
                    f"task {task.key} is at rung {task.rung}; the plan has 0 to {plan.last}"
                )

    @cached_property
    def failed(self) -> frozenset[tuple[str, int, int, int]]:
        """Tasks that came to nothing, or whose trial is ruled out."""
        return failed_tasks(self.plan, self.study)

    @cached_property
    def belief(self) -> Belief:
        return believe(self.plan, self.study)

    @cached_property
    def costs(self) -> Costs:
        return costs_of(self.plan, self.study)

    @property
    def money(self) -> str:
        """What was spent, in words."""
        limit = self.plan.budget.gpu_seconds
        of = "" if limit is None else f" of {limit:.0f}"
        return f"{self.study.spent_seconds:.0f}{of} device seconds are spent"

    def belief_below(self, rung: int) -> Belief:
        """What the results up to a rung say: who goes on from it is chosen by these.

        Those of longer rungs come in another order whenever workers are faster or die, and who goes
        on is not to depend on that.
        """
        if rung not in self._beliefs:
            known = tuple(ended for ended in self.study.ended if ended.task.rung <= rung)
            self._beliefs[rung] = believe(self.plan, Study(ended=known))
        return self._beliefs[rung]

    def at(self, rung: int) -> list[Ended]:
        """Feasible results of a rung, first seeds only; best expected at full length first."""
        found = [
            ended
            for ended in self.measured
            if ended.task.rung == rung
            and not ended.task.trial.repeat
            and ended.task.key not in self.failed
        ]
        belief = self.belief_below(rung)
        return sorted(found, key=lambda e: (-belief.value(e.task.trial.config), e.task.key))

    def set_apart(
        self, waiting: Sequence[Ended], ahead: Sequence[Task], number: int
    ) -> list[Ended]:
        """The first so many results of a rung that go on, beside those that have.

        `waiting` in the order of `at`. While others still run or are to come, nobody goes who would
        not also go for being good alone: what comes in may be like them.
        """
        if number < 1 or not waiting:
            return []
        rung = waiting[0].task.rung
        belief = self.belief_below(rung)
        by_config = {ended.task.trial.config: ended for ended in waiting}
        gone = [task.trial.config for task in ahead if task.trial.config in belief.index]
        found = [by_config[config] for config in belief.set_apart(list(by_config), gone, number)]
        if self.open_below(rung + 1):
            alone = {ended.task.key for ended in waiting[:number]}
            found = [ended for ended in found if ended.task.key in alone]
        return found

    def open_below(self, rung: int) -> int:
        """Tasks of lower rungs that somebody does. Who waits has been found too dear to start."""
        return sum(running.task.rung < rung for running in self.study.running)

    def allowed(self, number: int, rung: int) -> int:
        """How many of `number` may go on to a rung while tasks before it still run.

        As many as there would be if all of these came out ahead, and those that are yet to come to
        the rung below: who goes early would have gone anyhow, and the order in which workers end
        changes nothing.
        """
        running = self.open_below(rung)
        return max(0, number - running - self.to_come(rung)) if running else number

    def to_come(self, rung: int) -> int:
        """Tasks of lower rungs that the shape has places for, and nobody has started."""
        plan, shape = self.plan, self.plan.shape
        found = 0
        if rung > plan.draw_rung:
            drawn = {
                t.config for t in self.trials.values() if t.draw and t.origin is not Origin.HAND
            }
            found += max(0, (shape.leading + 1) * shape.draws - len(drawn))
        for below in range(1, rung):
            places = shape.kept[below - 1] + 1
            ahead = [t for t in self.tasks.values() if t.rung == below and t.start]
            usable = sum(task.key not in self.failed for task in ahead)
            found += places_left(places, len(ahead), usable)
        return found

    def has(self, config: Config, rung: int, *, repeat: int = 0) -> bool:
        return (*config, repeat, rung) in self.tasks

    def draws_of(self, arm: str) -> list[Trial]:
        """The drawn settings of an arm, in the order of their numbers."""
        found = [t for t in self.trials.values() if t.arm == arm and t.draw and not t.repeat]
        return sorted(found, key=lambda trial: trial.draw)

    # --------------------------------------------------------------- budget

    def start(self, task: Task, reason: str) -> Start | None:
        """The task as an action, or None where it does not fit into the budget."""
        plan, study, expected = self.plan, self.study, self.costs.task(task)
        budget, limit = plan.budget, math.inf
        if budget.trials is not None and task.key not in self.tasks:
            is_new = task.trial.key not in self.trials
            if is_new and len(self.trials) >= budget.trials:
                return None
        if budget.gpu_seconds is not None:
            going = math.fsum(self.costs.task(running.task) for running in study.running)
            reserve = self.reserve(task, budget.gpu_seconds)
            if study.spent_seconds + going + expected + reserve > budget.gpu_seconds:
                return None
            promised = math.fsum(running.limit_seconds for running in study.running)
            room = HARD_LIMIT * budget.gpu_seconds - study.spent_seconds - promised
            if room < expected:
                return None
            limit = self._limit(expected, room)
        if budget.deadline_seconds is not None:
            left = budget.deadline_seconds - study.elapsed_seconds
            if left < expected + self.reserve(task, budget.deadline_seconds):
                return None
            room = HARD_LIMIT * budget.deadline_seconds - study.elapsed_seconds
            limit = min(limit, self._limit(expected, room))
        return Start(
            task=task,
            candidate=candidate_of(plan, task.trial),
            stop=plan.rungs[task.rung],
            expected_seconds=expected,
            score_seconds=self.costs.scoring(task.trial.arm),
            limit_seconds=limit,
            reason=reason,
        )

    def _limit(self, expected: float, room: float) -> float:
        """What a task may cost at most: a multiple of what is expected while there is room.

        A task that is cut is paid for nothing, and a busy machine is no fault of the trial; so the
        limit is close only where the budget leaves no other. Before any task is timed nobody knows
        what is long.
        """
        patience = min(_PATIENCE * expected, room / 2) if self.measured else room / 2
        return min(room, max(self.costs.limit(expected), patience))

    def reserve(self, task: Task, seconds: float) -> float:
        """What has to be left after `task`: one finalist's way through the rungs above, and plain
        DPO's, as far as none of either kind is on its way there.

        Nothing where that is most of the budget: such a search buys knowledge of short runs.
        """
        plan, needed = self.plan, 0.0
        plain = plan.plain.name
        there = {
            (t.rung, t.trial.arm == plain) for t in self.tasks.values() if t.key not in self.failed
        }
        for rung in range(task.rung + 1, plan.last + 1):
            start, stop = plan.rungs[rung - 1], plan.rungs[rung]
            if (rung, True) not in there:
                needed += self.costs.seconds(plain, start=start, stop=stop)
            if (rung, False) not in there:
                needed += self.costs.seconds(task.trial.arm, start=start, stop=stop)
        return needed if needed <= _RESERVE_AT_MOST * seconds else 0.0
