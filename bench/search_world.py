"""What a search can be replayed on: recorded tables, and made-up worlds of known answers.

A world answers what a trial shows at a rung under the seeds that a search may see, and what it is
really worth. In a recorded table that is the mean over the seeds that the search does not see: a
figure that was chosen for being small is small by chance too.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.selection_cases import PLAIN, objectives
from core.run_spec import CandidateSpec
from selection.draws import RECOMMENDED, Setting
from selection.study import Arm

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GRID = (
    RECOMMENDED,
    Setting(learning_rate=2.0, beta=0.5),
    Setting(learning_rate=0.5, beta=0.5),
    Setting(learning_rate=2.0, beta=2.0),
)
"""The settings of the tuned grid, the same for every arm."""


@dataclass(frozen=True)
class Shown:
    """What a scoring shows: calibrated log-loss in nats, drift in nats; not finite: diverged."""

    log_loss: float
    drift: float = 0.0


@dataclass(frozen=True)
class Worth:
    """What a trial is really worth at full length: log-loss in nats, accuracy in [0, 1]."""

    log_loss: float
    accuracy: float


@dataclass(frozen=True)
class World:
    """One dataset and seed to search on. `rungs` in steps; `pool`: the only settings there are.

    `show(arm, setting, rung, repeat)`; `repeats` counts second seeds that can be seen. Where they
    are recorded, `losses(arm, setting, rung)` are those of the validation pairs that a search sees,
    (pairs,), of the prompts `group`; None of a run that broke down.
    """

    name: str
    data: str
    arms: tuple[Arm, ...]
    rungs: tuple[int, ...]
    grid: tuple[Setting, ...]
    pool: tuple[Setting, ...]
    repeats: int
    show: Callable[[str, Setting, int, int], Shown]
    worth: Callable[[str, Setting], Worth]
    losses: Callable[[str, Setting, int], Floats | None] | None = None
    group: Ints | None = None

    @property
    def whole(self) -> int:
        """Steps of a run at full length."""
        return self.rungs[-1]

    def cost(self, arm: str, steps: int) -> float:
        """Of so many steps, in runs of plain DPO at full length."""
        factor = next(a.cost for a in self.arms if a.name == arm)
        return factor * steps / self.whole

    def grid_cost(self, *, settings: int | None = None) -> float:
        """Of every arm at every setting of the grid, or at the first so many, at full length."""
        number = len(self.grid) if settings is None else settings
        return number * math.fsum(arm.cost for arm in self.arms)


def arms_of(scores: Mapping[str, float]) -> tuple[Arm, ...]:
    """Plain DPO and the 28 pairs of the recorded tables, the best scores first."""
    specs = objectives()
    names = [PLAIN, *sorted((n for n in specs if n != PLAIN), key=lambda n: -scores.get(n, 0.0))]
    return tuple(
        Arm(
            name=name,
            candidate=CandidateSpec(objective=specs[name], learning_rate=1e-3),
            score=scores.get(name, 0.0),
        )
        for name in names
    )


# ----------------------------------------------------------------- made up


@dataclass(frozen=True)
class Law:
    """How made-up worlds are drawn; percent of log-loss, one accuracy point each.

    `pair_sd` of pairs; every arm has its own best setting, `optimum_sd` away in each of two
    hyperparameters, and loses `curvature` a squared unit; `agreement` is the correlation of scores
    with pairs; `additive` the part of pairs that is kernel + divergence.
    """

    pair_sd: float = 1.5
    agreement: float = 0.5
    additive: float = 0.0
    optimum_sd: float = 0.7
    curvature: float = 1.5
    rungs: tuple[int, ...] = (20, 60, 200, 1000)
    shrink: tuple[float, ...] = (0.35, 0.55, 0.8, 1.0)
    correlation: tuple[float, ...] = (0.6, 0.75, 0.9, 1.0)
    seed_sd: tuple[float, ...] = (0.45, 0.4, 0.35, 0.3)
    score_sd: tuple[float, ...] = (0.5, 0.5, 0.35, 0.25)


_ACCURACY, _LOG_LOSS, _STICKS = 0.68, 0.6, 0.5


class _Made:
    """One made-up world: numbers drawn once, everything else a function of them."""

    def __init__(self, law: Law, seed: int) -> None:
        self._law = law
        self._seed = seed
        names = list(objectives())
        rng = np.random.default_rng(seed)
        n = len(names)
        kernel, divergence = np.arange(n - 1) // 7, np.arange(n - 1) % 7
        parts = (rng.normal(size=4)[kernel] + rng.normal(size=7)[divergence]) / math.sqrt(2.0)
        own = rng.normal(size=n - 1)
        pairs = math.sqrt(law.additive) * parts + math.sqrt(1.0 - law.additive) * own
        effects = law.pair_sd * np.array([0.0, *pairs])
        guess = law.agreement * effects[1:] / law.pair_sd
        guess = guess + math.sqrt(1.0 - law.agreement**2) * rng.normal(size=n - 1)
        self.scores = dict(zip(names[1:], (law.pair_sd * guess).tolist(), strict=True))
        self.effects = dict(zip(names, effects.tolist(), strict=True))
        self._optimum = dict(zip(names, rng.normal(0.0, law.optimum_sd, size=(n, 2)), strict=True))
        # Spread of what trials at recommended settings are worth: what a short run mistakes.
        self._spread = math.hypot(law.pair_sd, law.curvature * 2.0 * law.optimum_sd**2)

    def value(self, arm: str, setting: Setting) -> float:
        """Percent of log-loss won at full length."""
        away = np.array(setting.point[:2]) - self._optimum[arm]
        return self.effects[arm] - self._law.curvature * float(away @ away)

    def worth(self, arm: str, setting: Setting) -> Worth:
        value = self.value(arm, setting)
        return Worth(_LOG_LOSS * math.exp(-value / 100.0), _ACCURACY + value / 100.0)

    def show(self, arm: str, setting: Setting, rung: int, repeat: int) -> Shown:
        """As at full length, but shrunk, in part wrong (in like ways on all rungs), and noisy."""
        law = self._law
        lasting = self._normals(arm, setting, "lasting", 2)
        seeded = self._normals(arm, setting, f"seed {repeat}", 1)
        here = self._normals(arm, setting, f"{repeat} at {rung}", 2)
        wrong = math.sqrt(_STICKS) * lasting[0] + math.sqrt(1.0 - _STICKS) * here[0]
        mistaken = self._spread * math.sqrt(1.0 / law.correlation[rung] ** 2 - 1.0) * wrong
        seen = law.shrink[rung] * (self.value(arm, setting) + mistaken)
        # The validation pairs are the same at every rung and seed, a scoring's noise in part too.
        noise = math.sqrt(_STICKS) * lasting[1] + math.sqrt(1.0 - _STICKS) * here[1]
        seen += law.seed_sd[rung] * seeded[0] + law.score_sd[rung] * noise
        return Shown(_LOG_LOSS * math.exp(-seen / 100.0))

    def _normals(self, arm: str, setting: Setting, what: str, number: int) -> Floats:
        text = f"{self._seed}:{arm}:{setting.point}:{what}"
        bits = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return np.random.default_rng(bits).normal(size=number)


def made_up(law: Law, seed: int) -> World:
    """A world drawn from a law; the same law and seed give the same one."""
    made = _Made(law, seed)
    return _world(made, law, made.scores, seed)


def made_of(
    law: Law, seed: int, *, gains: Mapping[str, float], scores: Mapping[str, float]
) -> World:
    """A world in which pairs have these gains and scores; everything else is drawn from the law."""
    made = _Made(law, seed)
    made.effects = {PLAIN: 0.0, **gains}
    return _world(made, law, scores, seed)


def _world(made: _Made, law: Law, scores: Mapping[str, float], seed: int) -> World:
    return World(
        name=f"made up {seed}", data=f"made up {seed}", arms=arms_of(scores),
        rungs=law.rungs, grid=GRID, pool=(), repeats=1, show=made.show, worth=made.worth,
    )  # fmt: skip
