"""What a search will cost: of one task, of all that is left, and which shape a budget can pay.

Seconds are device seconds. Before anything is timed they come from the plan's own figures; after
that, the ratio of measured to expected moves them, of each arm as far as it has been timed.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from core.errors import InvalidInput
from core.lifecycle import EndedBy
from selection.draws import Setting
from selection.shapes import MOST_FINALISTS, SHAPES, shaped
from selection.study import (
    Arm,
    Budget,
    Ended,
    Origin,
    Plan,
    Shape,
    Study,
    Task,
    failed_tasks,
    places_left,
    ruled_out,
)

_UNTIMED_SPREAD = 0.25
"""Of the logarithm of a cost that nothing has been timed for."""
_LEAST_SPREAD = 0.02
_TRUST = 2.0
"""Tasks of an arm that weigh as much as all others' ratio."""
_DRAWS = 400
_REPEATED = 0.8
"""How often finalists are too close to tell: in most made-up worlds they are."""


@dataclass(frozen=True)
class Costs:
    """Expected device seconds of tasks of a plan, moved by what has been timed.

    `ratio` measured over planned of all tasks, `by_arm` of single arms, `spread` the standard
    deviation of the logarithm of one task's seconds around what is expected.
    """

    plan: Plan
    ratio: float
    by_arm: dict[str, float]
    spread: float

    def seconds(self, arm: str, *, start: int, stop: int) -> float:
        """Of training an arm from step `start` to `stop` and scoring it."""
        return self.by_arm.get(arm, self.ratio) * _planned(self.plan, arm, stop - start)

    def task(self, task: Task) -> float:
        """Of one task."""
        return self.seconds(task.trial.arm, start=task.start, stop=self.plan.rungs[task.rung])

    def scoring(self, arm: str) -> float:
        """Of scoring an arm at a rung."""
        return self.seconds(arm, start=0, stop=0)

    def limit(self, expected: float) -> float:
        """What a task may cost at most before it has to stop: its 97.5 % quantile."""
        return expected * math.exp(1.96 * self.spread)


def _planned(plan: Plan, arm: str, steps: int) -> float:
    return plan.step_seconds * plan.arm(arm).cost * steps + plan.score_seconds


def costs_of(plan: Plan, study: Study) -> Costs:
    """What the study's own timings make of the plan's figures.

    Ratios are sums over sums; an arm's own counts n / (n + 2) after n tasks. Tasks that failed were
    not whole and count nothing, and so do those that were cut, unless they had taken longer by then
    than the whole ones say: then they count as if they had ended there.
    """
    known = sorted((e for e in study.ended if e.is_measured), key=lambda e: e.task.key)
    cut = sorted((e for e in study.ended if e.ended_by is EndedBy.PRUNER), key=lambda e: e.task.key)

    def planned_of(ended: Ended) -> float:
        return _planned(plan, ended.task.trial.arm, _steps(plan, ended.task))

    ratio = _ratio(known, [planned_of(ended) for ended in known])
    whole = known + [ended for ended in cut if ended.seconds > ratio * planned_of(ended)]
    if not whole:
        return Costs(plan, 1.0, {}, _UNTIMED_SPREAD)
    planned = [planned_of(ended) for ended in whole]
    ratio = _ratio(whole, planned)
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for ended, expected in zip(whole, planned, strict=True):
        sums[ended.task.trial.arm].append((ended.seconds, expected))
    by_arm = {}
    for name, pairs in sums.items():
        own = math.fsum(s for s, _ in pairs) / math.fsum(e for _, e in pairs)
        by_arm[name] = (len(pairs) * own + _TRUST * ratio) / (len(pairs) + _TRUST)
    return Costs(plan, ratio, by_arm, _spread(whole, planned, ratio))


def _ratio(whole: Sequence[Ended], planned: Sequence[float]) -> float:
    return math.fsum(e.seconds for e in whole) / math.fsum(planned) if whole else 1.0


def _steps(plan: Plan, task: Task) -> int:
    return plan.rungs[task.rung] - task.start


def _spread(whole: Sequence[Ended], planned: Sequence[float], ratio: float) -> float:
    """Root mean square of log(measured / expected), three tasks of the untimed spread added."""
    logs = [
        math.log(max(ended.seconds, 1e-9) / (ratio * expected))
        for ended, expected in zip(whole, planned, strict=True)
    ]
    square = math.fsum(min(x * x, 1.0) for x in logs) + 3 * _UNTIMED_SPREAD**2
    return max(_LEAST_SPREAD, math.sqrt(square / (len(logs) + 3)))


# ------------------------------------------------------------------- quotes


@dataclass(frozen=True)
class Quote:
    """What a search will have cost when it ends, and how long it will still take.

    `p50` and `p90` device seconds of the whole search, what is spent included; `low`, `high` 5 %
    and 95 % of them; `eta` and `eta_p90` wall seconds that are left with so many `workers`;
    `tasks` how many are left.
    """

    spent: float
    p50: float
    p90: float
    low: float
    high: float
    eta: float
    eta_p90: float
    tasks: int
    workers: int


@dataclass(frozen=True)
class _Left:
    """Tasks that are left: seconds of each, whether it may be saved, how many at each rung."""

    seconds: tuple[float, ...]
    maybe: tuple[bool, ...]
    chain: float


def quote(plan: Plan, study: Study, *, workers: int = 1) -> Quote:
    """Price and end of a search at this moment; before any training `study` is empty.

    Monte Carlo over what is left, with a seed of the plan: one common factor for how wrong the
    rates are, one for each task, and whether close finalists will need their second seed. The
    budget caps it. Time left is the larger of work over workers and of the longest chain of tasks
    that follow one another.

    Raises:
        InvalidInput: there are no workers.
    """
    if workers < 1:
        raise InvalidInput(f"a quote is for {workers} workers; expected 1 or more")
    costs = costs_of(plan, study)
    left = _left(plan, study, costs)
    timed = sum(ended.is_measured for ended in study.ended)
    rng = np.random.default_rng(_bits(f"quote:{plan.seed}"))
    common = np.exp(rng.normal(0.0, costs.spread / math.sqrt(1 + timed), size=_DRAWS))
    each = np.exp(rng.normal(0.0, costs.spread, size=(_DRAWS, len(left.seconds))))
    run = ~np.array(left.maybe, dtype=bool) | (rng.random((_DRAWS, 1)) < _REPEATED)
    rest = common * ((np.array(left.seconds) * each) * run).sum(axis=1)
    total = study.spent_seconds + rest
    if plan.budget.gpu_seconds is not None:
        total = np.minimum(total, max(plan.budget.gpu_seconds, study.spent_seconds))
    if plan.budget.deadline_seconds is not None:
        until = max(plan.budget.deadline_seconds - study.elapsed_seconds, 0.0)
        total = np.minimum(total, study.spent_seconds + workers * until)
    times = np.maximum((total - study.spent_seconds) / workers, common * left.chain)
    if plan.budget.deadline_seconds is not None:
        times = np.minimum(times, until)
    low, p50, p90, high = (float(x) for x in np.quantile(total, [0.05, 0.5, 0.9, 0.95]))
    eta, eta_p90 = (float(x) for x in np.quantile(times, [0.5, 0.9]))
    return Quote(
        spent=study.spent_seconds, p50=p50, p90=p90, low=low, high=high, eta=eta, eta_p90=eta_p90,
        tasks=len(left.seconds), workers=workers,
    )  # fmt: skip


def _bits(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass
class _Bill:
    """What a search still has to pay for; `room` is how many trials it may still begin."""

    room: float
    seconds: list[float] = field(default_factory=list)
    maybe: list[bool] = field(default_factory=list)

    def add(
        self, number: float, seconds: float, *, begins: bool = False, maybe: bool = False
    ) -> int:
        """Put down so many tasks, or as many as may be begun; return how many."""
        count = max(0, int(min(number, self.room) if begins else number))
        self.room -= count if begins else 0
        self.seconds += [seconds] * count
        self.maybe += [maybe] * count
        return count


class _Done:
    """Tasks of a study counted: all, those that may still go on, those of trials not ruled out.

    By rung, whether it is plain DPO's, and how it came there: `""` from the rung below (or
    screening), `draw` as a drawn setting, `hand` as one that was asked for, `repeat` with another
    seed.
    """

    def __init__(self, plan: Plan, study: Study) -> None:
        self.started: dict[tuple[int, bool, str], int] = defaultdict(int)
        self.usable: dict[tuple[int, bool, str], int] = defaultdict(int)
        self.kept: dict[tuple[int, bool, str], int] = defaultdict(int)
        failed, out = failed_tasks(plan, study), ruled_out(plan, study)
        for task in study.tasks:
            key = (task.rung, task.trial.arm == plan.plain.name, _kind(task))
            self.started[key] += 1
            self.usable[key] += task.key not in failed
            self.kept[key] += task.trial.key not in out


def _kind(task: Task) -> str:
    if task.trial.repeat:
        return "repeat"
    if task.start or not task.trial.draw:
        return ""
    return "hand" if task.trial.origin is Origin.HAND else "draw"


def _left(plan: Plan, study: Study, costs: Costs) -> _Left:
    """What the shape still asks for, trial by trial, as if every trial to come went well.

    Which arms will be promoted is not known: their tasks cost the mean of the screened arms, plain
    DPO's its own.
    """
    plain, shape, steps = plan.plain.name, plan.shape, [0, *plan.rungs]
    others = [arm.name for arm in plan.screened if not arm.is_plain] or [plain]
    limit, done = plan.budget.trials, _Done(plan, study)
    bill = _Bill(math.inf if limit is None else limit - len({t.trial.key for t in study.tasks}))

    def mean(start: int, stop: int) -> float:
        found = [costs.seconds(name, start=start, stop=stop) for name in others]
        return math.fsum(found) / len(found)

    for task in (*study.waiting, *(running.task for running in study.running)):
        bill.add(1, costs.task(task))
    # How many there are, or will be, at the rung below that may go on.
    there = {is_plain: done.usable[0, is_plain, ""] for is_plain in (True, False)}
    screened = {task.trial.arm for task in study.tasks if task.rung == 0 and not task.trial.draw}
    for arm in plan.screened:
        if arm.name not in screened:
            seconds = costs.seconds(arm.name, start=0, stop=steps[1])
            there[arm.is_plain] += bill.add(1, seconds, begins=True)
    leading = {False: min(shape.leading, there[False]), True: min(1, there[True])}
    drawn = {}
    for is_plain in (False, True):
        key, to = (plan.draw_rung, is_plain, "draw"), steps[plan.draw_rung + 1]
        seconds = costs.seconds(plain, start=0, stop=to) if is_plain else mean(0, to)
        missing = leading[is_plain] * shape.draws - done.started[key]
        asked = done.usable[plan.draw_rung, is_plain, "hand"]
        drawn[is_plain] = asked + done.usable[key] + bill.add(missing, seconds, begins=True)
    for rung in range(1, plan.last + 1):
        for is_plain, places in ((False, shape.kept[rung - 1]), (True, 1)):
            below = there[is_plain] + (drawn[is_plain] if plan.draw_rung == rung - 1 else 0)
            key = (rung, is_plain, "")
            free = places_left(places, done.started[key], done.usable[key])
            missing = min(free, below - done.kept[key])
            way = {"start": steps[rung], "stop": steps[rung + 1]}
            seconds = costs.seconds(plain, **way) if is_plain else mean(**way)
            there[is_plain] = done.usable[key] + bill.add(missing, seconds)
    repeated = done.started[plan.last, False, "repeat"] + done.started[plan.last, True, "repeat"]
    missing = min(shape.repeats, there[False] + there[True]) - repeated
    bill.add(missing, mean(0, steps[-1]), begins=True, maybe=True)
    return _Left(tuple(bill.seconds), tuple(bill.maybe), _chain(plan, study, costs))


def _chain(plan: Plan, study: Study, costs: Costs) -> float:
    """Seconds of one trial that still has to go through every rung that nothing has reached."""
    reached = max((ended.task.rung for ended in study.ended), default=-1)
    if reached >= plan.last:
        return 0.0
    start = 0 if reached < 0 else plan.rungs[reached]
    rungs = plan.last - reached
    train = costs.ratio * plan.step_seconds * (plan.rungs[-1] - start)
    return train + costs.ratio * plan.score_seconds * rungs


# ------------------------------------------------------------------- shapes


def plan_search(
    *,
    arms: Sequence[Arm],
    rungs: Sequence[int],
    budget: Budget,
    seed: int,
    step_seconds: float,
    score_seconds: float,
    drift_budget: float | None = None,
    pool: Sequence[Setting] = (),
    shape: str | None = None,
    workers: int = 1,
) -> tuple[str, Plan]:
    """A plan in the shape of that name, or in the one that its budget pays, with the name.

    `workers` is how many will share the work, which tells what can be done until a deadline.

    Raises:
        InvalidInput: there is no such shape, or arms or rungs cannot be a plan's (see `Plan`).
    """
    if shape is not None and shape not in SHAPES:
        raise InvalidInput(f"shape {shape!r} is unknown; expected one of {list(SHAPES)}")
    plan = Plan(
        arms=tuple(arms), rungs=tuple(rungs), budget=budget, seed=seed,
        step_seconds=step_seconds, score_seconds=score_seconds, drift_budget=drift_budget,
        pool=tuple(pool),
        shape=Shape(screened=1, kept=(1,) * (len(rungs) - 1), leading=0, draws=0, repeats=0),
    )  # fmt: skip
    return fit_shape(plan, workers=workers) if shape is None else (shape, shaped(plan, shape))


def fit_shape(plan: Plan, *, workers: int = 1) -> tuple[str, Plan]:
    """The plan in the dearest shape that its budget is expected to pay, with the shape's name.

    What is left goes into more of what the next dearer one has, finalists first. Second seeds of
    finalists are not counted: they are trained if something is left. The cheapest shape where none
    fits, the usual one without limits; the shape that the plan has is not looked at.
    """
    if plan.budget == Budget():
        return "usual", shaped(plan, "usual")
    dearer = None
    for name in SHAPES:
        tried = shaped(plan, name)
        if _pays(tried, workers=workers):
            return name, tried if dearer is None else _widened(tried, dearer, workers=workers)
        dearer = tried.shape
    return "least", shaped(plan, "least")


def _pays(plan: Plan, *, workers: int) -> bool:
    """Whether a plan's budget is expected to pay for its shape, second seeds aside."""
    budget, shape = plan.budget, plan.shape
    left = _left(plan, Study(), costs_of(plan, Study()))
    price = math.fsum(s for s, maybe in zip(left.seconds, left.maybe, strict=True) if not maybe)
    trials = 1 + shape.screened + (1 + shape.leading) * shape.draws
    return (
        price <= (budget.gpu_seconds or math.inf)
        and trials <= (budget.trials or math.inf)
        and max(left.chain, price / workers) <= (budget.deadline_seconds or math.inf)
    )


def _widened(plan: Plan, dearer: Shape, *, workers: int) -> Plan:
    """The plan with as much of a dearer shape as its budget pays: the longest runs first.

    What tells is the last rung: of finalists as many as any shape has.
    """
    for k in reversed(range(plan.last)):
        most = MOST_FINALISTS if k == plan.last - 1 else dearer.kept[k]
        while (kept := plan.shape.kept)[k] < most:
            tried = replace(plan.shape, kept=(*kept[:k], kept[k] + 1, *kept[k + 1 :]))
            if not _pays(wider := replace(plan, shape=tried), workers=workers):
                break
            plan = wider
    for name in ("draws", "leading", "screened"):
        while (number := getattr(plan.shape, name)) < getattr(dearer, name):
            tried = replace(plan.shape, **{name: number + 1})
            if not _pays(wider := replace(plan, shape=tried), workers=workers):
                break
            plan = wider
    return plan
