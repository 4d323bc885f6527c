"""Strategies on a world, each with the same budget: ours, those of Optuna, and plain ones.

A budget and a cost are in runs of plain DPO at full length. A strategy is charged for every step
that it makes and may make no step that its budget does not hold.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from bench.search_world import World
from core.lifecycle import EndedBy
from selection.draws import REACH, RECOMMENDED, Setting
from selection.quote import plan_search
from selection.rungs import Answer, answer, decide
from selection.study import Budget, Ended, Plan, Running, Start, Study, Trial
from selection.winner import FinishedTrial, select_winner

_CONTINUOUS = ("learning_rate", "beta", "gamma", "alpha")
_ETA = 3


@dataclass(frozen=True)
class Pick:
    """What a strategy ended with, and what it paid."""

    arm: str
    setting: Setting
    cost: float


Strategy = Callable[[World, float, int], Pick]


# ---------------------------------------------------------------------- ours


def plan_of(world: World, *, budget: float | None, seed: int, shape: str | None = None) -> Plan:
    """Our plan on a world: the shape of that name, or the one that the budget pays."""
    _, plan = plan_search(
        arms=world.arms, rungs=world.rungs, budget=Budget(gpu_seconds=budget), seed=seed,
        step_seconds=1.0 / world.whole, score_seconds=0.0, pool=world.pool, shape=shape,
    )  # fmt: skip
    if world.repeats == 0:
        plan = replace(plan, shape=replace(plan.shape, repeats=0))
    return plan


@dataclass(frozen=True)
class Replayed:
    """A whole search: its plan, its end, the wall time of it, and the most it had running."""

    plan: Plan
    study: Study
    wall: float


def replay(world: World, plan: Plan, *, workers: int = 1) -> Replayed:
    """Run our search with so many workers on a clock of its own; costs are exactly the steps'."""
    ended: list[Ended] = []
    going: list[tuple[float, int, Start]] = []
    clock, number = 0.0, 0
    while True:
        study = Study(
            ended=tuple(ended),
            running=tuple(Running(s.task, s.limit_seconds) for _, _, s in going),
            elapsed_seconds=clock,
        )
        action = decide(plan, study) if len(going) < workers else None
        if isinstance(action, Start):
            steps = action.stop - action.task.start
            until = clock + world.cost(action.task.trial.arm, steps)
            heapq.heappush(going, (until, number, action))
            number += 1
            continue
        if not going:
            return Replayed(plan, study, clock)
        clock, _, start = heapq.heappop(going)
        ended.append(_ended(world, start))


def _ended(world: World, start: Start) -> Ended:
    task = start.task
    trial = task.trial
    seconds = world.cost(trial.arm, start.stop - task.start)
    shown = world.show(trial.arm, trial.setting, task.rung, trial.repeat)
    if not math.isfinite(shown.log_loss):
        return Ended(task, EndedBy.NAN, seconds)
    return Ended(task, EndedBy.BUDGET, seconds, log_loss=shown.log_loss, drift=shown.drift)


def ours(world: World, budget: float, seed: int) -> Pick:
    """Our search with one worker, in the shape that the budget pays, and whom it lets win."""
    plan = plan_of(world, budget=budget, seed=seed)
    done = replay(world, plan)
    found = answer(plan, done.study)
    trial = _winner(world, found) or found.trial
    return Pick(trial.arm, trial.setting, done.study.spent_seconds)


def _winner(world: World, found: Answer) -> Trial | None:
    """Whom a job chooses of the trials that came furthest; None where no losses are recorded."""
    if world.losses is None or world.group is None or found.rung is None:
        return None
    trials = [ended.task.trial for ended in found.compared]
    losses = [world.losses(trial.arm, trial.setting, found.rung) for trial in trials]
    results = [
        FinishedTrial(
            number=number,
            label=trials[number].arm,
            log_losses={0: float(seen.mean())},
            drift=found.compared[number].drift,
            feasible=True,
            losses=seen[None],
        )
        for number, seen in enumerate(losses)
        if seen is not None
    ]
    pairs = min(seen.size for seen in losses if seen is not None)
    winner = select_winner(results, world.group[:pairs]).winner
    return None if winner is None else trials[winner]


# --------------------------------------------------------------------- plain


def _best(found: Sequence[tuple[float, str, Setting]]) -> tuple[str, Setting]:
    _, arm, setting = min(found, key=lambda entry: entry[0])
    return arm, setting


def grid(world: World, *, settings: int) -> Pick:
    """Every arm at the first so many settings of the grid, all at full length."""
    last = len(world.rungs) - 1
    found = [
        (world.show(arm.name, setting, last, 0).log_loss, arm.name, setting)
        for arm in world.arms
        for setting in world.grid[:settings]
    ]
    return Pick(*_best(found), world.grid_cost(settings=settings))


def first_guess(world: World, budget: float, seed: int) -> Pick:
    """The pair that metrics put first, untried."""
    arm = next(arm for arm in world.arms if not arm.is_plain)
    return Pick(arm.name, RECOMMENDED, 0.0)


def random_full(world: World, budget: float, seed: int) -> Pick:
    """Arms and settings by lot, each at full length, until the budget is spent."""
    rng = np.random.default_rng(seed)
    found: list[tuple[float, str, Setting]] = []
    cost, last = 0.0, len(world.rungs) - 1
    while True:
        arm = world.arms[int(rng.integers(len(world.arms)))]
        setting = _by_lot(world, rng)
        price = world.cost(arm.name, world.whole)
        if cost + price > budget:
            break
        cost += price
        found.append((world.show(arm.name, setting, last, 0).log_loss, arm.name, setting))
    if not found:
        return Pick(arm.name, setting, 0.0)
    return Pick(*_best(found), cost)


def _by_lot(world: World, rng: np.random.Generator) -> Setting:
    if world.pool:
        return world.pool[int(rng.integers(len(world.pool)))]
    factors = np.exp(rng.uniform(-math.log(REACH), math.log(REACH), size=4))
    return _setting(dict(zip(_CONTINUOUS, np.clip(factors, 1 / REACH, REACH), strict=True)))


def short_top(world: World, budget: float, seed: int) -> Pick:
    """Every arm as recommended up to a short rung, the best as far as money goes to the end.

    The longest of the rungs at which half of the budget pays for all arms, the first if none.
    """
    screens = [
        math.fsum(world.cost(arm.name, step) for arm in world.arms) for step in world.rungs[:-1]
    ]
    rung = max([k for k, price in enumerate(screens) if price <= budget / 2] or [0])
    order = sorted(
        (world.show(arm.name, RECOMMENDED, rung, 0).log_loss, i, arm.name)
        for i, arm in enumerate(world.arms)
    )
    cost = screens[rung]
    found: list[tuple[float, str, Setting]] = []
    for _, _, name in order:
        price = world.cost(name, world.whole - world.rungs[rung])
        if cost + price > budget:
            break
        cost += price
        shown = world.show(name, RECOMMENDED, len(world.rungs) - 1, 0)
        found.append((shown.log_loss, name, RECOMMENDED))
    if not found:
        return Pick(order[0][2], RECOMMENDED, cost)
    return Pick(*_best(found), cost)


# -------------------------------------------------------------------- Optuna


def _setting(factors: dict[str, float]) -> Setting:
    return Setting(**{name: float(value) for name, value in factors.items()})


def _nearest(pool: Sequence[Setting], setting: Setting) -> Setting:
    """The setting of the pool that is nearest in log factors; itself where there is no pool."""
    if not pool:
        return setting
    point = np.array(setting.point)
    away = [float(np.sum((np.array(other.point) - point) ** 2)) for other in pool]
    return pool[int(np.argmin(away))]


def _optuna(world: World, budget: float, sampler: BaseSampler, pruner: BasePruner) -> Pick:
    """A study as a user of Optuna would write it: two categorical names, log-uniform factors.

    Trials report at every rung and are pruned when Optuna says so; one that the budget does not
    hold ends the study. Its best complete trial counts, else the best of those that came furthest.
    Rung k is reported as 3^k: its halving pruners decide at powers of 3 and would pass over rungs
    that lie between.
    """
    # HyperbandPruner draws brackets from the name, which would be a new one every time.
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name=world.name)
    names = [arm.name for arm in world.arms]
    tunes = len(world.grid) > 1
    cost = 0.0
    seen: list[tuple[int, float, str, Setting]] = []
    while True:
        trial = study.ask()
        name = trial.suggest_categorical("pair", names)
        setting = RECOMMENDED
        if tunes:
            factors = {f: trial.suggest_float(f, 1 / REACH, REACH, log=True) for f in _CONTINUOUS}
            setting = _nearest(world.pool, _setting(factors))
        at, state = 0, optuna.trial.TrialState.COMPLETE
        value = math.inf
        for rung, step in enumerate(world.rungs):
            price = world.cost(name, step - at)
            if cost + price > budget:
                return _furthest(world, seen, name, setting, cost)
            cost += price
            at = step
            value = world.show(name, setting, rung, 0).log_loss
            seen.append((rung, value, name, setting))
            trial.report(value, _ETA**rung)
            if rung < len(world.rungs) - 1 and trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        told = value if state is optuna.trial.TrialState.COMPLETE else None
        study.tell(trial, told, state=state)


def _furthest(
    world: World,
    seen: Sequence[tuple[int, float, str, Setting]],
    name: str,
    setting: Setting,
    cost: float,
) -> Pick:
    if not seen:
        return Pick(name, setting, cost)
    _, _, arm, best = min(seen, key=lambda entry: (-entry[0], entry[1]))
    return Pick(arm, best, cost)


def tpe(world: World, budget: float, seed: int) -> Pick:
    """Optuna's TPE with its defaults and the MedianPruner."""
    return _optuna(world, budget, TPESampler(seed=seed), MedianPruner())


def asha(world: World, budget: float, seed: int) -> Pick:
    """Optuna's SuccessiveHalvingPruner (asynchronous) over random trials, from the first rung."""
    pruner = SuccessiveHalvingPruner(min_resource=1, reduction_factor=_ETA)
    return _optuna(world, budget, RandomSampler(seed=seed), pruner)


def hyperband(world: World, budget: float, seed: int) -> Pick:
    """Optuna's HyperbandPruner over TPE, from the first rung to full length."""
    last = len(world.rungs) - 1
    pruner = HyperbandPruner(min_resource=1, max_resource=_ETA**last, reduction_factor=_ETA)
    return _optuna(world, budget, TPESampler(seed=seed), pruner)


STRATEGIES: dict[str, Strategy] = {
    "ours": ours,
    "random": random_full,
    "TPE + MedianPruner": tpe,
    "ASHA": asha,
    "Hyperband": hyperband,
    "one short run each, top K": short_top,
    "metrics alone": first_guess,
}
