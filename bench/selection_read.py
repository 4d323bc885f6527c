"""Whole cases of the kept table of `bench.selection`, ranked by today's recommender."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from bench.selection_cases import BUDGET, PAIRS, PLAIN, claims, metrics_version, pair_name
from bench.selection_prior import Evidence, without
from bench.selection_stats import Case, Floats
from core.profile import DatasetProfile
from core.spec import BASE_KERNELS, DivergenceName
from selection.prior import NOTHING_KNOWN, PRIOR, PriorTable
from selection.recommender import recommend

Row = dict[str, Any]
SHAPE = (len(BASE_KERNELS), len(DivergenceName))


@dataclass(frozen=True)
class Found:
    """A whole case with what its report needs besides the statistics.

    The scores of `case` are made with `prior`, a table of the other datasets alone; `shipped` and
    `metrics` are the same case with the shipped table, which saw these runs, and with no table.
    """

    profile: DatasetProfile
    prior: PriorTable
    case: Case
    shipped: Case
    metrics: Case
    runs: dict[str, Row]
    train_pairs: int
    claims: bool
    stale: bool

    @property
    def plain(self) -> float:
        """Log-loss of plain DPO."""
        return float(self.case.plain.mean())

    @property
    def recommended(self) -> int:
        """Number of the pair that is recommended first."""
        return self.case.order[0]

    def gains(self) -> Floats:
        """Percent of plain DPO's log-loss that each pair wins, (kernels, divergences)."""
        trained = self.case.trained.reshape(SHAPE)
        return np.asarray(100.0 * (self.plain - trained) / self.plain)

    def drifts(self) -> Floats:
        """Drift of each pair over plain DPO's, (kernels, divergences)."""
        plain = self.runs[PLAIN].get("drift")
        drifts = [self.runs[name].get("drift", math.nan) for name in PAIRS]
        return np.array(drifts).reshape(SHAPE) / (plain or math.nan)


@dataclass(frozen=True)
class _Whole:
    """A case with all its runs."""

    about: Row
    profile: DatasetProfile
    runs: dict[str, Row]

    def losses(self, name: str) -> Floats:
        return np.array(_losses(self.runs[name], len(self.about["group"])))

    def gains(self) -> Floats:
        """Percent of plain DPO's log-loss that each pair wins, (kernels, divergences)."""
        plain = self.losses(PLAIN).mean()
        trained = np.array([self.losses(name).mean() for name in PAIRS]).reshape(SHAPE)
        return np.asarray(100.0 * (plain - trained) / plain)

    def ranked(self, prior: PriorTable) -> Case:
        """The case with the scores that a prior table gives it."""
        ranking = {
            pair_name(entry.kernel, entry.divergence): entry.score.value
            for entry in recommend(self.profile, prior=prior).ranking
            if entry.mode == "penalty"
        }
        return Case(
            data=self.about["data"],
            seed=self.about["seed"],
            # Scores are sums of parts: what is equal but for rounding is a tie.
            scores=np.array([ranking[name] for name in PAIRS]).round(9),
            order=[PAIRS.index(name) for name in ranking if name in PAIRS],
            losses=np.stack([self.losses(name) for name in PAIRS]),
            plain=self.losses(PLAIN),
            group=np.array(self.about["group"]),
        )


def _whole(rows: Sequence[Row]) -> tuple[list[_Whole], list[str]]:
    """The whole cases of the present budget, and sentences about those that are not whole."""
    profiles: dict[tuple[str, str, int], Row] = {}
    runs: dict[tuple[str, str, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.get("budget") != BUDGET:
            continue
        key = (row["data"], row["sha256"], row["seed"])
        if row["kind"] == "case":
            profiles[key] = row
        elif row["kind"] == "run":
            runs[key][row["pair"]] = row
    whole, told = [], []
    for key in sorted(profiles.keys() | runs.keys()):
        name = f"{key[0]}, seed {key[2]}"
        lacking = len({PLAIN, *PAIRS} - runs[key].keys())
        if lacking:
            told.append(f"{name}: {lacking} of {len(PAIRS) + 1} runs are missing.")
        elif key not in profiles or (profile := _profile(profiles[key])) is None:
            told.append(f"{name}: the metrics are missing, or too old to be read.")
        else:
            whole.append(_Whole(profiles[key], profile, runs[key]))
    return whole, told


def evidence(rows: Sequence[Row]) -> dict[str, Evidence]:
    """What the kept runs say of each dataset, for a prior table."""
    return _evidence(_whole(rows)[0])


def _evidence(whole: Sequence[_Whole]) -> dict[str, Evidence]:
    by_data: dict[str, list[_Whole]] = defaultdict(list)
    for each in whole:
        by_data[each.about["data"]].append(each)
    return {
        name: Evidence.of([e.gains() for e in cases], [e.profile for e in cases])
        for name, cases in by_data.items()
    }


def read(rows: Sequence[Row]) -> tuple[list[Found], list[str]]:
    """The whole cases of the present budget, and sentences about those that are not whole.

    Recommendations are made anew from the stored metrics, so that they are today's, each with the
    prior table that the other datasets give: none has seen the runs that it is compared with.
    """
    whole, told = _whole(rows)
    known = _evidence(whole)
    return [_found(each, prior=without(known, each.about["data"])) for each in whole], told


def _profile(about: Row) -> DatasetProfile | None:
    """The stored metrics; None when they were written before the present fields."""
    try:
        return DatasetProfile.model_validate(about["profile"])
    except ValidationError:
        return None


def _found(whole: _Whole, *, prior: PriorTable) -> Found:
    return Found(
        profile=whole.profile,
        prior=prior,
        case=whole.ranked(prior),
        shipped=whole.ranked(PRIOR),
        metrics=whole.ranked(NOTHING_KNOWN),
        runs=whole.runs,
        train_pairs=whole.about["train_pairs"],
        claims=claims(whole.profile)["claims"],
        stale=whole.about["metrics"] != metrics_version(),
    )


def _losses(run: Row, pairs: int) -> list[float]:
    """A run's losses; one that broke down has learned nothing, which costs ln 2 a pair."""
    losses = run["losses"] or [math.log(2.0)] * pairs
    if len(losses) != pairs:
        raise RuntimeError(
            f"{run['data']}, seed {run['seed']}: {run['pair']} has {len(losses)} losses and the "
            f"case {pairs} validation pairs; they are of different code: remove its rows and "
            "measure them anew"
        )
    return losses
