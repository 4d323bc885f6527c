"""What a recommendation job measures of large data, and what it answers on the way."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from core.lifecycle import EventType, JobKind
from core.profile import Recommendation
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from tests.integration.training_world import TrainingWorld, make_world, micro_llama
from worker.context import Preempted
from worker.jobs import recommend
from worker.training.store import MANIFEST

PAIRS = 60
EARLY, ABOVE, MOST = 8, 20, 24


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _large_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "PROVISIONAL_PAIRS", EARLY)
    monkeypatch.setattr(recommend, "PROVISIONAL_ABOVE", ABOVE)
    monkeypatch.setattr(recommend, "MAX_PAIRS", MOST)


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str) -> Iterator[TrainingWorld]:
    model = micro_llama(tmp_path / "model")
    world = make_world(tmp_path, url=sqlite_url, model=model, pairs=PAIRS)
    yield world
    world.database.dispose()


class StopOnceStored(threading.Event):
    """The signal that comes as soon as the job has any answer."""

    def __init__(self, world: TrainingWorld, job_id: str) -> None:
        super().__init__()
        self._world, self._job_id = world, job_id

    def is_set(self) -> bool:
        return stored(self._world, self._job_id) is not None


def stored(world: TrainingWorld, job_id: str) -> Recommendation | None:
    with world.database.reading() as session:
        row = ExperimentRepository(session).recommendation_of(job_id)
        return None if row is None else Recommendation.model_validate(row.result)


def asked(world: TrainingWorld, **more: Any) -> str:
    return world.job(JobKind.RECOMMENDATION, spec={"model": world.model_ref()}, **more)


def passes(world: TrainingWorld) -> list[int]:
    """Pairs of each pass of the reference."""
    manifests = world.settings.reference_dir.glob(f"*/{MANIFEST}")
    return sorted(orjson.loads(path.read_bytes())["pairs"] for path in manifests)


def test_the_reference_runs_over_the_sample_alone_and_the_numbers_say_so(
    world: TrainingWorld,
) -> None:
    job = asked(world, seed=3)
    assert world.attempt(recommend.run) == {"recommendation_id": job}
    found = stored(world, job)
    assert found is not None
    assert found.provisional is False
    profile = found.profile
    assert (profile.max_pairs, profile.seed) == (MOST, 3)
    assert 2 < profile.sampled_prompts <= profile.sampled_pairs <= MOST < profile.pairs
    assert profile.prompts <= profile.pairs < PAIRS
    early = [pairs for pairs in passes(world) if pairs <= EARLY]
    assert passes(world) == [*early, profile.sampled_pairs]
    assert len(early) == 1


def test_the_same_seed_draws_the_same_and_another_one_another(world: TrainingWorld) -> None:
    jobs = []
    for seed in (3, 3, 4):
        jobs.append(asked(world, seed=seed))
        world.attempt(recommend.run)
    first, again, other = (stored(world, job) for job in jobs)
    assert first == again
    assert other is not None
    assert first is not None
    assert other.profile.kernels != first.profile.kernels
    assert len(passes(world)) == 4, "the second job has run nothing"


def test_an_early_answer_comes_first_says_what_it_is_and_is_replaced(world: TrainingWorld) -> None:
    job = asked(world)
    with pytest.raises(Preempted):
        world.attempt(recommend.run, stop=StopOnceStored(world, job))
    early = stored(world, job)
    assert early is not None
    assert early.provisional is True
    assert early.profile.sampled_pairs <= EARLY
    assert len(early.ranking) == 35
    of = f"from {early.profile.sampled_pairs} of {early.profile.pairs} pairs"
    assert early.summary.startswith(f"Provisional, {of}. ")
    world.attempt(recommend.run)
    final = stored(world, job)
    assert final is not None
    assert final.provisional is False
    assert final.profile.pairs == early.profile.pairs
    assert final.profile.sampled_pairs > early.profile.sampled_pairs
    with world.database.reading() as session:
        updates = [
            event.message
            for event in events_after(session, job, 0, 100)
            if event.type == EventType.RECOMMENDATION_UPDATED
        ]
    assert updates[-1] == final.summary
    assert updates[0] == early.summary


def test_small_data_are_answered_once(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend, "PROVISIONAL_ABOVE", MOST)
    job = asked(world)
    world.attempt(recommend.run)
    found = stored(world, job)
    assert found is not None
    assert passes(world) == [found.profile.sampled_pairs]
