"""What goes wrong in one trial stays in that trial, and what a person should look at is said."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.lifecycle import Attention, EndedBy, EventType, TrialStatus
from core.results import TrainingResult
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from tests.integration.training_world import TrainingWorld, micro_llama, running_world
from worker.jobs import fine_tune
from worker.jobs.scopes import ScopeHooks
from worker.jobs.workbench import Workbench
from worker.training.run import RunOutcome

AUTO: dict[str, Any] = {
    "type": "auto",
    "auto": {
        "search": {"max_trials": 3},
        "hyperparameters": {"batch_size": 14, "lora_r": 2},
    },
}


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str) -> Iterator[TrainingWorld]:
    model = micro_llama(tmp_path / "model")
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=80) as made:
        yield made


def spoil(monkeypatch: pytest.MonkeyPatch, *, scope: str, after_step: int) -> None:
    """Put NaN into a weight of the adapter between two steps of a run."""
    train, stepped = Workbench.train, ScopeHooks.stepped
    benches: list[Workbench] = []

    def remember(bench: Workbench, *given: Any, **options: Any) -> RunOutcome:
        benches.append(bench)
        return train(bench, *given, **options)

    def spoiled(hooks: ScopeHooks, step: int, total: int) -> None:
        stepped(hooks, step, total)
        if (hooks.scope, step) == (scope, after_step):
            weight = next(iter(benches[-1].policy.adapter().values()))
            with torch.no_grad():
                weight.fill_(torch.nan)

    monkeypatch.setattr(Workbench, "train", remember)
    monkeypatch.setattr(ScopeHooks, "stepped", spoiled)


def test_nan_ends_its_trial_as_infeasible_and_the_job_goes_on(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, scope="trial:1", after_step=1)
    job_id = world.fine_tune(AUTO)
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert result.search is not None
    assert (result.search.trials, result.search.infeasible) == (3, 1)
    assert result.search.winner_trial != 1
    with world.database.reading() as session:
        experiments = ExperimentRepository(session)
        study = experiments.study_of(job_id)
        assert study is not None
        rows = {row.number: row for row in experiments.trials(study.id)}
        events = events_after(session, job_id, 0, 1000)
    assert [rows[n].status for n in range(3)] == [
        TrialStatus.COMPLETE, TrialStatus.FAIL, TrialStatus.COMPLETE,
    ]  # fmt: skip
    broken = rows[1]
    assert (broken.ended_by, broken.feasible, broken.log_loss) == (EndedBy.NAN, False, None)
    said = str(broken.metrics["message"])
    assert said.startswith("loss or gradient is not finite at step 2; pairs ")
    assert len(said.split("; pairs ")[1].split(", ")) == 14, "the batch is named, pair by pair"
    failed = [event for event in events if event.type is EventType.TRIAL_FAILED]
    assert len(failed) == 1


def test_a_run_that_makes_chosen_answers_unlikely_asks_for_attention(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A micro model does not displace likelihood by itself: let any fall be enough.
    monkeypatch.setattr("worker.jobs.flags.DISPLACED", -1e6)
    monkeypatch.setattr("worker.jobs.flags.DIVERGING", -1.0)
    job_id = world.fine_tune(
        {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 16, "batch_size": 4}}}
    )
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    flags = [Attention.LIKELIHOOD_DISPLACEMENT, Attention.LOSS_DIVERGING]
    assert list(result.attention) == flags
    with world.database.reading() as session:
        job = JobRepository(session).get(world.owner_id, job_id)
        events = events_after(session, job_id, 0, 1000)
    assert job.attention == flags
    told = [e.data["attention"] for e in events if e.type is EventType.JOB_WARNING]
    assert told == flags
