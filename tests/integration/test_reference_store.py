"""Which jobs run the base, over what, and what they leave for the jobs that follow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from core.lifecycle import JobKind
from tests.integration.training_world import TrainingWorld, micro_llama, running_world
from worker.jobs import fine_tune, recommend
from worker.training.store import MANIFEST

PAIRS = 60


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str) -> Iterator[TrainingWorld]:
    model = micro_llama(tmp_path / "model")
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=PAIRS) as made:
        yield made


def entries(world: TrainingWorld) -> dict[str, tuple[int, bool]]:
    """When each entry was written, and whether it has hidden states."""
    return {
        path.parent.name: (
            path.stat().st_mtime_ns,
            orjson.loads(path.read_bytes())["states"] is not None,
        )
        for path in world.settings.reference_dir.glob(f"*/{MANIFEST}")
    }


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 1, **hyperparameters}}}


def fine_tuned(world: TrainingWorld, method: dict[str, Any], *, seed: int) -> None:
    spec = {"model": world.model_ref(), "method": method, "encoder": None}
    world.job(JobKind.TRAINING, spec=spec, seed=seed)
    world.attempt(fine_tune.run)


def test_jobs_share_one_pass_a_split_whatever_they_train(world: TrainingWorld) -> None:
    world.job(JobKind.RECOMMENDATION, spec={"model": world.model_ref()})
    world.attempt(recommend.run)
    (train,) = entries(world)
    assert not entries(world)[train][1], "a recommendation needs the table alone"

    fine_tuned(world, dpo(), seed=1)
    plain = entries(world)
    assert len(plain) == 3
    assert {key for key, (_, states) in plain.items() if states} == set(plain) - {train}

    fine_tuned(world, dpo(learning_rate=3e-3, lora_r=2, beta=0.5, batch_size=8), seed=2)
    assert entries(world) == plain, "nothing that a job may choose makes the base run again"

    penalty = {
        "type": "kernel_dpo",
        "kernel_dpo": {"divergence": "kl", "hyperparameters": {"max_steps": 1}},
    }
    fine_tuned(world, penalty, seed=1)
    whole = entries(world)
    assert set(whole) == set(plain)
    assert all(states for _, states in whole.values()), "a penalty needs the states of training"
    assert {key for key in plain if whole[key][0] == plain[key][0]} == set(plain) - {train}

    fine_tuned(world, {"type": "auto", "auto": {"search": {"max_trials": 2}}}, seed=3)
    assert entries(world) == whole


def test_other_tokens_are_another_pass(world: TrainingWorld) -> None:
    fine_tuned(world, dpo(), seed=1)
    before = entries(world)
    fine_tuned(world, dpo(max_length=64), seed=1)
    after = entries(world)
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before)
