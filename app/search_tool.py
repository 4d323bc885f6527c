"""The process that plans, prices and compares searches, so that the API does not load numpy.

`python -m app.search_tool` reads one task as JSON from its standard input, writes the answer to its
standard output, and ends.
"""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import assert_never

import numpy as np
import orjson
from pydantic import TypeAdapter

from app.search_tasks import (
    Basis,
    GainFound,
    LimitsFound,
    LimitsTask,
    QuoteTask,
    RaceFound,
    Racer,
    RaceTask,
    SearchTask,
    SettingFound,
    SettingRefused,
    SettingTask,
)
from core.errors import InvalidInput
from core.run_spec import CandidateSpec
from core.spec import PenaltyTerm
from selection.draws import REACH, RECOMMENDED, Setting, candidate_at
from selection.quote import fit_shape, quote
from selection.shapes import shaped
from selection.study import Arm, Budget
from selection.ties import Entrant, Floats, Ints, on_level
from selection.winner import FinishedTrial, paired_error, select_winner
from selection.wire import (
    TaskFacts,
    plan_from_json,
    plan_to_json,
    setting_from_json,
    setting_to_json,
    study_of,
)

_Z = 1.959963984540054
"""97.5 % of a normal distribution lies below it."""
_LOW, _HIGH = 0.05, 0.95
_FACTS: TypeAdapter[tuple[TaskFacts, ...]] = TypeAdapter(tuple[TaskFacts, ...])


def answer(task: QuoteTask | LimitsTask | SettingTask | RaceTask) -> bytes:
    """Return what a task asks for, as JSON."""
    match task:
        case QuoteTask():
            return orjson.dumps(_quote(task))
        case LimitsTask():
            return _limits(task).model_dump_json().encode()
        case SettingTask():
            return _setting(task).model_dump_json().encode()
        case RaceTask():
            return _race(task).model_dump_json().encode()
        case _:
            assert_never(task)


def _quote(task: QuoteTask) -> dict[str, float]:
    facts = _FACTS.validate_python(task.facts)
    study = study_of(facts, elapsed_seconds=task.elapsed_seconds)
    return asdict(quote(plan_from_json(task.plan), study, workers=task.workers))


def _limits(task: LimitsTask) -> LimitsFound:
    budget = Budget(
        gpu_seconds=task.gpu_seconds,
        trials=task.max_trials,
        deadline_seconds=task.deadline_seconds,
    )
    plan = replace(plan_from_json(task.plan), budget=budget)
    if task.shape is None:
        shape, plan = fit_shape(plan, workers=task.workers)
    else:
        shape, plan = task.shape, shaped(plan, task.shape)
    return LimitsFound(shape=shape, plan=plan_to_json(plan))


# ------------------------------------------------------------------ settings


def _setting(task: SettingTask) -> SettingFound | SettingRefused:
    plan = plan_from_json(task.plan)
    try:
        arm = plan.arm(task.arm)
        setting = _factors(arm, task)
        candidate = candidate_at(arm.candidate, setting)
        _refuse_clipped(arm, setting, candidate)
    except InvalidInput as refused:
        return SettingRefused(detail=refused.message, param=refused.param)
    return SettingFound(
        setting=setting_to_json(setting), candidate=candidate, rung=plan.draw_rung,
        recommended=setting == RECOMMENDED,
    )  # fmt: skip


def _values(candidate: CandidateSpec) -> dict[str, float]:
    """The strengths that a candidate has."""
    objective = candidate.objective
    found = {"learning_rate": candidate.learning_rate, "beta": objective.beta}
    if objective.kernel_term is not None:
        found["gamma"] = objective.kernel_term.gamma
    if isinstance(objective.divergence_term, PenaltyTerm):
        found["alpha"] = objective.divergence_term.alpha
    return found


def _factors(arm: Arm, task: SettingTask) -> Setting:
    """The setting that was asked for.

    Raises:
        InvalidInput: the arm has no such strength, or it is out of reach.
    """
    recommended, factors = _values(arm.candidate), {}
    for name, value in task.strengths.model_dump(exclude={"mixture"}, exclude_none=True).items():
        if name not in recommended:
            raise InvalidInput(
                f"{name} has no meaning for {arm.name}, which has {list(recommended)}",
                param=name,
            )
        factor = value / recommended[name] if task.absolute else value
        if not 1.0 / REACH <= factor <= REACH:
            low, high = recommended[name] / REACH, recommended[name] * REACH
            raise InvalidInput(
                f"{name} is {factor:.4g} times the {recommended[name]:.4g} that is recommended for "
                f"{arm.name}; expected 1/{REACH:.0f} to {REACH:.0f} times, {low:.4g} to {high:.4g}",
                param=name,
            )
        factors[name] = factor
    mixture = task.strengths.mixture
    if mixture is not None:
        if not arm.learns_mixture:
            raise InvalidInput(
                f"mixture holds weights of HMK, and {arm.name} has another kernel",
                param="mixture",
            )
        if not all(_LOW <= weight <= _HIGH for weight in mixture):
            raise InvalidInput(
                f"mixture is {list(mixture)}; expected weights of {_LOW} to {_HIGH}",
                param="mixture",
            )
    base = RECOMMENDED if task.base is None else setting_from_json(task.base)
    return replace(base, **factors, mixture=base.mixture if mixture is None else mixture)


def _refuse_clipped(arm: Arm, setting: Setting, candidate: CandidateSpec) -> None:
    """Refuse what the range of the search would change.

    Raises:
        InvalidInput: a strength would not be the one that was asked for.
    """
    there = _values(candidate)
    for name, value in _values(arm.candidate).items():
        wanted = value * getattr(setting, name)
        if not math.isclose(wanted, there[name], rel_tol=1e-9):
            raise InvalidInput(
                f"{name} would be {wanted:.4g}, outside of the range of the search, whose nearest "
                f"value is {there[name]:.4g}",
                param=name,
            )


# ---------------------------------------------------------------------- race


def _race(task: RaceTask) -> RaceFound:
    groups = _read(task.groups)
    group = None if groups is None else np.array(groups, dtype=np.int64)
    losses = {racer.number: _losses(racer) for racer in task.racers}
    by_number = {racer.number: racer for racer in task.racers}
    found = select_winner([_finished(r, task, losses) for r in task.racers], group)
    usable = [losses[r.number] for r in task.racers if r.feasible]
    is_paired = group is not None and all(each is not None for each in usable)
    basis: Basis = "paired" if is_paired else "independent"
    winner = found.winner if task.verdict is None else task.verdict
    gain = None
    if winner in by_number and task.baseline is not None and winner != task.baseline:
        pairs = {} if group is None else _on_level(task, losses)
        gain = _gain(by_number[winner], by_number[task.baseline], pairs, group)
    return RaceFound(
        winner=winner, tied=found.tied, basis=None if found.winner is None else basis,
        reason=found.reason, gain=gain,
    )  # fmt: skip


def _losses(racer: Racer) -> Floats | None:
    """Losses (seeds, pairs) of a configuration; None where a file is missing."""
    found = [_read(file) for file in racer.files]
    there = [each for each in found if each is not None]
    return np.array(there, dtype=np.float64) if there and len(there) == len(found) else None


def _read(file: str | None) -> list[float] | None:
    if file is None:
        return None
    try:
        text = Path(file).read_bytes()
    except FileNotFoundError:  # the job has ended, and its trials were just removed
        return None
    found: list[float] = orjson.loads(text)
    return found


def _finished(racer: Racer, task: RaceTask, losses: dict[int, Floats | None]) -> FinishedTrial:
    usable = [each for each in task.racers if each.feasible]
    best = min(usable, key=lambda each: (each.log_loss, each.number), default=racer)
    return FinishedTrial(
        number=racer.number,
        label=racer.label,
        log_losses=racer.log_losses,
        drift=racer.drift,
        feasible=racer.feasible,
        standard_error=0.0 if racer is best else _independent(racer, best) or 0.0,
        losses=losses[racer.number],
    )


def _independent(one: Racer, other: Racer) -> float | None:
    """Standard error of the difference of independent trials; None where one has none."""
    if one.standard_error is None or other.standard_error is None:
        return None
    return math.hypot(one.standard_error, other.standard_error)


def _on_level(task: RaceTask, losses: dict[int, Floats | None]) -> dict[int, Floats]:
    """Losses of pairs on one level of seeds, by the number of the configuration."""
    there = [(r, found) for r in task.racers if (found := losses[r.number]) is not None]
    if not there:
        return {}
    entrants = [Entrant(r.number, found, tuple(r.log_losses)) for r, found in there]
    return dict(zip([e.number for e in entrants], on_level(entrants), strict=True))


def _gain(best: Racer, baseline: Racer, pairs: dict[int, Floats], group: Ints | None) -> GainFound:
    value, error = baseline.log_loss - best.log_loss, _independent(best, baseline)
    basis: Basis = "independent"
    if group is not None and {best.number, baseline.number} <= pairs.keys():
        error, basis = paired_error(pairs[baseline.number] - pairs[best.number], group), "paired"
    if error is None:
        return GainFound(log_loss=value, low=None, high=None, basis=None)
    return GainFound(log_loss=value, low=value - _Z * error, high=value + _Z * error, basis=basis)


def main() -> None:
    """Answer the task of the standard input."""
    adapter: TypeAdapter[QuoteTask | LimitsTask | SettingTask | RaceTask] = TypeAdapter(SearchTask)
    sys.stdout.buffer.write(answer(adapter.validate_json(sys.stdin.buffer.read())))


if __name__ == "__main__":
    main()
