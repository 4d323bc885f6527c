"""The owner's finished searches, as selection compares them."""

from core.profile import Recommendation
from core.run_spec import CandidateSpec
from core.spec import DivergenceName, KernelName
from models.experiment import TrialRow
from models.repositories.experiments import ExperimentRepository
from selection.history import Gain, PastSearch
from worker.context import JobContext

MOST_SEARCHES = 100
# Trials of the sampler turn every knob at once; these have the strengths of a ranking.
_COMPARABLE = ("recommended", "coverage")


def past_searches(context: JobContext) -> list[PastSearch]:
    """Return the latest finished searches of the job's owner with what their pairs have won."""
    with context.database.reading() as session:
        experiments = ExperimentRepository(session)
        found = []
        for row, trials in experiments.finished_searches(context.job.owner_id, limit=MOST_SEARCHES):
            profile = Recommendation.model_validate(row.result).profile
            found.append(PastSearch(profile=profile, model=row.model, gains=_gains(trials)))
        return found


def _gains(trials: list[TrialRow]) -> tuple[Gain, ...]:
    plain = next((t.log_loss for t in trials if t.origin == "baseline"), None)
    if plain is None or plain <= 0.0:
        return ()
    gains = []
    for trial in trials:
        if trial.origin not in _COMPARABLE or trial.log_loss is None:
            continue
        objective = CandidateSpec.model_validate(trial.candidate).objective
        kernel, divergence = objective.kernel_term, objective.divergence_term
        gains.append(
            Gain(
                kernel=None if kernel is None else KernelName(kernel.kernel.type),
                divergence=None
                if divergence is None
                else DivergenceName(divergence.divergence.type),
                percent=100.0 * (plain - trial.log_loss) / plain,
            )
        )
    return tuple(gains)
