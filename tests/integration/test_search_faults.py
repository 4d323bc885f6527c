"""A search whose job is cancelled or paused between two tasks, whose helpers or trials fail."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CancelRequested
from core.lifecycle import AttemptOutcome, EndedBy, JobKind, JobStatus, TaskStatus, TrialStatus
from core.queue import QueueName
from core.results import TrainingResult
from models.job import Job
from models.repositories.jobs import JobRepository
from models.repositories.searches import SearchRepository, TaskEnd
from models.repositories.workers import WorkerRepository
from selection.study import HARD_LIMIT
from selection.wire import plan_from_json
from tests.integration.searches import auto, study_of
from tests.integration.training_world import Killed, TrainingWorld, micro_llama, running_world
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs import fine_tune, search_plan, search_tasks
from worker.jobs.search_turns import MAX_FAILED_HELPERS, Claimed, Closed, Pausing, Waiting, claim
from worker.jobs.workbench import Workbench


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_llama(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, model: Path) -> Iterator[TrainingWorld]:
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=80) as made:
        yield made


def begun(world: TrainingWorld, method: dict[str, Any]) -> tuple[JobContext, str]:
    """A job that runs and whose search has a plan and no task yet."""
    job_id = world.fine_tune(method)
    claimed = world.claim()
    assert claimed is not None
    context = world.context(claimed)

    def stop_here(_bench: Workbench, _study_id: str, **_options: Any) -> int:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.jobs.search.work", stop_here)
        with pytest.raises(Killed):
            fine_tune.run(context)
    return context, study_of(world, job_id)[0].id


def helper_of(world: TrainingWorld, parent: JobContext, study_id: str) -> JobContext:
    """A running job that helps the search."""
    with world.database.transaction() as session:
        JobRepository(session).create(
            owner_id=world.owner_id, kind=JobKind.SEARCH, seed=parent.job.seed,
            spec={**parent.job.spec, "study_id": study_id}, dataset_id=world.dataset_id,
            model=str(world.model), parent_id=parent.fence.job_id,
        )  # fmt: skip
    claimed = world.claim()
    assert claimed is not None
    return world.context(claimed)


def job_of(world: TrainingWorld, job_id: str) -> Job:
    with world.database.reading() as session:
        return JobRepository(session).get(world.owner_id, job_id)


# ------------------------------------------------------ cancelled and paused


def test_a_cancel_between_two_tasks_ends_the_search_without_a_winner(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.fine_tune(auto(shape="least"))
    real = search_tasks.run_task

    def then_cancelled(bench: Workbench, claimed: Claimed, **options: Any) -> None:
        real(bench, claimed, **options)
        with world.database.transaction() as session:
            JobRepository(session).request_cancel(world.owner_id, job_id)

    monkeypatch.setattr(search_tasks, "run_task", then_cancelled)
    with pytest.raises(CancelRequested):
        world.attempt(fine_tune.run)
    study, records = study_of(world, job_id)
    assert study.ended_at is None
    assert len(records) == 1


def test_who_helps_leaves_when_the_search_is_to_pause_and_its_job_waits_to_be_told(
    world: TrainingWorld,
) -> None:
    parent, study_id = begun(world, auto(shape="least"))
    helper = helper_of(world, parent, study_id)
    assert isinstance(claim(helper, study_id), Claimed)
    with world.database.transaction() as session:
        jobs = JobRepository(session)
        jobs.request_pause(jobs.lock(world.owner_id, parent.fence.job_id))
    assert isinstance(claim(helper, study_id), Closed)
    assert isinstance(claim(parent, study_id), Pausing)
    with world.database.transaction() as session:
        jobs = JobRepository(session)
        jobs.resume(jobs.get(world.owner_id, parent.fence.job_id))
    assert isinstance(claim(parent, study_id), Claimed)


# ------------------------------------------------------------------ helpers


def live_workers(world: TrainingWorld, count: int) -> None:
    with world.database.transaction() as session:
        for number in range(count):
            WorkerRepository(session).beat(
                f"wrk_{number}", host="h", pid=1, version="0", queues=[QueueName.GPU],
                draining=False,
            )  # fmt: skip


def test_no_more_tasks_run_at_once_than_parallelism_allows(world: TrainingWorld) -> None:
    parent, study_id = begun(world, auto(shape="least", parallelism=2))
    helper = helper_of(world, parent, study_id)
    assert isinstance(claim(parent, study_id), Claimed)
    with world.database.transaction() as session:
        study = SearchRepository(session).lock(study_id)
        study.spec = {**study.spec, "parallelism": 1}
    assert isinstance(claim(helper, study_id), Waiting)


def test_who_could_not_help_often_enough_is_asked_no_more(world: TrainingWorld) -> None:
    live_workers(world, 4)
    parent, study_id = begun(world, auto(shape="lean"))
    asked = 0
    for _ in range(MAX_FAILED_HELPERS + 1):
        assert isinstance(claim(parent, study_id), Claimed)
        helper = world.claim()
        if helper is None:
            break
        asked += 1
        error = {"code": "out_of_memory", "message": "no room for the model", "retryable": False}
        with world.database.transaction() as session:
            JobRepository(session).finish(
                helper.fence, JobStatus.FAILED, error=error, message="failed"
            )
    assert asked == MAX_FAILED_HELPERS


def test_a_worker_that_loses_helpers_gets_no_more_of_them_and_takes_no_task_with_it(
    world: TrainingWorld,
) -> None:
    """Its tasks are done by the others, who ask somebody else for help."""
    live_workers(world, 2)
    parent, study_id = begun(world, auto(shape="lean"))
    for _ in range(3):
        assert isinstance(claim(parent, study_id), Claimed)
        with world.database.transaction() as session:
            bad = JobRepository(session).claim(QueueName.GPU, worker_id="wrk_bad", lease_s=60.0)
        assert bad is not None, "help was asked for"
        assert isinstance(claim(world.context(bad), study_id), Claimed)
        with world.database.transaction() as session:
            status = JobRepository(session).lose(
                bad.fence, message="killed", log_tail=[], max_losses=5, backoff_s=0.0
            )
        assert status is JobStatus.FAILED
    _, records = study_of(world, parent.fence.job_id)
    assert max(record.task.losses for record in records) <= 1
    assert isinstance(claim(parent, study_id), Claimed)
    with world.database.transaction() as session:
        jobs = JobRepository(session)
        assert jobs.claim(QueueName.GPU, worker_id="wrk_bad", lease_s=60.0) is None, "quarantined"
        assert jobs.claim(QueueName.GPU, worker_id="wrk_good", lease_s=60.0) is not None


def test_what_a_helper_does_is_progress_of_the_job_that_it_helps(world: TrainingWorld) -> None:
    """Else a job is given up whose own worker dies again and again while its search goes on."""
    parent, study_id = begun(world, auto(shape="least"))
    helper = helper_of(world, parent, study_id)
    with world.database.transaction() as session:
        JobRepository(session).lose(
            parent.fence, message="killed", log_tail=[], max_losses=5, backoff_s=0.0
        )
    assert job_of(world, parent.fence.job_id).losses == 1
    taken = claim(helper, study_id)
    assert isinstance(taken, Claimed)
    end = TaskEnd(
        ended_by=EndedBy.BUDGET, seconds=1.0, log_loss=0.6, drift=0.01, feasible=True,
        metrics={"steps": 5.0}, is_last=False,
    )  # fmt: skip
    with world.database.transaction() as session:
        repository = SearchRepository(session)
        repository.finish(helper.fence, repository.lock(study_id), taken.record, end)
    assert job_of(world, parent.fence.job_id).losses == 0


# ---------------------------------------------------------- trials that fail


def test_what_has_no_room_or_no_solution_is_one_trial_and_not_the_search(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it happens outside of a step: in building the objective, here of two divergences."""
    errors = {
        "kl": (torch.OutOfMemoryError("no room"), EndedBy.OOM),
        "jensen_shannon": (torch.linalg.LinAlgError("not positive-definite"), EndedBy.NAN),  # type: ignore[attr-defined]
    }
    real, timed = Workbench._inputs, 0

    def inputs(self: Workbench, spec: Any, passes: Any) -> Any:
        nonlocal timed
        if spec.divergence_term is not None and spec.divergence_name in errors:
            timed += 1
            raise errors[spec.divergence_name][0]
        return real(self, spec, passes)

    monkeypatch.setattr(Workbench, "_inputs", inputs)
    job_id = world.fine_tune(auto(shape="lean"))
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    study, records = study_of(world, job_id)
    failed = [r for r in records if r.task.ended_by is not EndedBy.BUDGET]
    for name, (_, ended_by) in errors.items():
        assert {r.task.ended_by for r in failed if name in r.trial.arm} == {ended_by}
    assert all(any(name in r.trial.arm for name in errors) for r in failed)
    assert {r.trial.status for r in failed} == {TrialStatus.FAIL}
    assert len(plan_from_json(study.plan).arms) == 1 + 35
    assert result.search is not None
    assert result.search.infeasible == len(failed)
    assert timed > len(failed), "they could not be timed either"


def test_a_task_waits_no_more_when_the_search_has_ended(world: TrainingWorld) -> None:
    parent, study_id = begun(world, auto(shape="least", gpu_seconds=60.0))
    taken = claim(parent, study_id)
    assert isinstance(taken, Claimed)
    with world.database.transaction() as session:
        repository = SearchRepository(session)
        study = repository.lock(study_id)
        JobRepository(session).requeue(
            parent.fence, AttemptOutcome.LOST, delay_s=0.0, message="killed"
        )
        repository.reclaim(study, max_losses=3)
        repository.end(study, by="budget", reason="nothing fits")
    _, (record,) = study_of(world, parent.fence.job_id)
    assert (record.task.status, record.task.ended_by) == (TaskStatus.ENDED, EndedBy.PRUNER)
    assert record.trial.status is TrialStatus.PRUNED


# ------------------------------------------------------------------- budgets


def slow_scoring(patch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Every scoring takes longer than the one before it."""
    real, calls = Workbench.measure, 0

    def measure(self: Workbench, split: Split, **options: Any) -> Any:
        nonlocal calls
        if (progress := options.get("progress")) is not None:
            calls += 1
            for part in range(20):
                time.sleep(calls * seconds / 20)
                progress(part, 20)
        return real(self, split, **options)

    patch.setattr(Workbench, "measure", measure)


def test_a_budget_holds_where_scoring_gets_slower_and_slower(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_scoring(monkeypatch, seconds=0.4)
    job_id = world.fine_tune(auto(gpu_seconds=8.0, shape="lean"))
    world.attempt(fine_tune.run)
    _, records = study_of(world, job_id)
    spent = sum(r.task.seconds + r.task.lost_seconds for r in records)
    assert 4.0 < spent <= HARD_LIMIT * 8.0 + 0.3, "a part of a scoring may come on top"


def test_seconds_of_a_scoring_that_was_killed_are_counted(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_tasks, "SPEND_EVERY_S", 0.0)
    job_id = world.fine_tune(auto(shape="least"))
    real, calls = Workbench.measure, 0

    def measure(self: Workbench, split: Split, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            time.sleep(0.8)
            options["progress"](1, 2)
            raise Killed
        return real(self, split, **options)

    monkeypatch.setattr(Workbench, "measure", measure)
    with pytest.raises(Killed):
        world.attempt(fine_tune.run)
    world.attempt(fine_tune.run)
    _, records = study_of(world, job_id)
    lost = [r.task.lost_seconds for r in records if r.task.lost_seconds]
    assert len(lost) == 1
    assert lost[0] >= 0.8


def test_a_deadline_counts_on_the_workers_that_there_are(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = search_plan.measure_rates

    def measured(*arguments: Any) -> search_plan.Rates:
        return replace(real(*arguments), step=1.0, score=0.5)

    monkeypatch.setattr(search_plan, "measure_rates", measured)
    shapes = []
    for workers in (1, 16):
        live_workers(world, workers)
        _, study_id = begun(world, auto(deadline_seconds=60.0))
        with world.database.reading() as session:
            shapes.append(SearchRepository(session).of(study_id).shape)
    assert shapes == ["least", "wide"]
