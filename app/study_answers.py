"""What a search says at any time: its best trial, its Pareto front, what mattered."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from app.responses import Schema
from app.search_tasks import Basis, GainFound, RaceFound, Racer, RaceTask
from app.study_rungs import Config, answer_rung, configs_at, measured_trials, plain_arm
from app.study_views import is_provisional
from app.trial_views import TRIAL_EXAMPLE, TrialView, trial_at
from core.lifecycle import JobStatus
from core.results import Comparison, SearchSummary
from core.run_spec import CandidateSpec
from core.search_files import groups_file, losses_file
from models.experiment import StudyRow, TrialRow
from models.job import Job
from models.repositories.studies import Measurement
from selection.front import non_dominated


class Gain(Schema):
    """How much lower the best trial's log-loss is than plain DPO's, on validation pairs.

    The interval (95 %) is `paired` by pair where the losses of both are kept. `independent` takes
    the two trials as independent; they share their pairs, so it is too wide rather than too narrow.
    """

    log_loss: float = Field(description="plain DPO's minus the best trial's; above 0 is better")
    low: float | None = Field(description="null where a trial has no standard error")
    high: float | None
    basis: Basis | None


class BestView(Schema):
    """The answer of a search at any time; final when it is not `provisional`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "study.best", "study_id": "study_01jd8", "job_id": "ftjob-01jd8",
                    "status": "running", "provisional": True, "rung": 3, "steps": 1000,
                    "measured": 3, "best": TRIAL_EXAMPLE, "tied": [], "baseline": None,
                    "gain": {"log_loss": 0.021, "low": 0.004, "high": 0.038, "basis": "paired"},
                    "basis": "paired", "final": None,
                    "sentence": "So far: Trial 3 (rbf × jensen_shannon (penalty)) has the lowest "
                    "feasible log-loss, 0.6112; chance of prompts and seeds does not explain how "
                    "far the others lie off.",
                }
            ]
        }
    )  # fmt: skip

    object: Literal["study.best"] = "study.best"
    study_id: str
    job_id: str
    status: JobStatus
    provisional: bool
    rung: int | None = Field(
        description="the highest that a pair has reached within the drift budget: what was "
        "measured there is compared; null: nothing yet"
    )
    steps: int | None = Field(description="how long trials have trained at that rung")
    measured: int = Field(description="configurations measured there, each with all its seeds")
    best: TrialView | None = Field(description="as it was at that rung")
    tied: list[TrialView] = Field(description="not told apart from the best")
    baseline: TrialView | None = Field(description="the best of plain DPO's trials there")
    gain: Gain | None = Field(description="null without one of the two, or when they are the same")
    basis: Basis | None = Field(
        description="how the ties were found: `paired` by pair with second seeds, or from the "
        "standard errors of `independent` trials; null: nothing was compared"
    )
    final: Comparison | None = Field(
        description="winner against plain DPO, both trained in full, paired on test pairs"
    )
    sentence: str


class ParetoPoint(Schema):
    """One configuration in the three objectives, all of which are better when lower."""

    number: int = Field(description="of its trial with the seed of the search")
    label: str
    log_loss: float = Field(
        description="nats, on the level of the search's own seed: mean over its seeds, without "
        "what a seed does to all trials alike"
    )
    drift: float = Field(description="largest over seeds")
    gpu_seconds: float = Field(
        description="of its way from the start to this rung; mean over seeds"
    )
    feasible: bool
    on_front: bool


class ParetoView(Schema):
    """Which feasible configurations no other one beats in quality, drift and cost at once."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "study.pareto", "study_id": "study_01jd8", "provisional": False,
                    "rung": 3, "steps": 1000,
                    "objectives": ["log_loss", "drift", "gpu_seconds"], "front": [3, 0],
                    "left_out": 1,
                    "data": [
                        {
                            "number": 0, "label": "dpo", "log_loss": 0.63, "drift": 0.02,
                            "gpu_seconds": 7.1, "feasible": True, "on_front": True,
                        }
                    ],
                }
            ]
        }
    )  # fmt: skip

    object: Literal["study.pareto"] = "study.pareto"
    study_id: str
    provisional: bool
    rung: int | None = Field(description="whose measurements are compared; null: there are none")
    steps: int | None
    objectives: tuple[Literal["log_loss", "drift", "gpu_seconds"], ...] = (
        "log_loss",
        "drift",
        "gpu_seconds",
    )
    front: list[int] = Field(description="numbers of its trials, lowest log-loss first")
    data: list[ParetoPoint] = Field(description="all configurations of the rung by number")
    left_out: int = Field(description="trials without a measurement at this rung")


class ParameterView(Schema):
    """One parameter; `share` adds up to 1 over those that have an importance."""

    name: str
    trials: int = Field(description="measured trials that use it")
    importance: float | None
    share: float | None
    noise: float | None = Field(description="what shuffled results reach in 5 of 100 cases")
    above_noise: bool | None
    reason: str | None = Field(description="why it has no importance")


class ImportanceView(Schema):
    """What set the best trials apart (PED-ANOVA); no figures when there are too few trials."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "study.importance", "study_id": "study_01jd8", "provisional": False,
                    "rung": 0, "steps": 20,
                    "target": "log_loss", "method": "ped_anova", "trials": 40, "needed": 20,
                    "top_share": 0.125,
                    "data": [
                        {
                            "name": "beta", "trials": 40, "importance": 0.051, "share": 0.62,
                            "noise": 0.018, "above_noise": True, "reason": None,
                        }
                    ],
                    "sentence": "More than shuffled results would, the best 12% of 40 trials by "
                    "log_loss are set apart by: beta.",
                }
            ]
        }
    )  # fmt: skip

    object: Literal["study.importance"] = "study.importance"
    study_id: str
    provisional: bool
    rung: int | None = Field(description="whose measurements are compared; null: there are none")
    steps: int | None
    target: Literal["log_loss", "drift", "gpu_seconds"]
    method: Literal["ped_anova"] = "ped_anova"
    trials: int
    needed: int
    top_share: float | None = Field(description="which share of the trials counts as the best")
    data: list[ParameterView]
    sentence: str


# --------------------------------------------------------------------- the best


class Standings:
    """What is compared now: the configurations of the rung that the answer is taken from."""

    def __init__(
        self, study: StudyRow, measured: Sequence[Measurement], trials: Mapping[str, TrialRow]
    ) -> None:
        self.study = study
        self.rung = answer_rung(measured, study.plan)
        self.configs = configs_at(measured, self.rung, study.plan)
        self._trials = trials

    @property
    def steps(self) -> int | None:
        """Steps of the rung."""
        return steps_of(self.study, self.rung)

    @property
    def baseline(self) -> Config | None:
        """The best of plain DPO, within the drift budget or not."""
        plain = plain_arm(self.study.plan)
        found = [config for config in self.configs if config.seeds[0].arm == plain]
        return min(found, key=lambda config: (config.log_loss, config.number), default=None)

    def view(self, number: int | None) -> TrialView | None:
        """Return the trial of that number as it was at the rung, if it is compared."""
        found = next((config for config in self.configs if config.number == number), None)
        return None if found is None else self.view_of(found)

    def view_of(self, config: Config) -> TrialView:
        """Return the first trial of a configuration as it was at the rung."""
        first = config.seeds[0]
        return trial_at(self._trials[first.trial_id], first, feasible=config.feasible)

    def label(self, config: Config) -> str:
        """Return `dpo`, or kernel × divergence."""
        return _label(self._trials[config.seeds[0].trial_id])

    def race(self, folder: Path, *, verdict: int | None) -> RaceTask:
        """Return the question who wins; `folder` has the losses of the trials."""
        return RaceTask(
            racers=tuple(
                Racer(
                    number=config.number,
                    label=self.label(config),
                    log_loss=config.log_loss,
                    log_losses={seed.repeat: seed.log_loss for seed in config.seeds},
                    drift=config.drift,
                    feasible=config.feasible,
                    standard_error=config.standard_error,
                    files=tuple(
                        str(losses_file(folder, seed.number, seed.rung)) for seed in config.seeds
                    ),
                )
                for config in self.configs
            ),
            verdict=verdict,
            baseline=None if self.baseline is None else self.baseline.number,
            groups=str(groups_file(folder)),
        )


def best_view(
    standings: Standings, job: Job, race: RaceFound, summary: SearchSummary | None
) -> BestView:
    """Return the best feasible trial, its ties and plain DPO beside it.

    Once the search has ended its own verdict stands; before, or when it was stopped, the same rule
    has been applied to what is there.
    """
    study, baseline = standings.study, standings.baseline
    provisional = is_provisional(study, job)
    tied = race.tied if summary is None else summary.tied_trials
    reason = race.reason if summary is None else summary.sentence
    views = [standings.view(number) for number in tied]
    return BestView(
        study_id=study.id,
        job_id=job.id,
        status=job.status,
        provisional=provisional,
        rung=standings.rung,
        steps=standings.steps,
        measured=len(standings.configs),
        best=standings.view(race.winner),
        tied=[view for view in views if view is not None],
        baseline=None if baseline is None else standings.view_of(baseline),
        gain=_gain(race.gain),
        basis=race.basis,
        final=_final(job.result),
        sentence=f"So far: {reason}" if provisional else reason,
    )


def _gain(found: GainFound | None) -> Gain | None:
    return None if found is None else Gain(**found.model_dump())


def _final(result: dict[str, Any] | None) -> Comparison | None:
    found = None if result is None else result.get("comparison")
    return None if found is None else Comparison.model_validate(found)


def _label(row: TrialRow) -> str:
    return CandidateSpec.model_validate(row.candidate).objective.label


def steps_of(study: StudyRow, rung: int | None) -> int | None:
    """Return how long a trial has trained at a rung of a study."""
    return None if rung is None else int(study.plan["rungs"][rung])


# -------------------------------------------------------------------- the front


def pareto_view(
    study: StudyRow,
    measured: Sequence[Measurement],
    trials: Mapping[str, TrialRow],
    *,
    rung: int | None,
    provisional: bool,
) -> ParetoView:
    """Return the front of the feasible configurations of a rung, and all of them as points."""
    placed = [
        (config, (config.log_loss, config.drift, config.gpu_seconds))
        for config in sorted(configs_at(measured, rung, study.plan), key=lambda c: c.number)
        if config.drift is not None
    ]
    points = [(config, point) for config, point in placed if config.feasible]
    kept = non_dominated([point for _, point in points])
    front = sorted((points[index][0] for index in kept), key=lambda c: (c.log_loss, c.number))
    numbers = {config.number for config in front}
    return ParetoView(
        study_id=study.id,
        provisional=provisional,
        rung=rung,
        steps=steps_of(study, rung),
        front=[config.number for config in front],
        data=[
            ParetoPoint(
                number=config.number,
                label=_label(trials[config.seeds[0].trial_id]),
                log_loss=log_loss,
                drift=drift,
                gpu_seconds=gpu_seconds,
                feasible=config.feasible,
                on_front=config.number in numbers,
            )
            for config, (log_loss, drift, gpu_seconds) in placed
        ],
        left_out=len(trials) - measured_trials([config for config, _ in placed]),
    )
