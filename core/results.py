"""What a training job found, as plain values that go to JSON and back."""

from typing import Literal

from pydantic import Field

from core.profile import Estimate
from core.spec import ObjectiveSpec, SpecModel


class Evaluation(SpecModel):
    """Quality of one policy on held-out pairs (docs/maths.md, "What better means")."""

    log_loss: float = Field(description="calibrated: temperature fitted on validation, nats")
    temperature: float = Field(description="the fitted b of mean -log sigma(b m)")
    accuracy: float = Field(description="share of pairs with margin > 0; a tie counts one half")
    accuracy_length_normalized: float
    calibration_error: float = Field(description="expected calibration error, 15 bins")
    drift: float = Field(description="mean token KL(policy || reference), nats")
    chosen_displacement: float = Field(description="mean log-ratio of chosen answers, nats")
    pairs: int
    prompts: int


class Comparison(SpecModel):
    """Winner against plain DPO on the same test pairs: bootstrap over prompts, winner - DPO.

    Where plain DPO diverged there are no differences to tell.
    """

    log_loss: Estimate | None
    accuracy: Estimate | None
    drift: float | None
    verdict: Literal[
        "better", "worse", "no significant difference", "same objective", "baseline diverged"
    ]
    sentence: str


class GeneratedSample(SpecModel):
    """One prompt answered by the base and by the aligned model (greedy)."""

    prompt: str
    base: str
    aligned: str


class TailFit(SpecModel):
    """A power law p(x) ~ x^-alpha fitted to the eigenvalues >= x_min of one W^T W."""

    alpha: float
    x_min: float
    ks_distance: float = Field(description="of the fitted law from the tail; small fits well")
    tail_values: int = Field(description="number of eigenvalues >= x_min")


class LayerTail(SpecModel):
    """One linear weight before and after training; without fits, why it was passed over."""

    layer: str
    rows: int
    cols: int
    before: TailFit | None = None
    after: TailFit | None = None
    skipped: str | None = None


class HeavyTails(SpecModel):
    """Power-law exponents of the weights that a run trained (docs/maths.md, "Heavy tails")."""

    layers: tuple[LayerTail, ...]
    measured: int
    mean_before: float | None
    mean_after: float | None
    median_before: float | None
    median_after: float | None
    changed: int = Field(description="layers whose alpha moved by more than `changed_by`")
    changed_by: float
    outliers: tuple[str, ...] = Field(description="layers whose alpha left the range 2 to 6")
    sentence: str


class RunSummary(SpecModel):
    """One full-length run and what came of it."""

    objective: ObjectiveSpec
    learning_rate: float
    steps: int
    published_step: int | None = Field(
        default=None, description="whose weights these are; null in results of older versions"
    )
    pairs_seen: int
    seconds: float
    checkpoint_id: str
    evaluation: Evaluation
    mixture_weights: dict[str, float] | None = None


class SearchSummary(SpecModel):
    """What the search did and how sure its choice is."""

    study_id: str
    trials: int
    infeasible: int
    winner_trial: int | None = Field(description="null: the budget paid for no trial")
    tied_trials: tuple[int, ...] = Field(description="not told apart from the winner")
    stopped_by: Literal["finished", "decided", "budget"] = Field(
        description="all of the plan is done; what was left would hardly change the answer; "
        "nothing that was left fitted into the budget"
    )
    sentence: str


class TrainingResult(SpecModel):
    """The evidence of a fine-tuning job."""

    recommendation_id: str | None = None
    search: SearchSummary | None = None
    run: RunSummary
    baseline: RunSummary | None = Field(description="plain DPO's run; null when it diverged")
    last: RunSummary | None = Field(
        default=None,
        description="the run's last weights, where earlier ones were better on validation",
    )
    comparison: Comparison
    samples: tuple[GeneratedSample, ...]
    heavy_tails: HeavyTails | None = Field(
        default=None, description="of `run`; null in results of versions that did not measure it"
    )
    attention: tuple[str, ...] = ()
    bundle: dict[str, str] = Field(description="seeds, hashes and versions for a rerun")
