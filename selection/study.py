"""A search as values: arms, rungs, tasks, a budget, and all that is known of it at one moment.

A *trial* is one configuration (an arm at a setting and a seed); a *task* takes a trial from one
rung to the next. Tasks are the unit of work, and no task is done twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from core.errors import InvalidInput
from core.lifecycle import EndedBy
from core.run_spec import CandidateSpec
from core.spec import KernelName
from selection.draws import Setting

PLAIN = "dpo"
FRACTIONS = (0.02, 0.06, 0.2, 1.0)
"""Lengths of the rungs as parts of the whole run."""
LEAST_STEPS = 5
HARD_LIMIT = 1.02
"""Times the budget: what tasks may cost together if every one goes to its own limit."""


class Origin(StrEnum):
    """Why a trial is in the search."""

    BASELINE = "baseline"  # plain DPO
    SCREEN = "screen"  # an arm as it is recommended
    PRIOR = "prior"  # a setting drawn around the recommended one
    INCUMBENT = "incumbent"  # a setting drawn around the best one so far
    UNIFORM = "uniform"  # a setting from anywhere in the range
    REPEAT = "repeat"  # a finalist with another seed
    HAND = "hand"  # a person asked for it


@dataclass(frozen=True)
class Arm:
    """What is compared: plain DPO, or a kernel with a divergence, at its recommended setting.

    `score` is the recommender's guess of the percent of log-loss won over plain DPO (metrics and
    history in one); `cost` the seconds of a step as a multiple of plain DPO's.
    """

    name: str
    candidate: CandidateSpec
    score: float = 0.0
    cost: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether this is plain DPO."""
        return self.candidate.objective.is_plain_dpo

    @property
    def learns_mixture(self) -> bool:
        """Whether weights of a mixture are among its hyperparameters."""
        return self.candidate.objective.kernel_name == KernelName.HMK.value


@dataclass(frozen=True)
class Budget:
    """Limits, whichever comes first; None: no such limit.

    `gpu_seconds` of all tasks together, `trials` started, `deadline_seconds` of wall time from the
    start of the search.
    """

    gpu_seconds: float | None = None
    trials: int | None = None
    deadline_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise InvalidInput(f"budget {name} is {value}; expected a number above 0, or none")


@dataclass(frozen=True)
class Shape:
    """How many trials go how far.

    `screened` arms start at the first rung, plain DPO aside; `kept[k]` of those at rung k go on to
    rung k + 1; `draws` settings are drawn in each of the `leading` arms and in plain DPO; of the
    trials at full length the first `repeats` get a second seed when they are too close to tell.
    """

    screened: int
    kept: tuple[int, ...]
    leading: int
    draws: int
    repeats: int


@dataclass(frozen=True)
class Plan:
    """What a search is asked to do; it does not change while the search goes on, but for a
    budget or a shape that is extended.

    `arms` in the order in which they are screened, plain DPO among them; `rungs` are steps, rising,
    the last one the whole run; `pool`, where given, holds the only settings that may be drawn;
    `step_seconds` and `score_seconds` are what a step of plain DPO and a scoring are thought to
    cost before any has been timed.
    """

    arms: tuple[Arm, ...]
    rungs: tuple[int, ...]
    shape: Shape
    budget: Budget
    seed: int
    step_seconds: float
    score_seconds: float
    drift_budget: float | None = None
    pool: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        _check_plan(self)

    def accepts(self, ended: "Ended") -> bool:
        """Whether a result is measured and within the drift budget."""
        limit = self.drift_budget
        kept = limit is None or (ended.drift is not None and ended.drift <= limit)
        return ended.is_measured and kept

    @property
    def last(self) -> int:
        """Number of the last rung."""
        return len(self.rungs) - 1

    @property
    def draw_rung(self) -> int:
        """The rung to which drawn settings are run first: the second where there are three."""
        return 1 if len(self.rungs) >= 3 else 0

    @cached_property
    def plain(self) -> Arm:
        """Plain DPO."""
        return next(arm for arm in self.arms if arm.is_plain)

    @cached_property
    def _by_name(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.arms}

    @property
    def screened(self) -> tuple[Arm, ...]:
        """The arms of the first rung in their order, plain DPO first."""
        others = [arm for arm in self.arms if not arm.is_plain]
        return (self.plain, *others[: self.shape.screened])

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            InvalidInput: there is none.
        """
        if name not in self._by_name:
            raise InvalidInput(f"arm {name!r} is not in the plan; it holds {list(self._by_name)}")
        return self._by_name[name]


def _check_plan(plan: Plan) -> None:
    rungs = list(plan.rungs)
    if not rungs or rungs[0] < 1 or sorted(set(rungs)) != rungs:
        raise InvalidInput(f"rungs are {rungs}; expected rising numbers of steps, 1 or more")
    names = [arm.name for arm in plan.arms]
    if len(set(names)) < len(names):
        raise InvalidInput(f"arms {sorted(n for n in set(names) if names.count(n) > 1)} come twice")
    if sum(arm.is_plain for arm in plan.arms) != 1:
        raise InvalidInput("a plan compares with plain DPO: expected exactly one arm that is it")
    shape = plan.shape
    if len(shape.kept) != plan.last or min((shape.screened, *shape.kept), default=0) < 1:
        raise InvalidInput(
            f"shape keeps {shape.kept} of {shape.screened} arms over {len(rungs)} rungs; expected "
            f"{plan.last} numbers of 1 or more"
        )
    if min(shape.leading, shape.draws, shape.repeats) < 0:
        raise InvalidInput(f"numbers of a shape are 0 or more; received {shape}")
    if plan.step_seconds <= 0.0 or plan.score_seconds < 0.0:
        raise InvalidInput(
            f"a step takes {plan.step_seconds} s and a scoring {plan.score_seconds} s; expected a "
            "positive number and one of 0 or more"
        )


def ladder(
    total_steps: int,
    *,
    warmup_steps: int = 0,
    fractions: Sequence[float] = FRACTIONS,
    least: int = LEAST_STEPS,
) -> tuple[int, ...]:
    """Steps of the rungs of a run: `fractions` of it, none before `least` or inside the warm-up.

    A trial is the first steps of the whole run, rates included, so a rung within the warm-up would
    compare trials at rates that none of them is meant to have: the first rung is at least one and
    a half warm-ups long. Rungs less than a half longer than the one before are left out; the last
    is the run. Domain: total_steps >= 1, 0 <= warmup_steps < total_steps.
    """
    if total_steps < 1 or not 0 <= warmup_steps < total_steps:
        raise InvalidInput(
            f"a run of {total_steps} steps with {warmup_steps} of warm-up has no rungs; expected "
            "1 or more, and fewer of warm-up"
        )
    first = max(least, math.ceil(1.5 * warmup_steps))
    rungs: list[int] = []
    for fraction in sorted(fractions):
        step = max(first, math.ceil(fraction * total_steps))
        if step * 1.5 <= total_steps and (not rungs or step >= 1.5 * rungs[-1]):
            rungs.append(step)
    return (*rungs, total_steps)


def places_left(places: int, started: int, usable: int) -> int:
    """How many of a rung's places are free when so many have started for it, and may still go on.

    Who failed gives its place away, but no more of them than there are places: where everybody
    fails, that is not found out with everybody.
    """
    return max(0, min(places - usable, 2 * places - started))


@dataclass(frozen=True)
class Trial:
    """A configuration of the search: an arm, the number of a draw in it, a seed.

    Draw 0 is the recommended setting; `repeat` 0 is the search's own seed.
    """

    arm: str
    draw: int
    repeat: int
    setting: Setting
    origin: Origin

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from every other trial of the search."""
        return (self.arm, self.draw, self.repeat)

    @property
    def config(self) -> tuple[str, int]:
        """What it trains, whatever the seed."""
        return (self.arm, self.draw)


@dataclass(frozen=True)
class Task:
    """A trial on its way to a rung, from the rung before or from the reference.

    `start` is the step that it goes on from, where an earlier task of the trial ended.
    """

    trial: Trial
    rung: int
    start: int

    @property
    def key(self) -> tuple[str, int, int, int]:
        """What tells it from every other task; a table has one row of each."""
        return (*self.trial.key, self.rung)


@dataclass(frozen=True)
class Running:
    """A task that a worker has; it must not cost more than `limit_seconds` (see `Start`)."""

    task: Task
    limit_seconds: float


@dataclass(frozen=True)
class Ended:
    """A task with what came of it. A measured one ended by `budget`: its rung was reached; one that
    ended by `worker_lost` was given up after too many losses, and is no result.

    `log_loss` is the calibrated preference log-loss on validation, nats; `drift` the mean token
    KL(policy || reference), nats; `seconds` its device time, lost attempts not included.
    """

    task: Task
    ended_by: EndedBy
    seconds: float
    log_loss: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        if not self.seconds >= 0.0:
            raise InvalidInput(f"task {self.task.key} took {self.seconds} s; expected 0 or more")
        if self.ended_by is EndedBy.BUDGET and self.log_loss is None:
            raise InvalidInput(f"task {self.task.key} reached its rung and has no log_loss")

    @property
    def is_measured(self) -> bool:
        """Whether there is a log-loss to compare."""
        return (
            self.ended_by is EndedBy.BUDGET
            and self.log_loss is not None
            and math.isfinite(self.log_loss)
        )


@dataclass(frozen=True)
class Study:
    """Everything known of a search at one moment; the order within each part means nothing.

    `waiting` tasks are to be done and nobody does them: their worker died, or a person asked for
    them. `lost_seconds` is what dead attempts cost, `elapsed_seconds` the wall time so far.
    """

    ended: tuple[Ended, ...] = ()
    running: tuple[Running, ...] = ()
    waiting: tuple[Task, ...] = ()
    lost_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    def __post_init__(self) -> None:
        keys = [task.key for task in self.tasks]
        if len(set(keys)) < len(keys):
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise InvalidInput(f"tasks {twice} are in the study twice; each is done once")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Every task that there is."""
        return (
            *(ended.task for ended in self.ended),
            *(running.task for running in self.running),
            *self.waiting,
        )

    @property
    def spent_seconds(self) -> float:
        """Device time of what has ended, dead attempts included."""
        return self.lost_seconds + math.fsum(ended.seconds for ended in self.ended)


def ruled_out(plan: Plan, study: Study) -> frozenset[tuple[str, int, int]]:
    """Trials (by key) that cannot win by what they showed earlier, as their whole run is no use.

    They diverged, ran out of memory, took their workers with them, or drifted too far at some
    rung. Who was cut for want of time keeps what it has shown.
    """
    no_fault = (EndedBy.BUDGET, EndedBy.PRUNER)
    return frozenset(
        ended.task.trial.key
        for ended in study.ended
        if ended.ended_by not in no_fault or (ended.is_measured and not plan.accepts(ended))
    )


def failed_tasks(plan: Plan, study: Study) -> frozenset[tuple[str, int, int, int]]:
    """Tasks (by key) that came to nothing, or whose trial is ruled out."""
    out = ruled_out(plan, study)
    failed = {ended.task.key for ended in study.ended if not plan.accepts(ended)}
    return frozenset(failed | {t.key for t in study.tasks if t.trial.key in out})


@dataclass(frozen=True)
class Start:
    """Do this task. Whoever does it stops at `limit_seconds` of device time, ended by `pruner`.

    The limit is what keeps a search within 1.02 times its budget whatever a task turns out to cost;
    it is infinite without a budget of time. `score_seconds` of what is expected are for scoring.
    """

    task: Task
    candidate: CandidateSpec
    stop: int
    expected_seconds: float
    score_seconds: float
    limit_seconds: float
    reason: str


@dataclass(frozen=True)
class Wait:
    """Nothing to start now; ask again when a running task has ended."""

    reason: str


class StoppedBy(StrEnum):
    """Why a search is over."""

    FINISHED = "finished"  # all of the plan is done
    DECIDED = "decided"  # what is left would hardly change the answer
    BUDGET = "budget"  # nothing that is left fits into it


@dataclass(frozen=True)
class Stop:
    """The search is over unless its budget is extended."""

    by: StoppedBy
    reason: str


Action = Start | Wait | Stop
