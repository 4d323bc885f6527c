"""A finished or running search as trials of Optuna, for its own tools.

The copy is conditional: a trial has a parameter when its candidate makes use of it. (The search
itself samples all of them in every trial, see `selection/space.py`; a value that nothing used is
left out here, for it would pass for evidence.)
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, assert_never

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from core.lifecycle import TrialStatus
from core.run_spec import CandidateSpec
from selection.space import ParamValue, SearchSpace, used_params


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it is copied; `constraints` are violations, at most 0 where one is kept.

    `value` is what the study minimises; only a complete trial has one.
    """

    number: int
    candidate: CandidateSpec
    status: TrialStatus
    value: float | None
    started: datetime
    finished: datetime | None = None
    constraints: Mapping[str, float] = field(default_factory=dict)
    attributes: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


def frozen_trials(records: Sequence[TrialRecord]) -> list[FrozenTrial]:
    """Return the trials in the order of their numbers, each with the parameters that it uses.

    A parameter has one range in all trials: that of the search space around the learning rate of
    the first trial, made wider where a candidate lies outside of it.
    """
    ordered = sorted(records, key=lambda record: record.number)
    if not ordered:
        return []
    params = [used_params(record.candidate) for record in ordered]
    space = SearchSpace(ordered[0].candidate.learning_rate).distributions
    ranges = {
        name: _widened(distribution, [p[name] for p in params if name in p])
        for name, distribution in space.items()
    }
    return [
        _frozen(record, used, {name: ranges[name] for name in used})
        for record, used in zip(ordered, params, strict=True)
    ]


def _frozen(
    record: TrialRecord, params: dict[str, ParamValue], ranges: dict[str, BaseDistribution]
) -> FrozenTrial:
    state = _state(record)
    trial = optuna.trial.create_trial(
        state=state,
        value=record.value if state is TrialState.COMPLETE else None,
        params=params,
        distributions=ranges,
        user_attrs=dict(record.attributes),
        constraints=dict(record.constraints),
    )
    trial.datetime_start = record.started
    if state.is_finished():
        trial.datetime_complete = record.finished or record.started
    return trial


def _state(record: TrialRecord) -> TrialState:
    match record.status:
        case TrialStatus.WAITING:
            return TrialState.WAITING
        case TrialStatus.RUNNING:
            return TrialState.RUNNING
        case TrialStatus.PRUNED:
            return TrialState.PRUNED
        case TrialStatus.FAIL:
            return TrialState.FAIL
        case TrialStatus.COMPLETE:
            return TrialState.FAIL if record.value is None else TrialState.COMPLETE
        case _:
            assert_never(record.status)


def _widened(distribution: BaseDistribution, values: list[ParamValue]) -> BaseDistribution:
    """Return a range that holds the values too."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            more = [value for value in dict.fromkeys(values) if value not in choices]
            return CategoricalDistribution((*choices, *more))
        case FloatDistribution(low=low, high=high, log=log):
            floats = [float(value) for value in values]
            return FloatDistribution(min([low, *floats]), max([high, *floats]), log=log)
        case IntDistribution(low=low, high=high, log=log):
            whole = [int(value) for value in values]
            return IntDistribution(min([low, *whole]), max([high, *whole]), log=log)
        case _:
            raise AssertionError(f"a search space has no {distribution}")


def add_to_storage(
    storage: optuna.storages.BaseStorage, name: str, records: Sequence[TrialRecord]
) -> None:
    """Add the records that a study in a storage lacks, by their attribute `number`.

    The study is made if missing. Optuna numbers trials by itself, in the order of the records.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=storage, study_name=name, direction="minimize", load_if_exists=True
    )
    there = {trial.user_attrs.get("number") for trial in study.get_trials(deepcopy=False)}
    for trial in frozen_trials(records):
        if trial.user_attrs["number"] not in there:
            study.add_trial(trial)


# ------------------------------------------------------------------ a file


class _Lines(BaseJournalBackend):
    """The log of a journal in memory."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs.extend(logs)


def journal(name: str, records: Sequence[TrialRecord]) -> bytes:
    """Return a study as the content of a file that `JournalFileBackend` opens."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lines = _Lines()
    study = optuna.create_study(
        storage=JournalStorage(lines), study_name=name, direction="minimize"
    )
    study.set_metric_names(["log_loss"])
    study.add_trials(frozen_trials(records))
    return b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in lines.logs)
