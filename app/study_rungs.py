"""Trials of a search rung by rung: what compares with what, in plain Python for quick answers."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.lifecycle import EndedBy
from core.run_spec import CandidateSpec
from core.seeds import levels
from models.repositories.studies import Measurement

_NO_FAULT = (None, EndedBy.BUDGET, EndedBy.PRUNER)


@dataclass(frozen=True)
class Config:
    """A configuration at a rung: one measurement of each seed, the search's own seed first.

    It is known by the number of its first trial. `log_loss` is on the level of the search's own
    seed (`core.seeds.levels`); `drift` is the largest over seeds, None where one is unknown;
    `feasible`: it may win, also by what it showed at longer rungs.
    """

    seeds: tuple[Measurement, ...]
    log_loss: float
    drift: float | None
    feasible: bool

    @property
    def number(self) -> int:
        """Number of the trial with the search's own seed."""
        return self.seeds[0].number

    @property
    def gpu_seconds(self) -> float:
        """Of its way from the start to the rung; mean over seeds."""
        return math.fsum(one.gpu_seconds for one in self.seeds) / len(self.seeds)

    @property
    def standard_error(self) -> float | None:
        """Of its first seed's log-loss, if that was stored."""
        found = self.seeds[0].metrics.get("standard_error")
        return float(found) if isinstance(found, int | float) else None


def plain_arm(plan: dict[str, Any]) -> str | None:
    """Return the name of plain DPO in a stored plan; searches of old versions have no plan."""
    plain = (
        str(arm["name"])
        for arm in plan.get("arms", [])
        if CandidateSpec.model_validate(arm["candidate"]).objective.is_plain_dpo
    )
    return next(plain, None)


def is_feasible(drift: float | None, plan: dict[str, Any]) -> bool:
    """Whether a drift is within the budget of a stored plan."""
    limit = plan.get("drift_budget")
    return limit is None or (drift is not None and drift <= limit)


def _ruled_out(measured: Sequence[Measurement], plan: dict[str, Any]) -> set[str]:
    """Return trials that cannot win by what they showed earlier, as `selection.rungs.ruled_out`.

    They came to a bad end, or drifted too far at some rung; who was cut for want of time did not.
    """
    return {
        one.trial_id
        for one in measured
        if one.trial_ended_by not in _NO_FAULT or not is_feasible(one.drift, plan)
    }


def answer_rung(measured: Sequence[Measurement], plan: dict[str, Any]) -> int | None:
    """Return the rung that the answer is taken from, as `selection.rungs.answer` does.

    The highest one that any pair has reached that may win; without such a pair the highest of
    plain DPO; without that the highest of all, where nothing can win. None before a first result.
    """
    plain = plain_arm(plan)
    finite = [m for m in measured if math.isfinite(m.log_loss)]
    out = _ruled_out(measured, plan)
    fine = [m for m in finite if m.trial_id not in out]
    pairs = [m for m in fine if m.arm != plain]
    return max((m.rung for m in pairs or fine or finite), default=None)


def configs_at(
    measured: Sequence[Measurement], rung: int | None, plan: dict[str, Any]
) -> list[Config]:
    """Return the configurations that were measured at a rung, log-losses on one level of seeds."""
    out = _ruled_out(measured, plan)
    found: dict[tuple[str, int], list[Measurement]] = defaultdict(list)
    for one in sorted(measured, key=lambda m: (m.repeat, m.number)):
        if one.rung == rung and math.isfinite(one.log_loss):
            found[one.arm, one.draw].append(one)
    of_seeds = levels([{one.repeat: one.log_loss for one in seeds} for seeds in found.values()])
    return [
        _config(tuple(seeds), log_loss, plan, out)
        for seeds, log_loss in zip(found.values(), of_seeds, strict=True)
    ]


def _config(
    seeds: tuple[Measurement, ...], log_loss: float, plan: dict[str, Any], out: set[str]
) -> Config:
    drifts = [math.inf if one.drift is None else one.drift for one in seeds]
    drift = max(drifts) if math.isfinite(max(drifts)) else None
    return Config(
        seeds=seeds,
        log_loss=log_loss,
        drift=drift,
        feasible=is_feasible(drift, plan) and not any(one.trial_id in out for one in seeds),
    )


def fullest_rung(measured: Sequence[Measurement]) -> int | None:
    """Return the rung at which most trials were measured, the highest of equal ones."""
    counts: dict[int, int] = defaultdict(int)
    for one in measured:
        counts[one.rung] += math.isfinite(one.log_loss)
    return max(counts, key=lambda rung: (counts[rung], rung), default=None)


def measured_trials(configs: Sequence[Config]) -> int:
    """Return how many trials configurations have, one for each seed."""
    return sum(len(config.seeds) for config in configs)


def lowest(configs: Sequence[Config]) -> Config | None:
    """Return the feasible configuration with the lowest log-loss."""
    usable = [config for config in configs if config.feasible]
    return min(usable, key=lambda config: (config.log_loss, config.number), default=None)
