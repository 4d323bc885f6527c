"""Final runs inside jobs: scores on validation, best and last weights, full fine-tuning."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import FailureCode, RunAborted
from core.lifecycle import JobKind
from core.methods import Method
from core.results import TrainingResult
from core.settings import Settings
from models.experiment import Checkpoint
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.paging import PageQuery
from tests.integration.training_world import StopAfter, TrainingWorld, micro_llama, running_world
from worker.context import Preempted
from worker.jobs import export, fine_tune
from worker.training.export import MANIFEST
from worker.training.folders import open_sealed

WATCHED = {
    "type": "dpo",
    "dpo": {
        "hyperparameters": {
            "batch_size": 8, "n_epochs": 2, "lora_r": 2, "learning_rate": 0.3,
            "eval_every": 2, "early_stopping_patience": 2,
        }
    },
}  # fmt: skip
FULL = {
    "type": "kernel_dpo",
    "kernel_dpo": {
        "kernel": "rbf",
        "divergence": "jensen_shannon",
        "hyperparameters": {
            "adaptation": "full", "batch_size": 8, "max_steps": 4, "learning_rate": 1e-3,
            "gradient_checkpointing": True,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_llama(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, model: Path) -> Iterator[TrainingWorld]:
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=80) as made:
        yield made


def checkpoints(world: TrainingWorld, job_id: str) -> dict[str, Checkpoint]:
    with world.database.reading() as session:
        rows = (
            ExperimentRepository(session)
            .checkpoint_page(world.owner_id, PageQuery(limit=10, order="asc"), job_id=job_id)
            .rows
        )
    return {row.label: row for row in rows}


def points(world: TrainingWorld, job_id: str) -> dict[int, dict[str, float]]:
    with world.database.reading() as session:
        return {p.step: p.metrics for p in ExperimentRepository(session).metrics(job_id, "train")}


def test_best_and_last_weights_are_published(world: TrainingWorld) -> None:
    job_id = world.fine_tune(WATCHED)
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    curve = points(world, job_id)
    scored = {
        step: values["eval_log_loss"] for step, values in curve.items() if "eval_log_loss" in values
    }
    best = min(scored, key=lambda step: (scored[step], step))
    assert result.run.published_step == best
    assert result.run.steps == max(scored)
    assert {"num_tokens", "epoch", "rewards/margins", "loss"} <= curve[best].keys()
    found = checkpoints(world, job_id)
    labels = {"final"} if best == result.run.steps else {"final", "last"}
    assert set(found) == labels == {"final", "last"}, "this rate is too high, and is meant to be"
    assert (found["final"].step, found["last"].step) == (best, result.run.steps)
    assert result.last is not None
    assert (result.last.checkpoint_id, result.last.published_step) == (
        found["last"].id, result.run.steps,
    )  # fmt: skip
    assert result.last.evaluation != result.run.evaluation
    root = world.settings.artifact_dir
    adapters = [
        load_file(root / found[label].path / "adapter_model.safetensors") for label in labels
    ]
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    AutoPeftModelForCausalLM.from_pretrained(root / found["final"].path)


def test_a_watched_run_is_the_same_however_often_it_is_stopped(
    world: TrainingWorld,
) -> None:
    first = world.fine_tune(WATCHED)
    expected = world.attempt(fine_tune.run)
    job_id = world.fine_tune(WATCHED)
    polls, attempts = 12, 0
    while True:
        attempts += 1
        try:
            result = world.attempt(fine_tune.run, stop=StopAfter(polls))
            break
        except Preempted:
            polls += 5
    assert attempts > 3
    assert points(world, job_id) == points(world, first)
    for run in (expected["run"], expected["last"], result["run"], result["last"]):
        del run["checkpoint_id"], run["seconds"]
    assert (result["run"], result["last"]) == (expected["run"], expected["last"])
    shas = [
        {
            label: next(f["sha256"] for f in row.files if f["path"].startswith("adapter_model"))
            for label, row in checkpoints(world, job).items()
        }
        for job in (first, job_id)
    ]
    assert shas[0] == shas[1]


def test_full_fine_tuning_ends_in_a_model_that_plain_transformers_loads(
    world: TrainingWorld,
) -> None:
    job_id = world.fine_tune(FULL)
    with pytest.raises(Preempted):
        world.attempt(fine_tune.run, stop=StopAfter(20))
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert result.baseline is not None
    assert result.run.evaluation.drift > 0
    curve = points(world, job_id)
    assert curve[1]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert curve[1]["divergence/token"] == pytest.approx(0.0, abs=1e-5)
    found = checkpoints(world, job_id)
    assert {label: row.kind for label, row in found.items()} == {
        "final": "full", "baseline": "full",
    }  # fmt: skip
    folder = world.settings.artifact_dir / found["final"].path
    sealed = open_sealed(folder, manifest_name=MANIFEST, sha256=found["final"].manifest_sha256)
    names = {entry["path"] for entry in sealed.files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "lora" not in card.split("## Versions")[0]
    trained = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(world.model)
    ids = AutoTokenizer.from_pretrained(folder)("The answer", return_tensors="pt").input_ids
    assert trained.config.architectures == base.config.architectures
    assert not torch.allclose(trained(ids).logits, base(ids).logits)
    moved = [
        name
        for name, parameter in trained.named_parameters()
        if not torch.equal(parameter, base.get_parameter(name))
    ]
    assert len(moved) == len(list(base.named_parameters()))


def test_a_full_model_is_nothing_to_merge(world: TrainingWorld) -> None:
    job_id = world.fine_tune(_plain_full())
    world.attempt(fine_tune.run)
    checkpoint = checkpoints(world, job_id)["final"]
    world.job(JobKind.EXPORT, spec={"checkpoint_id": checkpoint.id})
    with pytest.raises(RunAborted, match="is of kind 'full', expected an adapter to merge"):
        world.attempt(export.run)


def _plain_full() -> dict[str, Any]:
    values = {"adaptation": "full", "batch_size": 8, "max_steps": 1}
    return {"type": "dpo", "dpo": {"hyperparameters": values}}


def test_a_job_of_two_processes_gives_what_one_gives(world: TrainingWorld) -> None:
    hyperparameters = {"batch_size": 8, "max_steps": 3, "lora_r": 2, "eval_every": 2}
    method = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    first = world.fine_tune(method)
    alone = TrainingResult.model_validate(world.attempt(fine_tune.run))
    training = world.settings.training.model_copy(update={"num_processes": 2})
    world.settings = world.settings.model_copy(update={"training": training})
    job_id = world.fine_tune(method)
    with pytest.raises(Preempted):
        world.attempt(fine_tune.run, stop=StopAfter(12))
    shared = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert shared.run.evaluation.log_loss == pytest.approx(alone.run.evaluation.log_loss, rel=1e-4)
    curves = points(world, first), points(world, job_id)
    assert curves[0].keys() == curves[1].keys()
    for step, values in curves[0].items():
        assert curves[1][step]["loss"] == pytest.approx(values["loss"], rel=1e-4)
        assert curves[1][step]["num_tokens"] == values["num_tokens"]
    assert set(checkpoints(world, job_id)) == set(checkpoints(world, first))
    with world.database.reading() as session:
        usage = [JobRepository(session).get(world.owner_id, i).gpu_seconds for i in (first, job_id)]
    assert usage == pytest.approx([alone.run.seconds, 2 * shared.run.seconds])


def test_full_with_a_penalty_says_what_its_states_need(world: TrainingWorld) -> None:
    training = world.settings.training.model_copy(update={"reference_states_bytes": 1000})
    world.settings = world.settings.model_copy(update={"training": training})
    world.fine_tune(FULL)
    with pytest.raises(RunAborted, match="KDPO_TRAINING__REFERENCE_STATES_BYTES") as caught:
        world.attempt(fine_tune.run)
    assert caught.value.failure is FailureCode.OUT_OF_MEMORY


def test_auto_refuses_full_fine_tuning() -> None:
    method: TypeAdapter[Method] = TypeAdapter(Method)
    with pytest.raises(ValueError, match="does not go with method `auto`"):
        method.validate_python(
            {"type": "auto", "auto": {"hyperparameters": {"adaptation": "full"}}}
        )
    with pytest.raises(ValueError, match="lora_r describe an adapter"):
        method.validate_python(
            {"type": "dpo", "dpo": {"hyperparameters": {"adaptation": "full", "lora_r": 4}}}
        )


def test_trackers_are_read_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    for written in ('["tensorboard", "mlflow"]', "tensorboard,mlflow"):
        monkeypatch.setenv("KDPO_TRAINING__TRACKERS", written)
        assert Settings().training.trackers == ("tensorboard", "mlflow")
