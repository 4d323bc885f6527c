"""The owner's earlier searches: what selection compares, and what a clone begins with."""

from sqlalchemy.orm import Session

from core.profile import Recommendation
from core.run_spec import CandidateSpec
from core.spec import DivergenceName, KernelName
from models.experiment import StudyRow
from models.repositories.experiments import ExperimentRepository
from models.repositories.searches import SearchRepository, TaskRecord, TrialKey
from selection.carry import best_settings, has_room
from selection.draws import candidate_at
from selection.history import Gain, PastSearch
from selection.study import PLAIN, Origin, Plan
from selection.wire import TaskFacts, plan_from_json, setting_to_json, study_of
from worker.context import JobContext

MOST_SEARCHES = 100


def past_searches(context: JobContext) -> list[PastSearch]:
    """Return the latest ended searches of the job's owner with what their pairs have won.

    None for a clone that is to know nothing.
    """
    if context.job.spec.get("warm_start") is False:
        return []
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


def carry_over(context: JobContext, session: Session, study: StudyRow, plan: Plan) -> None:
    """Let the search of a clone begin with what the study that it is made from has found best.

    Those settings are the first draws of their arms. With too small a budget of trials for that
    there are none.
    """
    spec = context.job.spec
    if not spec.get("warm_start"):
        return
    earlier = ExperimentRepository(session).study(context.job.owner_id, spec["cloned_from"])
    repository = SearchRepository(session)
    if not earlier.plan:  # a search of an old version
        return
    facts = [TaskFacts(**record.facts()) for record in repository.records(earlier.id)]
    known = study_of(facts, elapsed_seconds=0.0)
    arms = {arm.name: arm for arm in plan.arms}
    found = best_settings(plan_from_json(earlier.plan), known, leading=plan.shape.leading)
    kept = {name: setting for name, setting in found.items() if name in arms}
    if not plan.shape.draws or not has_room(plan, len(kept)):
        return
    for name, setting in kept.items():
        repository.add(
            study, TrialKey(name, 1, 0), rung=plan.draw_rung, start=0,
            setting=setting_to_json(setting), origin=Origin.INCUMBENT.value,
            candidate=candidate_at(arms[name].candidate, setting).model_dump(mode="json"),
            reason=f"the best setting of study {earlier.id}",
        )  # fmt: skip
