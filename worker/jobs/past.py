"""The owner's finished searches, as selection compares them."""

from core.profile import Recommendation
from core.run_spec import CandidateSpec
from core.spec import DivergenceName, KernelName
from models.repositories.searches import SearchRepository, TaskRecord
from selection.history import Gain, PastSearch
from selection.study import PLAIN
from worker.context import JobContext

MOST_SEARCHES = 100


def past_searches(context: JobContext) -> list[PastSearch]:
    """Return the latest ended searches of the job's owner with what their pairs have won."""
    with context.database.reading() as session:
        found = []
        finished = SearchRepository(session).finished(context.job.owner_id, limit=MOST_SEARCHES)
        for row, records in finished:
            profile = Recommendation.model_validate(row.result).profile
            found.append(PastSearch(profile=profile, model=row.model, gains=gains_of(records)))
        return found


def gains_of(records: list[TaskRecord]) -> tuple[Gain, ...]:
    """What each arm as it is recommended has won over plain DPO, of equal length.

    Taken from the longest rung that both have come to; a drawn setting tells of the setting.
    """
    losses: dict[str, dict[int, float]] = {}
    objectives = {}
    for record in records:
        trial, loss = record.trial, record.task.log_loss
        if trial.draw or trial.repeat or loss is None:
            continue
        losses.setdefault(trial.arm, {})[record.task.rung] = loss
        objectives[trial.arm] = CandidateSpec.model_validate(trial.candidate).objective
    plain = losses.pop(PLAIN, {})
    gains = []
    for arm, by_rung in losses.items():
        common = max(set(by_rung) & set(plain), default=None)
        if common is None or plain[common] <= 0.0:
            continue
        kernel, divergence = objectives[arm].kernel_term, objectives[arm].divergence_term
        gains.append(
            Gain(
                kernel=None if kernel is None else KernelName(kernel.kernel.type),
                divergence=None
                if divergence is None
                else DivergenceName(divergence.divergence.type),
                percent=100.0 * (plain[common] - by_rung[common]) / plain[common],
            )
        )
    return tuple(gains)
