"""What the process that plans, prices and compares is asked for; it loads numpy, the API does not.

Plans, settings and rows are JSON as they are stored (`selection.wire`).
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from core.run_spec import CandidateSpec, ShapeName
from core.spec import SpecModel


class QuoteTask(SpecModel):
    """What a search will cost; answered by `selection.quote.Quote` as JSON."""

    kind: Literal["quote"] = "quote"
    plan: dict[str, Any]
    facts: tuple[dict[str, Any], ...]
    elapsed_seconds: float
    workers: int


class LimitsTask(SpecModel):
    """A plan under other limits; with `shape` in that one, else in the one that they pay for.

    `workers` are how many share the work, which tells what can be done until a deadline.
    """

    kind: Literal["limits"] = "limits"
    plan: dict[str, Any]
    gpu_seconds: float | None
    max_trials: int | None
    deadline_seconds: float | None
    shape: ShapeName | None
    workers: int


class LimitsFound(SpecModel):
    """Name of the shape, and the plan in it."""

    shape: str
    plan: dict[str, Any]


Mixture = tuple[float, float, float]


class Strengths(SpecModel):
    """Hyperparameters of an arm, as factors on what is recommended or as they are."""

    learning_rate: float | None = Field(default=None, gt=0.0)
    beta: float | None = Field(default=None, gt=0.0)
    gamma: float | None = Field(default=None, gt=0.0)
    alpha: float | None = Field(default=None, gt=0.0)
    mixture: Mixture | None = Field(
        default=None, description="HMK: tau_local, rbf, spectral, each from 0.05 to 0.95"
    )


class SettingTask(SpecModel):
    """What an arm trains at these strengths: factors, or absolute values.

    What they leave open is as in the setting `base`, or as recommended.
    """

    kind: Literal["setting"] = "setting"
    plan: dict[str, Any]
    arm: str
    strengths: Strengths
    absolute: bool
    base: dict[str, Any] | None = None


class SettingFound(SpecModel):
    """The setting, what it trains, and the rung that a drawn trial goes to first.

    `recommended`: it is the very setting that arms are screened at.
    """

    kind: Literal["found"] = "found"
    setting: dict[str, Any]
    candidate: CandidateSpec
    rung: int
    recommended: bool


class SettingRefused(SpecModel):
    """Why a search cannot train at these strengths; `param` names one, None the arm."""

    kind: Literal["refused"] = "refused"
    detail: str
    param: str | None


SettingAnswer = Annotated[SettingFound | SettingRefused, Field(discriminator="kind")]


class Racer(SpecModel):
    """A configuration at the rung that counts; `files` has its losses, one file of each seed.

    `log_losses` are those of its seeds, `log_loss` what they come to on one level.
    """

    number: int
    label: str
    log_loss: float
    log_losses: dict[int, float]
    drift: float | None
    feasible: bool
    standard_error: float | None
    files: tuple[str, ...]


class RaceTask(SpecModel):
    """Who wins, who ties, and what is gained over the baseline; a verdict that is given stands.

    `groups` is the file with the number of each pair's prompt.
    """

    kind: Literal["race"] = "race"
    racers: tuple[Racer, ...]
    verdict: int | None
    baseline: int | None
    groups: str | None


Basis = Literal["paired", "independent"]


class GainFound(SpecModel):
    """The baseline's log-loss minus the winner's, with a 95 % interval where there is one."""

    log_loss: float
    low: float | None
    high: float | None
    basis: Basis | None


class RaceFound(SpecModel):
    """Numbers of the winner and of those that tie with it, and how they were compared."""

    winner: int | None
    tied: tuple[int, ...]
    basis: Basis | None
    reason: str
    gain: GainFound | None


SearchTask = Annotated[QuoteTask | LimitsTask | SettingTask | RaceTask, Field(discriminator="kind")]
