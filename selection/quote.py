"""What a search will cost: of one task, of all that is left, and which shape a budget can pay.

Seconds are device seconds. Before anything is timed they come from the plan's own figures; after
that, the ratio of measured to expected moves them, of each arm as far as it has been timed.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.errors import InvalidInput
from selection.draws import RECOMMENDED, Setting
from selection.study import Arm, Budget, Ended, Plan, Shape, Study, Task

SHAPES: dict[str, Shape] = {
    "wide": Shape(28 + 7, (16, 10, 4), leading=4, draws=4, repeats=3),
    "usual": Shape(28 + 7, (12, 7, 3), leading=2, draws=2, repeats=2),
    "lean": Shape(28 + 7, (8, 5, 2), leading=2, draws=2, repeats=0),
    "narrow": Shape(14, (5, 3, 1), leading=1, draws=2, repeats=0),
    "few": Shape(6, (3, 2, 1), leading=1, draws=2, repeats=0),
    "least": Shape(3, (2, 1, 1), leading=1, draws=1, repeats=0),
}
"""From the dearest to the cheapest, over four rungs (docs/search.md)."""

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

    def limit(self, expected: float) -> float:
        """What a task may cost at most before it has to stop: its 97.5 % quantile."""
        return expected * math.exp(1.96 * self.spread)


def _planned(plan: Plan, arm: str, steps: int) -> float:
    return plan.step_seconds * plan.arm(arm).cost * steps + plan.score_seconds


def costs_of(plan: Plan, study: Study) -> Costs:
    """What the study's own timings make of the plan's figures.

    Ratios are sums over sums; an arm's own counts n / (n + 2) after n tasks. Tasks that were cut
    or failed were not whole and count nothing.
    """
    whole = sorted((e for e in study.ended if e.is_measured), key=lambda e: e.task.key)
    if not whole:
        return Costs(plan, 1.0, {}, _UNTIMED_SPREAD)
    planned = [_planned(plan, e.task.trial.arm, _steps(plan, e.task)) for e in whole]
    ratio = math.fsum(e.seconds for e in whole) / math.fsum(planned)
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for ended, expected in zip(whole, planned, strict=True):
        sums[ended.task.trial.arm].append((ended.seconds, expected))
    by_arm = {}
    for name, pairs in sums.items():
        own = math.fsum(s for s, _ in pairs) / math.fsum(e for _, e in pairs)
        by_arm[name] = (len(pairs) * own + _TRUST * ratio) / (len(pairs) + _TRUST)
    return Costs(plan, ratio, by_arm, _spread(whole, planned, ratio))


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
    """
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
    times = np.maximum((total - study.spent_seconds) / workers, common * left.chain)
    if plan.budget.deadline_seconds is not None:
        until = max(plan.budget.deadline_seconds - study.elapsed_seconds, 0.0)
        times = np.minimum(times, until)
    low, p50, p90, high = (float(x) for x in np.quantile(total, [0.05, 0.5, 0.9, 0.95]))
    eta, eta_p90 = (float(x) for x in np.quantile(times, [0.5, 0.9]))
    return Quote(
        spent=study.spent_seconds, p50=p50, p90=p90, low=low, high=high, eta=eta, eta_p90=eta_p90,
        tasks=len(left.seconds), workers=workers,
    )  # fmt: skip


def _bits(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _left(plan: Plan, study: Study, costs: Costs) -> _Left:
    """What the shape still asks for, trial by trial, as if every trial went well.

    Which arms will be promoted is not known: their tasks cost the mean of the screened arms, plain
    DPO's its own.
    """
    others = [arm.name for arm in plan.screened if not arm.is_plain]
    plain, shape, rungs = plan.plain.name, plan.shape, plan.rungs
    seconds = [costs.task(task) for task in study.waiting]
    seconds += [costs.task(running.task) for running in study.running]
    there = {(task.rung, task.trial.arm == plain) for task in study.tasks}
    counts: dict[tuple[int, bool, str], int] = defaultdict(int)
    for task in study.tasks:
        kind = (
            "repeat" if task.trial.repeat else "draw" if task.start == 0 < task.trial.draw else ""
        )
        counts[task.rung, task.trial.arm == plain, kind] += 1

    def mean(start: int, stop: int) -> float:
        found = [costs.seconds(name, start=start, stop=stop) for name in others or [plain]]
        return math.fsum(found) / len(found)

    screened = {task.trial.arm for task in study.tasks if task.rung == 0 and not task.trial.draw}
    seconds += [
        costs.seconds(arm.name, start=0, stop=rungs[0])
        for arm in plan.screened
        if arm.name not in screened
    ]
    steps = [0, *rungs]
    available = min(len(others), shape.screened)
    for rung in range(1, plan.last + 1):
        draws = shape.leading * shape.draws if rung - 1 == plan.draw_rung else 0
        available = min(shape.kept[rung - 1], available + draws)
        seconds += [mean(steps[rung], steps[rung + 1])] * max(
            0, available - counts[rung, False, ""]
        )
        if (rung, True) not in there:
            seconds.append(costs.seconds(plain, start=steps[rung], stop=steps[rung + 1]))
    to = rungs[plan.draw_rung]
    drawn = max(
        0, min(shape.leading, len(others)) * shape.draws - counts[plan.draw_rung, False, "draw"]
    )
    seconds += [mean(0, to)] * drawn
    seconds += [costs.seconds(plain, start=0, stop=to)] * max(
        0, shape.draws - counts[plan.draw_rung, True, "draw"]
    )
    repeats = max(
        0,
        min(shape.repeats, available + 1)
        - counts[plan.last, False, "repeat"]
        - counts[plan.last, True, "repeat"],
    )
    maybe = [False] * len(seconds) + [True] * repeats
    seconds += [mean(0, rungs[-1])] * repeats
    return _Left(tuple(seconds), tuple(maybe), _chain(plan, study, costs))


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
) -> tuple[str, Plan]:
    """A plan in the shape of that name, or in the one that its budget pays, with the name.

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
    return fit_shape(plan) if shape is None else (shape, shaped(plan, shape))


def fit_shape(plan: Plan) -> tuple[str, Plan]:
    """The plan in the dearest shape that its budget is expected to pay, with the shape's name.

    Second seeds of finalists are not counted: they are trained if something is left. The cheapest
    shape where none fits, the usual one without limits; the shape that the plan has is not looked
    at.
    """
    budget = plan.budget
    if budget == Budget():
        return "usual", shaped(plan, "usual")
    for name in SHAPES:
        tried = shaped(plan, name)
        left = _left(tried, Study(), costs_of(tried, Study()))
        price = math.fsum(s for s, maybe in zip(left.seconds, left.maybe, strict=True) if not maybe)
        shape = tried.shape
        trials = 1 + shape.screened + (1 + shape.leading) * shape.draws
        if (
            price <= (budget.gpu_seconds or math.inf)
            and trials <= (budget.trials or math.inf)
            and left.chain <= (budget.deadline_seconds or math.inf)
        ):
            return name, tried
    return "least", shaped(plan, "least")


def shaped(plan: Plan, name: str) -> Plan:
    """The plan in a named shape, fitted to its arms and rungs.

    With fewer rungs than four the last number is still that of the finalists; with more, what is
    kept falls geometrically between those given. A pool allows as many draws as it has settings.
    """
    shape, others = SHAPES[name], len(plan.arms) - 1
    if plan.last == 0:
        kept: tuple[int, ...] = ()
    elif plan.last <= 3:
        kept = (*shape.kept[: plan.last - 1], shape.kept[-1])
    else:
        where = np.linspace(0.0, 2.0, plan.last)
        logs = np.interp(where, [0.0, 1.0, 2.0], np.log(shape.kept))
        kept = tuple(max(1, round(math.exp(x))) for x in logs)
    draws = shape.draws
    if plan.pool:
        draws = min(draws, sum(setting != RECOMMENDED for setting in plan.pool))
    fitted = replace(
        shape,
        draws=draws,
        screened=max(1, min(shape.screened, others)),
        kept=kept,
        leading=min(shape.leading, others),
    )
    return replace(plan, shape=fitted)
