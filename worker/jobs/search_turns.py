"""Turns of a search: what a free attempt does next, decided and written down at once.

The decision what comes next and the row that says who does it are one transaction under the lock
of the study (docs/decisions/0017), so that no task is done twice and none is forgotten. A killed
worker's task waits again as soon as its attempt has ended, and goes on from its last point.
"""

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import assert_never

from sqlalchemy.orm import Session

from core.errors import CancelRequested
from core.lifecycle import JobKind
from core.queue import QueueName
from models.experiment import StudyRow
from models.repositories.jobs import JobRepository
from models.repositories.searches import SearchRepository, TaskRecord, TrialKey
from models.repositories.workers import WorkerRepository
from selection.quote import Quote, quote
from selection.rungs import decide
from selection.study import Plan, Running, Start, Stop, Study, Wait
from selection.wire import TaskFacts, plan_from_json, setting_to_json, study_of
from worker.context import JobContext
from worker.jobs.search_plan import LIVE_S

log = logging.getLogger("kdpo.search")

MAX_TASK_LOSSES = 3
"""Workers that a task may take with it before it is given up."""
MAX_FAILED_HELPERS = 3
"""After so many helpers that could not help nobody is asked any more."""
_HELPER_PRIORITY = -1


@dataclass(frozen=True)
class Sight:
    """How far a search is: tasks done and expected in all, and the part of its price that is spent.

    `eta` are wall seconds with those who work on it now, as likely too short as too long, and in 9
    of 10 cases enough.
    """

    done: int
    tasks: int
    fraction: float
    eta: float
    eta_p90: float


@dataclass(frozen=True)
class Claimed:
    """A task that is now this attempt's; `after` is the fraction when it has ended."""

    study: StudyRow
    plan: Plan
    record: TaskRecord
    start: Start
    sight: Sight
    after: float


@dataclass(frozen=True)
class Waiting:
    """What comes next depends on tasks that others have."""

    sight: Sight


@dataclass(frozen=True)
class Pausing:
    """The job is to be laid aside, and its worker is about to be told."""


@dataclass(frozen=True)
class Closed:
    """The search has ended; of a helper: or its job is to stop."""


Turn = Claimed | Waiting | Pausing | Closed


def known(repository: SearchRepository, study: StudyRow) -> tuple[Study, list[TaskRecord]]:
    """All that is known of a search, as a value and as rows."""
    records = repository.records(study.id)
    facts = [TaskFacts(**record.facts()) for record in records]
    return study_of(facts, elapsed_seconds=repository.elapsed(study)), records


def claim(context: JobContext, study_id: str) -> Turn:
    """Decide what this attempt does next, and write it down; one at a time per study.

    Raises:
        CancelRequested: the job is to be cancelled.
        LeaseLost: the attempt does not own its job (any more).
    """
    with context.transaction() as session:
        repository = SearchRepository(session)
        study = repository.lock(study_id)
        # From here on the job whose search it is goes on as it is, too.
        if JobRepository(session).guard(context.fence).cancel_requested:
            raise CancelRequested(f"job {context.fence.job_id} was cancelled")
        if not repository.is_open(study):
            helps = context.job.parent_id is not None
            return Closed() if helps or study.ended_at is not None else Pausing()
        for task in repository.reclaim(study, max_losses=MAX_TASK_LOSSES):
            log.warning("task %s was left by its worker", task.id)
        plan = plan_from_json(study.plan)
        state, records = known(repository, study)
        price = quote(plan, state, workers=1 + len(state.running))
        _promise(repository, study, plan, state, price)
        if len(state.running) >= (study.spec.get("parallelism") or math.inf):
            return Waiting(_sight(state, price))
        action = decide(plan, state)
        match action:
            case Start():
                record = _take(context, repository, study, records, action)
                _call_for_help(context, session, study, plan, state, action)
                after = price.spent + action.expected_seconds
                return Claimed(
                    study, plan, record, action, _sight(state, price), _share(after, price)
                )
            case Stop(by=by, reason=reason):
                repository.end(study, by=by.value, reason=reason)
                return Closed()
            case Wait():
                return Waiting(_sight(state, price))
            case _:
                assert_never(action)


def _sight(state: Study, price: Quote) -> Sight:
    done = len(state.ended)
    return Sight(done, done + price.tasks, _share(price.spent, price), price.eta, price.eta_p90)


def _share(seconds: float, price: Quote) -> float:
    return min(seconds / price.p50, 1.0) if price.p50 > 0.0 else 0.0


def _take(
    context: JobContext,
    repository: SearchRepository,
    study: StudyRow,
    records: list[TaskRecord],
    start: Start,
) -> TaskRecord:
    task = start.task
    key = TrialKey(task.trial.arm, task.trial.draw, task.trial.repeat)
    record = next((r for r in records if _key(r) == key and r.task.rung == task.rung), None)
    if record is None:
        record = repository.add(
            study, key, rung=task.rung, start=task.start,
            setting=setting_to_json(task.trial.setting), origin=task.trial.origin.value,
            candidate=start.candidate.model_dump(mode="json"), reason=start.reason,
        )  # fmt: skip
    repository.take(
        context.fence, study, record,
        limit_seconds=start.limit_seconds if math.isfinite(start.limit_seconds) else None,
        label=start.candidate.objective.label,
    )  # fmt: skip
    return record


def _key(record: TaskRecord) -> TrialKey:
    return TrialKey(record.trial.arm, record.trial.draw, record.trial.repeat)


def _call_for_help(
    context: JobContext, session: Session, study: StudyRow, plan: Plan, state: Study, start: Start
) -> None:
    """Queue another job for this search where a free worker would find a task of it."""
    spec = study.spec
    with_this = replace(
        state,
        running=(*state.running, Running(start.task, start.limit_seconds)),
        waiting=tuple(task for task in state.waiting if task.key != start.task.key),
    )
    if not isinstance(decide(plan, with_this), Start):
        return
    repository = SearchRepository(session)
    helpers = repository.open_helpers(study.job_id)
    workers = WorkerRepository(session).ready(QueueName.GPU, within_s=LIVE_S)
    if helpers + 1 >= min(workers, spec.get("parallelism") or workers):
        return
    if repository.failed_helpers(study.job_id) >= MAX_FAILED_HELPERS:
        return
    job = context.job
    JobRepository(session).create(
        owner_id=job.owner_id, kind=JobKind.SEARCH, spec={**job.spec, "study_id": study.id},
        dataset_id=job.dataset_id, model=job.model, seed=job.seed, parent_id=study.job_id,
        priority=_HELPER_PRIORITY,
    )  # fmt: skip


def _promise(
    repository: SearchRepository, study: StudyRow, plan: Plan, state: Study, price: Quote
) -> None:
    """Keep the quotes of the beginning and of the end of screening."""
    screened = {arm.name for arm in plan.screened} - {
        ended.task.trial.arm for ended in state.ended if ended.task.rung == 0
    }
    begun = state.ended or state.running
    moment = "start" if not begun else None if screened else "screened"
    if moment is None or any(kept["at"] == moment for kept in study.quotes):
        return
    repository.quote(
        study,
        {"at": moment, **{name: round(value, 3) for name, value in asdict(price).items()}},
        f"The search will take {price.p50:.0f} device seconds (P90 {price.p90:.0f}), "
        f"{price.spent:.0f} of them spent; with workers: {price.workers} it ends in about "
        f"{price.eta:.0f} s.",
    )
