"""What a recommendation job measures of large data, and what it answers on the way."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from core.lifecycle import EndedBy, EventType, JobKind, JobStatus
from core.profile import Recommendation
from core.queue import QueueName
from core.run_spec import CandidateSpec, TrainSpec
from core.spec import DivergenceName, ObjectiveSpec
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.owners import OwnerRepository
from models.repositories.searches import SearchRepository, TaskEnd, TrialKey
from selection.study import PLAIN
from tests.integration.training_world import TrainingWorld, micro_llama, running_world
from worker.context import JobContext, Preempted
from worker.ingest.canonical import Split
from worker.jobs import fine_tune, recommend
from worker.jobs.scopes import Span
from worker.jobs.workbench import open_workbench
from worker.training.store import MANIFEST

PAIRS = 60
EARLY, ABOVE, MOST = 8, 20, 24


@pytest.fixture(autouse=True)
def _large_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "PROVISIONAL_PAIRS", EARLY)
    monkeypatch.setattr(recommend, "PROVISIONAL_ABOVE", ABOVE)
    monkeypatch.setattr(recommend, "PROVISIONAL_ABOVE_S", 0.0)
    monkeypatch.setattr(recommend, "MAX_PAIRS", MOST)


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str) -> Iterator[TrainingWorld]:
    model = micro_llama(tmp_path / "model")
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=PAIRS) as made:
        yield made


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
    result = world.attempt(recommend.run)
    parts = ["model", "tokenize", "provisional", "reference", "metrics", "rank", "store"]
    assert list(result) == ["recommendation_id", "seconds"]
    assert (result["recommendation_id"], list(result["seconds"])) == (job, parts)
    assert all(seconds >= 0.0 for seconds in result["seconds"].values())
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


def test_a_job_that_needs_the_whole_split_measures_the_same_sample(world: TrainingWorld) -> None:
    def of_the_whole(context: JobContext) -> dict[str, Any]:
        bench = open_workbench(context, spec=TrainSpec(), splits=(Split.TRAIN,))
        assert len(bench.pairs[Split.TRAIN]) > MOST
        return {"id": recommend.make_recommendation(bench, span=Span(0.0, 1.0))[0]}

    job = asked(world, seed=3)
    world.attempt(recommend.run)
    sample = stored(world, job)
    other_job = asked(world, seed=3)
    world.attempt(of_the_whole)
    whole = stored(world, other_job)
    assert sample is not None
    assert whole is not None
    for name in ("pairs", "prompts", "sampled_pairs", "sampled_prompts", "max_pairs", "seed"):
        assert getattr(whole.profile, name) == getattr(sample.profile, name)
    for one, other in zip(whole.profile.kernels, sample.profile.kernels, strict=True):
        # What is drawn by lot, folds and random pairs, is not the same in both.
        for metric in ("pnav", "tat", "nag"):
            values = [getattr(kernel, metric).value for kernel in (one, other)]
            assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)
    assert whole.data is not None
    assert whole.data.tokens.rule == "all pairs of the training split"
    assert sample.data is not None
    tokens = sample.data.tokens
    assert tokens.rule.startswith("prompts of the training split in an order drawn from seed 3")
    assert (tokens.measured_pairs, tokens.pairs) == (
        sample.profile.sampled_pairs,
        sample.profile.pairs,
    )


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


def finished_search(world: TrainingWorld, found: Recommendation, *, best: DivergenceName) -> None:
    """Leave a succeeded job whose trials of one divergence have won much, the others nothing."""
    world.fine_tune({"type": "auto"})
    with world.database.transaction() as session:
        claim = JobRepository(session).claim(QueueName.GPU, worker_id="wrk_test", lease_s=3600)
        assert claim is not None
        experiments = ExperimentRepository(session)
        experiments.save_recommendation(
            claim.fence, owner_id=world.owner_id, dataset_id=world.dataset_id,
            model=world.model.name, result=found.model_dump(mode="json"),
        )  # fmt: skip
        searches = SearchRepository(session)
        study = searches.create(
            claim.fence, owner_id=world.owner_id, spec={}, plan={}, shape="full"
        )
        tried = [(PLAIN, ObjectiveSpec(), 0.6)]
        for pair in found.ranking[:14]:
            loss = 0.5 if pair.divergence == best else 0.6
            tried.append((f"{pair.kernel} {pair.divergence}", pair.objective, loss))
        for arm, objective, log_loss in tried:
            candidate = CandidateSpec(objective=objective, learning_rate=1e-3)
            record = searches.add(
                study, TrialKey(arm, 0, 0), rung=0, start=0, setting={}, origin="coverage",
                candidate=candidate.model_dump(mode="json"), reason="a test",
            )  # fmt: skip
            searches.take(claim.fence, study, record, limit_seconds=None, label=arm)
            searches.finish(
                claim.fence, study, record,
                TaskEnd(
                    ended_by=EndedBy.BUDGET, seconds=1.0, log_loss=log_loss, drift=0.1,
                    feasible=True, metrics={"steps": 1.0}, is_last=True,
                ),
            )  # fmt: skip
        searches.end(study, by="budget", reason="all of it is spent")
        JobRepository(session).finish(claim.fence, JobStatus.SUCCEEDED, message="done", result={})


def test_finished_searches_of_the_owner_move_the_ranking(world: TrainingWorld) -> None:
    before = asked(world)
    world.attempt(recommend.run)
    cold = stored(world, before)
    assert cold is not None
    assert (cold.history.searches, cold.history.weight) == (0, 0.0)
    tried = list(dict.fromkeys(pair.divergence for pair in cold.ranking[:14]))
    best = DivergenceName(tried[-1])
    assert best != cold.divergence
    for _ in range(6):
        finished_search(world, cold, best=best)
    after = asked(world)
    world.attempt(recommend.run)
    warm = stored(world, after)
    assert warm is not None
    assert warm.history.searches == 6
    assert warm.history.weight > 0.0
    assert warm.divergence == best
    assert warm.profile == cold.profile
    with world.database.transaction() as session:
        bob = OwnerRepository(session).ensure("bob").id
        theirs = SearchRepository(session).finished(bob, limit=10)
        ours = SearchRepository(session).finished(world.owner_id, limit=4)
        assert theirs == [], "what others have found is theirs"
        assert [len(records) for _, records in ours] == [15] * 4


def test_what_an_accepted_recommendation_trains_names_it(world: TrainingWorld) -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 1}}}
    spec = {"model": world.model_ref(), "method": method, "encoder": None}
    world.job(JobKind.TRAINING, spec={**spec, "recommendation_id": "rec_1"})
    result = world.attempt(fine_tune.run)
    assert result["recommendation_id"] == "rec_1"
    with world.database.reading() as session:
        row = ExperimentRepository(session).checkpoint(
            world.owner_id, result["run"]["checkpoint_id"]
        )
    card = (world.settings.artifact_dir / row.path / "README.md").read_text(encoding="utf-8")
    assert "| Recommendation | rec_1 |" in card


@pytest.mark.parametrize(("name", "value"), [("ABOVE", MOST), ("ABOVE_S", 3600.0)])
def test_small_data_and_short_passes_are_answered_once(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    monkeypatch.setattr(recommend, f"PROVISIONAL_{name}", value)
    job = asked(world)
    world.attempt(recommend.run)
    found = stored(world, job)
    assert found is not None
    assert passes(world) == [found.profile.sampled_pairs]
