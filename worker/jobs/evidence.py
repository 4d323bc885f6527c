"""What the steps of a fine-tuning job hand on to each other, kept as their results."""

from core.results import Comparison, Evaluation, HeavyTails, RunSummary
from core.run_spec import CandidateSpec
from core.spec import SpecModel
from worker.jobs.workbench import RunRequest


class Plan(SpecModel):
    """What is to be trained, and against what."""

    winner: CandidateSpec
    baseline: CandidateSpec
    plain_trials: int | None = None

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
            scope=scope, objective=candidate.objective, learning_rate=candidate.learning_rate
        )


class Trained(SpecModel):
    """The result of the steps `train` and `baseline`."""

    steps: int
    pairs_seen: int
    seconds: float
    mixture_weights: dict[str, float] | None
    diverged: str | None = None


class Evidence(SpecModel):
    """The result of the step `evaluate`; ids are drawn here, so that `save` can be repeated.

    Without an evaluation the baseline has diverged and is not published.
    """

    run: Evaluation
    baseline: Evaluation | None
    comparison: Comparison
    attention: tuple[str, ...]
    heavy_tails: HeavyTails
    checkpoint_id: str
    baseline_checkpoint_id: str | None


def run_summary(
    candidate: CandidateSpec, trained: Trained, measured: Evaluation, checkpoint_id: str
) -> RunSummary:
    """What came of a run, as the result tells it."""
    return RunSummary(
        objective=candidate.objective,
        learning_rate=candidate.learning_rate,
        steps=trained.steps,
        pairs_seen=trained.pairs_seen,
        seconds=trained.seconds,
        checkpoint_id=checkpoint_id,
        evaluation=measured,
        mixture_weights=trained.mixture_weights,
    )
