"""The search inside an `auto` job: rungs, budgets, trials given up, what Optuna is told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from core.lifecycle import EndedBy, JobKind, JobStatus, TaskStatus, TrialStatus
from core.results import TrainingResult
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from selection.wire import plan_from_json
from tests.integration.searches import STEPS, auto, study_of
from tests.integration.training_world import Killed, TrainingWorld, micro_llama, running_world
from worker.jobs import fine_tune, help_search, search_tasks
from worker.jobs.past import gains_of
from worker.jobs.scopes import ScopeStore
from worker.jobs.workbench import Workbench
from worker.training.optuna_storage import open_storage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_llama(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, model: Path) -> Iterator[TrainingWorld]:
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=80) as made:
        yield made


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path, model: Path
) -> Iterator[tuple[TrainingWorld, str, TrainingResult]]:
    root = tmp_path_factory.mktemp("searched")
    (root / "kdpo.db").write_bytes(_sqlite_template.read_bytes())
    url = f"sqlite:///{root / 'kdpo.db'}"
    with running_world(root, url=url, model=model, pairs=80) as made:
        job_id = made.fine_tune(auto(shape="few"))
        yield made, job_id, TrainingResult.model_validate(made.attempt(fine_tune.run))


def test_the_best_go_on_from_where_they_stopped(
    searched: tuple[TrainingWorld, str, TrainingResult],
) -> None:
    world, job_id, result = searched
    study, records = study_of(world, job_id)
    plan = plan_from_json(study.plan)
    assert plan.rungs == (5, STEPS)
    assert study.shape == "few"
    assert len(plan.arms) == 1 + 35
    first = [r for r in records if r.task.rung == 0]
    last = [r for r in records if r.task.rung == 1]
    # six arms, plain DPO, two draws of it and of the leading arm; then the best and plain DPO
    assert len(first) == 6 + 1 + 2 + 2
    assert len(last) == plan.shape.kept[-1] + 1
    assert {r.task.start for r in first} == {0}
    assert {r.task.start for r in last} == {5}
    assert {r.trial.id for r in last} <= {r.trial.id for r in first}
    assert {r.trial.status for r in last} == {TrialStatus.COMPLETE}
    left = {r.trial.id: r.trial for r in first if r.trial.rung == 0}
    assert {trial.status for trial in left.values()} == {TrialStatus.PRUNED}
    assert {trial.ended_by for trial in left.values()} == {EndedBy.PRUNER}
    with world.database.reading() as session:
        curve = ExperimentRepository(session).metrics(job_id, f"trial:{last[0].trial.number}")
    assert [point.step for point in curve] == list(range(1, STEPS + 1)), "no step is made twice"
    assert result.search is not None
    assert result.search.stopped_by in ("finished", "decided")
    assert result.run.steps == STEPS
    assert [quote["at"] for quote in study.quotes] == ["start", "screened"]
    assert study.quotes[0]["tasks"] == len(records)


def test_the_final_run_is_the_trial_that_was_it(
    searched: tuple[TrainingWorld, str, TrainingResult],
) -> None:
    world, job_id, result = searched
    assert result.search is not None
    with world.database.reading() as session:
        experiments = ExperimentRepository(session)
        curves = [
            [(point.step, point.metrics) for point in experiments.metrics(job_id, scope)]
            for scope in ("train", f"trial:{result.search.winner_trial}")
        ]
        job = JobRepository(session).get(world.owner_id, job_id)
    assert curves[0] == curves[1]
    _, records = study_of(world, job_id)
    spent = sum(r.task.seconds + r.task.lost_seconds for r in records)
    assert job.gpu_seconds == pytest.approx(spent), "what the search has paid is not paid again"
    trials = world.settings.artifact_dir / "jobs" / job_id / "trials"
    assert not list(trials.rglob("state.safetensors")), "points are removed with the last run"


def test_a_trial_from_rung_to_rung_is_the_run_in_one_go(
    searched: tuple[TrainingWorld, str, TrainingResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer and lots: the same search again, its final runs from the reference on."""
    world, first, adopted = searched
    monkeypatch.setattr(ScopeStore, "_adopted", lambda _self: None)
    second = world.fine_tune(auto(shape="few"))
    trained = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert trained.search is not None
    assert adopted.search is not None
    assert trained.search.winner_trial == adopted.search.winner_trial
    assert trained.run.evaluation == adopted.run.evaluation
    assert trained.comparison == adopted.comparison
    with world.database.reading() as session:
        experiments = ExperimentRepository(session)
        # Where plain DPO wins it is its own baseline, and runs once.
        plain_wins = trained.run.objective.is_plain_dpo
        for scope, steps in (("train", STEPS), ("baseline", 0 if plain_wins else STEPS)):
            one, other = (
                [(point.step, point.metrics) for point in experiments.metrics(job, scope)]
                for job in (first, second)
            )
            assert len(one) == steps
            assert one == other
        jobs = JobRepository(session)
        paid = [jobs.get(world.owner_id, job).gpu_seconds for job in (first, second)]
    _, records = study_of(world, second)
    assert paid[1] > sum(r.task.seconds for r in records), "these runs were trained again"


def test_optuna_has_every_trial(searched: tuple[TrainingWorld, str, TrainingResult]) -> None:
    world, job_id, _ = searched
    study, records = study_of(world, job_id)
    with open_storage(world.settings) as storage:
        copy = optuna.load_study(study_name=study.name, storage=storage)
        told = {trial.user_attrs["number"]: trial for trial in copy.trials}
    assert set(told) == {r.trial.number for r in records}
    for record in records:
        trial = told[record.trial.number]
        assert trial.state.name == record.trial.status.value.upper()
        if record.trial.status is TrialStatus.COMPLETE:
            assert trial.value == record.trial.log_loss


def test_later_searches_learn_what_pairs_have_won(
    searched: tuple[TrainingWorld, str, TrainingResult],
) -> None:
    world, job_id, _ = searched
    _, records = study_of(world, job_id)
    gains = gains_of(records)
    assert len(gains) == 6, "each screened arm at its recommended setting, once"
    plain = {
        r.task.rung: r.task.log_loss for r in records if (r.trial.arm, r.trial.draw) == ("dpo", 0)
    }
    one = next(r for r in records if r.trial.arm != "dpo" and not r.trial.draw)
    reached = [r for r in records if r.trial.id == one.trial.id]
    rung = max(r.task.rung for r in reached if r.task.rung in plain)
    loss = next(r.task.log_loss for r in reached if r.task.rung == rung)
    base = plain[rung]
    assert loss is not None
    assert base is not None
    assert 100.0 * (base - loss) / base == pytest.approx(gains[0].percent)


def test_a_budget_is_never_passed_by_more_than_two_percent(world: TrainingWorld) -> None:
    job_id = world.fine_tune(auto(gpu_seconds=3.0))
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    study, records = study_of(world, job_id)
    spent = sum(r.task.seconds + r.task.lost_seconds for r in records)
    assert 0.0 < spent <= 1.02 * 3.0
    assert result.search is not None
    assert result.search.stopped_by == study.stopped_by


def test_what_kills_workers_is_given_up(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.fine_tune(auto(max_trials=3))
    real = Workbench.train

    def deadly(self: Workbench, request: Any, **options: Any) -> Any:
        if request.scope == "trial:1":
            raise Killed
        return real(self, request, **options)

    monkeypatch.setattr(Workbench, "train", deadly)
    for _ in range(search_tasks.MAX_TASK_LOSSES):
        with pytest.raises(Killed):
            world.attempt(fine_tune.run)
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    _, records = study_of(world, job_id)
    (poison,) = [r for r in records if r.trial.number == 1]
    assert (poison.task.status, poison.task.ended_by) == (TaskStatus.ENDED, EndedBy.WORKER_LOST)
    assert poison.task.losses == search_tasks.MAX_TASK_LOSSES
    assert poison.trial.status is TrialStatus.FAIL
    assert result.search is not None
    assert result.search.infeasible == 1
    assert result.search.winner_trial != 1


def test_a_helper_works_for_its_parent_and_ends_with_it(world: TrainingWorld) -> None:
    parent = world.fine_tune(auto(shape="least"))
    claim = world.claim()
    assert claim is not None
    context = world.context(claim)
    study_id = ""

    def study_only(self: Workbench, study: str, **options: Any) -> int:
        nonlocal study_id
        study_id = study
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.jobs.search.work", study_only)
        with pytest.raises(Killed):
            fine_tune.run(context)
    with world.database.transaction() as session:
        spec = {**context.job.spec, "study_id": study_id}
        helper = JobRepository(session).create(
            owner_id=world.owner_id, kind=JobKind.SEARCH, spec=spec, dataset_id=world.dataset_id,
            model=str(world.model), seed=context.job.seed, parent_id=parent,
        ).id  # fmt: skip
    assert world.attempt(help_search.run)["tasks"] > 4, "it does all there is"
    study, records = study_of(world, parent)
    assert study.ended_at is not None
    assert {r.task.job_id for r in records} == {helper}
    with world.database.reading() as session:
        jobs = JobRepository(session)
        used = jobs.get(world.owner_id, parent).gpu_seconds
        assert used == pytest.approx(sum(r.task.seconds for r in records)), "the parent pays"

    with world.database.transaction() as session:
        jobs = JobRepository(session)
        idle = jobs.create(
            owner_id=world.owner_id, kind=JobKind.SEARCH, spec=spec, dataset_id=world.dataset_id,
            model=str(world.model), parent_id=parent,
        ).id  # fmt: skip
        jobs.finish(claim.fence, JobStatus.FAILED, error=None, message="the parent ends")
    with world.database.reading() as session:
        assert JobRepository(session).get(world.owner_id, idle).status is JobStatus.CANCELLED
