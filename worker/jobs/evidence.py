"""What the steps of a fine-tuning job hand on to each other, kept as their results."""

from pydantic import Field

from core.errors import FailureCode, RunAborted
from core.results import Comparison, Evaluation, HeavyTails, RunSummary
from core.run_spec import CandidateSpec
from core.spec import SpecModel
from worker.jobs.runs import RunRequest
from worker.training.evaluate import Measured


class Plan(SpecModel):
    """What is to be trained, and against what; `adopts` names trials that are these very runs."""

    winner: CandidateSpec
    baseline: CandidateSpec
    plain_trials: int | None = None
    adopts: dict[str, str] = Field(default={})

    @property
    def has_own_baseline(self) -> bool:
        """Whether plain DPO has to be trained besides the winner."""
        return not self.winner.objective.is_plain_dpo

    def described(self, scope: str) -> str:
        """Name a run with the numbers that it was given, and where plain DPO's come from."""
        candidate = self.winner if scope == "train" else self.baseline
        name = candidate.objective.label if scope == "train" else "plain DPO"
        numbers = (
            f"beta {candidate.objective.beta:.4g}, learning rate {candidate.learning_rate:.3g}"
        )
        if scope == "baseline" and self.plain_trials is not None:
            numbers += f"; plain-DPO trials to choose from: {self.plain_trials}"
        return f"{name} ({numbers})"

    def request(self, scope: str) -> RunRequest:
        """The full-length run of a scope."""
        candidate = self.winner if scope == "train" else self.baseline
        return RunRequest(
            scope=scope, objective=candidate.objective, learning_rate=candidate.learning_rate,
            adopts=self.adopts.get(scope),
        )  # fmt: skip


class Trained(SpecModel):
    """The result of the steps `train` and `baseline`; `best_step` where they were scored."""

    steps: int
    best_step: int | None = None
    pairs_seen: int
    seconds: float
    mixture_weights: dict[str, float] | None
    diverged: str | None = None

    @property
    def published_step(self) -> int:
        """The step whose weights are published."""
        return self.steps if self.best_step is None else self.best_step


class Evidence(SpecModel):
    """The result of the step `evaluate`; ids are drawn here, so that `save` can be repeated.

    Without an evaluation the baseline has diverged and is not published. `last` are the run's last
    weights where others were better on validation.
    """

    run: Evaluation
    baseline: Evaluation | None
    comparison: Comparison
    attention: tuple[str, ...]
    heavy_tails: HeavyTails
    checkpoint_id: str
    baseline_checkpoint_id: str | None
    last: Evaluation | None = None
    last_checkpoint_id: str | None = None


def run_summary(
    candidate: CandidateSpec,
    trained: Trained,
    measured: Evaluation,
    checkpoint_id: str,
    *,
    step: int | None = None,
) -> RunSummary:
    """What came of a run, as the result tells it; `step` where it is not the published one."""
    return RunSummary(
        objective=candidate.objective,
        learning_rate=candidate.learning_rate,
        steps=trained.steps,
        published_step=trained.published_step if step is None else step,
        pairs_seen=trained.pairs_seen,
        seconds=trained.seconds,
        checkpoint_id=checkpoint_id,
        evaluation=measured,
        mixture_weights=trained.mixture_weights,
    )


def refuse_non_finite(run: Measured) -> None:
    """Make sure that a run can be told anything about.

    Raises:
        RunAborted: a log-prob on test is not finite (`loss_nan`).
    """
    if not run.is_finite:
        raise RunAborted(
            "run `train`: log-probs on test are not finite",
            failure=FailureCode.LOSS_NAN,
            hint="lower the learning rate",
        )
