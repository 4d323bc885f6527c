"""A search that really trains takes what people ask of it; a clone begins with what it found."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.main import create_app
from core.lifecycle import EndedBy, TaskStatus, TrialStatus
from core.results import TrainingResult
from models.experiment import StudyRow, TaskRow
from models.repositories.searches import TaskRecord
from tests.integration.api_world import World
from tests.integration.searches import auto, study_of
from tests.integration.training_world import Killed, TrainingWorld, micro_llama, running_world
from worker.jobs import fine_tune, search_tasks

ARM = "rbf × jensen_shannon"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_llama(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def trained(tmp_path: Path, sqlite_url: str, model: Path) -> Iterator[TrainingWorld]:
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=80) as made:
        yield made


@pytest.fixture
def api(trained: TrainingWorld) -> Iterator[World]:
    app = create_app(trained.settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield World(app, client, trained.database, trained.settings)


def after_tasks(patch: pytest.MonkeyPatch, count: int, ask: Callable[[str], None]) -> None:
    """Let a person ask for something when so many tasks of the search that runs have ended."""
    real, ended = search_tasks.run_task, 0

    def run(bench: Any, claimed: search_tasks.Claimed, **options: Any) -> None:
        nonlocal ended
        real(bench, claimed, **options)
        ended += 1
        if ended == count:
            ask(claimed.study.id)

    patch.setattr(search_tasks, "run_task", run)


def test_a_running_search_takes_orders_and_a_clone_begins_with_what_it_found(
    trained: TrainingWorld, api: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = trained.fine_tune(auto(max_trials=2))

    def ask(study_id: str) -> None:
        url = f"/v1/studies/{study_id}"
        changed = api.client.patch(
            url, json={"max_trials": 8, "shape": "least"}, headers=api.headers()
        )
        assert changed.status_code == 200, changed.text
        asked = api.post(
            f"{url}/trials", json={"arm": ARM, "factors": {"learning_rate": 2.0, "beta": 0.5}}
        )
        assert asked.status_code == 201, asked.text
        quote = api.get(f"{url}/quote").json()
        assert quote["tasks"] > 3
        assert quote["p50"] > quote["spent"] > 0.0

    with monkeypatch.context() as patch:
        after_tasks(patch, 1, ask)
        TrainingResult.model_validate(trained.attempt(fine_tune.run))
    study, records = study_of(trained, job_id)
    (hand,) = [r for r in records if r.trial.origin == "hand" and r.task.rung == 0]
    assert (hand.task.status, hand.task.ended_by) == (TaskStatus.ENDED, EndedBy.BUDGET)
    assert hand.trial.number == 1, "it was the very next"
    assert hand.trial.status in (TrialStatus.COMPLETE, TrialStatus.PRUNED)
    assert hand.task.log_loss is not None
    arms = {arm["name"]: arm["candidate"] for arm in study.plan["arms"]}
    own = hand.trial.candidate
    assert own["learning_rate"] == pytest.approx(2.0 * arms[ARM]["learning_rate"])
    assert own["objective"]["beta"] == pytest.approx(0.5 * arms[ARM]["objective"]["beta"])
    begun = {record.trial.id for record in records}
    assert 2 < len(begun) <= 8, "the first limit was two"
    best = api.get(f"/v1/studies/{study.id}/best").json()
    assert (best["provisional"], best["basis"]) == (False, "paired")
    _clone_begins_warm(trained, api, study, hand)


def _clone_begins_warm(
    trained: TrainingWorld, api: World, study: StudyRow, hand: TaskRecord
) -> None:
    """The clone is stopped when it has taken its first task."""
    with trained.database.transaction() as session:
        found = update(TaskRow).where(TaskRow.trial_id == hand.trial.id)
        session.execute(found.values(log_loss=0.8 * TaskRow.log_loss))
    answer = api.post(
        f"/v1/studies/{study.id}/clone", json={"search": {"shape": "least", "max_trials": None}}
    )
    assert answer.status_code == 201, answer.text

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_tasks, "run_task", die)
        with pytest.raises(Killed):
            trained.attempt(fine_tune.run)
    clone, cloned = study_of(trained, answer.json()["id"])
    assert api.get(f"/v1/studies/{clone.id}").json()["cloned_from"] == study.id
    (first,) = [record for record in cloned if record.trial.arm == ARM]
    assert first.trial.setting == hand.trial.setting
    assert (first.trial.draw, first.trial.origin) == (1, "incumbent")
    assert first.task.reason == f"the best setting of study {study.id}"
    started = [record for record in cloned if record.task.status is TaskStatus.RUNNING]
    assert [record.trial.draw for record in started] == [1], "what is known comes first"
    assert [quote["at"] for quote in clone.quotes] == ["start"]
