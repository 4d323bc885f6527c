"""The recorded tables that searches are replayed on, as worlds.

`bench/tables/selection.jsonl` (bench.selection) has every pair at one setting, each seed on a split
of its own: a search sees one seed and is judged by the others. `bench/tables/search.jsonl`
(bench.search_record) has every pair at several settings and two seeds on one split: a search sees
one seed on one half of the validation prompts and is judged on the other half, by the run that it
picked, which is what a job hands out, or by the other seed's run of what it picked.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import ValidationError

from bench import selection_cases
from bench.search_record import BUDGET, RUNGS, SETTINGS, budget_of
from bench.search_world import Floats, Ints, Shown, World, Worth, arms_of
from bench.selection_cases import PAIRS, PLAIN
from core.profile import DatasetProfile
from selection.draws import RECOMMENDED, Setting
from selection.recommender import recommend
from worker.training.evaluate import Measured, TrialScore, trial_score

Row = dict[str, Any]
Key = tuple[str, str]
Place = tuple[str, int, int]
"""An arm, the number of a setting, a seed."""

HALVES = (0, 1)
NO_TRAINING = Worth(math.log(2.0), 0.5)
"""What a run that broke down is worth."""


@dataclass(frozen=True)
class _Recorded:
    """What trials show at rungs, by (arm, setting, rung), and what they are worth."""

    settings: Sequence[Setting]
    shown: dict[tuple[str, int, int], Shown]
    worths: dict[tuple[str, int], Worth]
    pairs: dict[tuple[str, int, int], Floats] = field(default_factory=dict)

    def show(self, arm: str, setting: Setting, rung: int, repeat: int) -> Shown:
        assert repeat == 0, "a recorded table has one seed to see"
        return self.shown[arm, self.settings.index(setting), rung]

    def worth(self, arm: str, setting: Setting) -> Worth:
        return self.worths[arm, self.settings.index(setting)]

    def losses(self, arm: str, setting: Setting, rung: int) -> Floats | None:
        return self.pairs.get((arm, self.settings.index(setting), rung))

    def world(
        self,
        name: str,
        *,
        data: str,
        scores: dict[str, float],
        steps: Sequence[int],
        group: Ints | None = None,
    ) -> World:
        """A step costs the same for every pair: seconds on a busy machine say little of them."""
        return World(
            name=name, data=data, arms=arms_of(scores), rungs=tuple(steps),
            grid=tuple(self.settings), pool=tuple(self.settings), repeats=0, show=self.show,
            worth=self.worth, losses=None if group is None else self.losses, group=group,
        )  # fmt: skip


# ------------------------------------------------------- a split for each seed


def worlds(
    rows: Sequence[Row], *, budget: Row, rungs: Sequence[int]
) -> tuple[list[World], list[str]]:
    """Every dataset and seed of a table with one setting, and sentences about what is lacking."""
    runs, profiles = _by_key(rows, lambda _: budget)
    found: list[World] = []
    told: list[str] = []
    for key in sorted(runs):
        seeds = sorted({row["seed"] for row in runs[key]})
        if not _whole_settings(runs[key]) or len(seeds) < 2:
            told.append(f"{key[0]}: not all pairs are measured at two seeds.")
            continue
        for seed in seeds:
            scores = _scores(profiles.get((key, seed)))
            if scores is None:
                told.append(
                    f"{key[0]}, seed {seed}: the metrics are missing, or too old to be read."
                )
                continue
            steps = (*rungs, budget["steps"])
            recorded = _by_seed(runs[key], steps, sees=seed)
            found.append(
                recorded.world(f"{key[0]}, seed {seed}", data=key[0], scores=scores, steps=steps)
            )
    return found, told


def _by_seed(rows: Sequence[Row], steps: Sequence[int], *, sees: int) -> _Recorded:
    shown: dict[tuple[str, int, int], Shown] = {}
    hidden: dict[tuple[str, int], list[Worth]] = defaultdict(list)
    for row in rows:
        broke = row["losses"] is None
        if row["seed"] != sees:
            worth = NO_TRAINING if broke else Worth(row["log_loss"], row["accuracy"])
            hidden[row["pair"], 0].append(worth)
            continue
        for rung, step in enumerate(steps):
            last = step == steps[-1]
            found = row if last else row["rungs"].get(str(step), {})
            missing = (last and broke) or "log_loss" not in found
            shown[row["pair"], 0, rung] = (
                Shown(math.inf) if missing else Shown(found["log_loss"], found["drift"])
            )
    worths = {place: _mean(found) for place, found in hidden.items()}
    return _Recorded((RECOMMENDED,), shown, worths)


# ------------------------------------------------------ one split, two halves


@dataclass(frozen=True)
class Case:
    """The runs of one dataset at whole settings, by (arm, setting, seed).

    `whole` says of how many settings, from the first on, a seed has all pairs; `group` (pairs,)
    numbers the prompts of the validation pairs; `scores` are the recommender's.
    """

    data: str
    whole: dict[int, int]
    scores: dict[str, float]
    group: Ints
    runs: dict[Place, Row]

    @property
    def settings(self) -> int:
        """Whole settings of the seed that has most."""
        return max(self.whole.values())

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds with any whole setting."""
        return tuple(sorted(self.whole))

    @property
    def twice(self) -> int:
        """Settings that are whole with two seeds."""
        return sorted((0, *self.whole.values()))[-2]

    def first(self, settings: int) -> "Case":
        """The same with its first so many settings."""
        kept = {place: row for place, row in self.runs.items() if place[1] < settings}
        whole = {seed: min(settings, number) for seed, number in self.whole.items()}
        return replace(self, whole=whole, runs=kept)

    @property
    def half(self) -> Ints:
        """Which half of the prompts a pair belongs to, (pairs,); each has both folds."""
        found: Ints = self.group // 2 % 2
        return found

    def at(self, place: Place, rung: int) -> Row:
        """What was kept of a run at a rung, the last one its end."""
        row = self.runs[place]
        return row if rung == len(RUNGS) else row["rungs"].get(str(RUNGS[rung]), {})

    def scored(self, place: Place, rung: int, *, half: int | None = None) -> TrialScore | None:
        """Its score on a half of the prompts, or on all; None of a run that broke down.

        The temperature is fitted within what is scored: nothing is known of the other half.
        """
        kept = self.at(place, rung)
        if kept.get("log_loss") is None:
            return None
        margins = np.array(kept["margins"], dtype=np.float64)
        group, half_of = self.group[: margins.size], self.half[: margins.size]
        where = np.ones(margins.size, dtype=bool) if half is None else half_of == half
        return trial_score(_measured(margins[where], group[where], drift=kept["drift"]))

    def seen_group(self, half: int) -> Ints:
        """Prompts of the pairs that a search sees, at the end."""
        found: Ints = self.group[self.half == half]
        return found


def _measured(margins: Floats, group: Ints, *, drift: float) -> Measured:
    """Margins as something that can be scored; a mean token divergence of `drift`."""
    ones = np.ones_like(margins)
    return Measured(
        chosen=margins, rejected=0.0 * ones, chosen_tokens=ones, rejected_tokens=0.0 * ones,
        kl_sum=drift * ones, group=group,
    )  # fmt: skip


def cases(rows: Sequence[Row]) -> tuple[list[Case], list[str]]:
    """Every dataset that has at least one whole setting, and sentences about the others."""
    runs, profiles = _by_key(rows, budget_of)
    found: list[Case] = []
    told: list[str] = []
    for key in sorted(runs):
        by_seed: dict[int, list[Row]] = defaultdict(list)
        for row in runs[key]:
            by_seed[row["seed"]].append(row)
        numbers = {seed: _whole_settings(of) for seed, of in sorted(by_seed.items())}
        whole = {seed: number for seed, number in numbers.items() if number}
        if not whole:
            told.append(f"{key[0]}: not all pairs are measured at any setting.")
            continue
        about = profiles.get((key, min(by_seed)))
        scores = _scores(about)
        if about is None or scores is None:
            told.append(f"{key[0]}: the metrics are missing, or too old to be read.")
            continue
        found.append(
            Case(
                data=key[0], whole=whole, scores=scores, group=np.array(about["group"]),
                runs={
                    (row["pair"], row["setting"], row["seed"]): row
                    for row in runs[key]
                    if row["setting"] < whole.get(row["seed"], 0)
                },
            )
        )  # fmt: skip
    return found, told


class Judge(StrEnum):
    """What a pick is worth: the checkpoint itself, or what was picked, trained with other seeds."""

    CHECKPOINT = "checkpoint"
    OTHER_SEEDS = "other seeds"


def halved(found: Sequence[Case], *, judge: Judge) -> list[World]:
    """Of every case a world for each half and seed that a search may see; judged on the other half.

    With all settings of the case, or, where other seeds judge, with those that they have too.
    """
    worlds = []
    for case in found:
        settings = case.settings if judge is Judge.CHECKPOINT else case.twice
        if settings:
            kept = case.first(settings)
            seeds = [seed for seed, number in kept.whole.items() if number == settings]
            kept = replace(kept, whole=dict.fromkeys(seeds, settings))
            worlds += [
                _world_of(kept, sees=seed, half=half, judge=judge)
                for seed in seeds
                for half in HALVES
            ]
    return worlds


def _world_of(case: Case, *, sees: int, half: int, judge: Judge) -> World:
    shown: dict[tuple[str, int, int], Shown] = {}
    pairs: dict[tuple[str, int, int], Floats] = {}
    hidden: dict[tuple[str, int], list[Worth]] = defaultdict(list)
    for arm, setting, seed in case.runs:
        if seed not in case.whole:
            continue
        if (seed == sees) is (judge is Judge.CHECKPOINT):
            other = case.scored((arm, setting, seed), len(RUNGS), half=1 - half)
            worth = NO_TRAINING if other is None else Worth(other.log_loss, other.accuracy)
            hidden[arm, setting].append(worth)
        if seed != sees:
            continue
        for rung in range(len(RUNGS) + 1):
            score = case.scored((arm, setting, seed), rung, half=half)
            shown[arm, setting, rung] = (
                Shown(math.inf) if score is None else Shown(score.log_loss, score.drift)
            )
            if score is not None:
                pairs[arm, setting, rung] = score.losses
    worths = {place: _mean(found) for place, found in hidden.items()}
    recorded = _Recorded(SETTINGS[: case.settings], shown, worths, pairs)
    return recorded.world(
        f"{case.data}, seed {sees}, half {half}", data=case.data, scores=case.scores,
        steps=(*RUNGS, BUDGET["steps"]), group=case.seen_group(half),
    )  # fmt: skip


# ------------------------------------------------------------------ of a table


def _by_key(
    rows: Iterable[Row], expected: Callable[[str], Row]
) -> tuple[dict[Key, list[Row]], dict[tuple[Key, int], Row]]:
    """Runs by dataset, and the newest profile by dataset and seed."""
    runs: dict[Key, list[Row]] = defaultdict(list)
    profiles: dict[tuple[Key, int], Row] = {}
    for row in rows:
        if "budget" not in row or row["budget"] != expected(row["data"]):
            continue
        key = (row["data"], row["sha256"])
        if row["kind"] == "run":
            runs[key].append(row)
        elif row["kind"] == "case":
            profiles[key, row["seed"]] = row
    return runs, profiles


def _whole_settings(rows: Sequence[Row]) -> int:
    """How many settings, from the first on, have every pair at every seed."""
    there = {(row["pair"], row.get("setting", 0), row["seed"]) for row in rows}
    seeds = {row["seed"] for row in rows}
    for setting in range(len(SETTINGS)):
        wanted = {(name, setting, seed) for name in (PLAIN, *PAIRS) for seed in seeds}
        if not wanted <= there:
            return setting
    return len(SETTINGS)


def _scores(about: Row | None) -> dict[str, float] | None:
    if about is None:
        return None
    try:
        profile = DatasetProfile.model_validate(about["profile"])
    except ValidationError:
        return None
    ranking = recommend(profile).ranking
    return {selection_cases.pair_name(p.kernel, p.divergence): p.score.value for p in ranking}


def _mean(found: Sequence[Worth]) -> Worth:
    return Worth(fmean(w.log_loss for w in found), fmean(w.accuracy for w in found))
