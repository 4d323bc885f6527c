"""Evaluations of a trained adapter in this process: what is measured, and under a reward model."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from core.errors import CancelRequested, InvalidInput, RunAborted
from core.evaluations import EvaluationResult
from core.lifecycle import JobKind, StepStatus
from core.modelref import ModelRef
from core.results import TrainingResult
from models.evaluation import AnsweredPrompt
from models.experiment import Checkpoint
from models.repositories.evaluations import AnswerRepository
from models.repositories.jobs import JobRepository
from models.repositories.steps import StepRepository
from models.types import db_now
from tests.integration.training_world import (
    TINY_LM,
    StopAfter,
    TrainingWorld,
    micro_llama,
    running_world,
)
from worker.context import JobContext, Preempted
from worker.ingest.canonical import Split
from worker.jobs import evaluate_checkpoint, export, fine_tune, win_rate
from worker.jobs.runs import train_spec
from worker.jobs.workbench import open_workbench
from worker.training.evaluate import fit_temperature, preference_losses

METHOD = {
    "type": "dpo",
    "dpo": {"hyperparameters": {"max_steps": 4, "learning_rate": 5e-3, "max_length": 128}},
}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path
) -> Iterator[TrainingWorld]:
    root = tmp_path_factory.mktemp("evaluation")
    file = root / "kdpo.db"
    file.write_bytes(_sqlite_template.read_bytes())
    model = micro_llama(root / "micro-llama")
    with running_world(root, url=f"sqlite:///{file}", model=model, pairs=90) as made:
        yield made


@pytest.fixture(scope="module")
def trained(world: TrainingWorld) -> TrainingResult:
    world.fine_tune(METHOD)
    return TrainingResult.model_validate(world.attempt(fine_tune.run))


def classifier(folder: Path, *, outputs: int = 1) -> dict[str, Any]:
    """Write a random classifier with tiny-lm's tokenizer and return how a job names it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM, local_files_only=True)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        eos_token_id=1, pad_token_id=0, bos_token_id=None, num_labels=outputs,
        initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelRef(name="judge", source="local", path=folder).model_dump(mode="json")


def ask(world: TrainingWorld, checkpoint_id: str, **more: Any) -> str:
    spec = {
        "checkpoint_id": checkpoint_id,
        "model": world.model_ref(),
        "method": METHOD,
        "split": "test",
        "reward_model": None,
        "max_prompts": 12,
        "max_new_tokens": 12,
        **more,
    }
    return world.job(JobKind.EVALUATION, spec=spec)


def evaluate(world: TrainingWorld) -> EvaluationResult:
    return EvaluationResult.model_validate(world.attempt(evaluate_checkpoint.run))


def answered(world: TrainingWorld, job_id: str) -> Sequence[AnsweredPrompt]:
    with world.database.reading() as session:
        return AnswerRepository(session).page(job_id)


def seconds(world: TrainingWorld, job_id: str) -> float:
    with world.database.reading() as session:
        return JobRepository(session).get(world.owner_id, job_id).gpu_seconds


def end(world: TrainingWorld, job_id: str) -> None:
    """End a job whose attempt has failed: `attempt` leaves it running."""
    with world.database.transaction() as session:
        job = JobRepository(session).get(world.owner_id, job_id)
        job.lease_until = db_now() - 1.0
        session.flush()
        JobRepository(session).reap(max_losses=0, backoff_s=0.0)


def test_a_published_adapter_measures_as_its_run_did(
    world: TrainingWorld, trained: TrainingResult
) -> None:
    job_id = ask(world, trained.run.checkpoint_id)
    found = evaluate(world)
    expected = trained.run.evaluation
    assert found.measured.pairs == expected.pairs > 10
    for name in (
        "log_loss", "accuracy", "drift", "temperature", "chosen_displacement", "calibration_error",
    ):  # fmt: skip
        assert getattr(found.measured, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    assert expected.drift > 0.0
    for name in ("accuracy", "log_loss", "drift"):
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(getattr(expected, name), rel=1e-4)
        assert estimate.low < estimate.value < estimate.high
    assert 0.0 <= found.accuracy.low < found.accuracy.high <= 1.0
    assert found.win_rate is None
    assert answered(world, job_id) == []
    assert 0.0 < seconds(world, job_id) < 600.0


def test_each_half_of_validation_is_judged_at_the_temperature_of_the_other(
    world: TrainingWorld, trained: TrainingResult
) -> None:
    ask(world, trained.run.checkpoint_id, split="validation")
    margins: list[np.ndarray[Any, Any]] = []
    groups: list[np.ndarray[Any, Any]] = []

    def run(context: JobContext) -> dict[str, Any]:
        bench = open_workbench(context, spec=train_spec(_method()), splits=(Split.VALIDATION,))
        source = export.adapter_row(context, to="measure")
        path = context.settings.artifact_dir / source.path
        evaluate_checkpoint.load_published(
            bench.policy, export.verified(path, sha256=source.manifest_sha256)
        )
        seen = bench.measure(Split.VALIDATION, span=evaluate_checkpoint.Span(0.0, 1.0))
        margins.append(seen.margins)
        groups.append(seen.group)
        return evaluate_checkpoint.run(context)

    found = EvaluationResult.model_validate(world.attempt(run))
    first = groups[0] % 2 == 0
    halves = {
        side: fit_temperature(margins[0][~side_mask])
        for side, side_mask in (("first", first), ("second", ~first))
    }
    losses = np.concatenate(
        [
            preference_losses(margins[0][first], halves["first"]),
            preference_losses(margins[0][~first], halves["second"]),
        ]
    )
    assert found.measured.pairs == margins[0].size
    assert found.measured.log_loss == pytest.approx(losses.mean())
    assert found.log_loss.value == pytest.approx(losses.mean())
    at_its_own = preference_losses(margins[0], fit_temperature(margins[0])).mean()
    assert abs(losses.mean() - at_its_own) > 1e-6


def _method() -> Any:
    return evaluate_checkpoint._METHOD.validate_python(METHOD)


def test_a_reward_model_compares_with_the_base(
    world: TrainingWorld, trained: TrainingResult, tmp_path: Path
) -> None:
    judge = classifier(tmp_path / "judge")
    job_id = ask(world, trained.run.checkpoint_id, reward_model=judge)
    found = evaluate(world)
    win, rows = found.win_rate, answered(world, job_id)
    assert win is not None
    assert win.prompts == len(rows) == min(12, found.measured.prompts)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert len({row.pair_id for row in rows}) == len(rows)
    differences = []
    for row in rows:
        assert row.base_reward is not None
        assert row.aligned_reward is not None
        assert (row.base != row.aligned) or (row.base_reward == row.aligned_reward)
        differences.append(row.aligned_reward - row.base_reward)
    assert any(difference != 0.0 for difference in differences)
    assert (win.wins, win.losses) == (
        sum(d > 0 for d in differences),
        sum(d < 0 for d in differences),
    )
    assert win.ties == win.prompts - win.wins - win.losses
    assert win.rate.value == pytest.approx((win.wins + win.ties / 2) / win.prompts)
    assert win.difference.value == pytest.approx(math.fsum(differences) / win.prompts)
    assert 0.0 <= win.rate.low <= win.rate.value <= win.rate.high <= 1.0
    assert f"of {win.prompts} held-out prompts" in win.sentence


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(win_rate, "BATCH_PROMPTS", 3)
    monkeypatch.setattr(win_rate, "SCORED_AT_ONCE", 3)


def rows_of(world: TrainingWorld, job_id: str) -> list[tuple[object, ...]]:
    return [
        (r.number, r.pair_id, r.prompt, r.base, r.aligned, r.base_reward, r.aligned_reward)
        for r in answered(world, job_id)
    ]


@pytest.mark.usefixtures("small_batches")
def test_an_evaluation_goes_on_behind_the_last_batch(
    world: TrainingWorld, trained: TrainingResult, tmp_path: Path
) -> None:
    judge = classifier(tmp_path / "judge")
    whole = ask(world, trained.run.checkpoint_id, reward_model=judge)
    expected = evaluate(world)
    job_id = ask(world, trained.run.checkpoint_id, reward_model=judge)
    states = []
    for polls in range(2, 60):
        with pytest.raises(Preempted):
            world.attempt(evaluate_checkpoint.run, stop=StopAfter(polls))
        rows = answered(world, job_id)
        scored = sum(row.base_reward is not None for row in rows)
        with world.database.reading() as session:
            steps = {step.name: step.status for step in StepRepository(session).of_job(job_id)}
        states.append((len(rows), scored))
        if scored:
            assert steps["answer"] is StepStatus.SUCCEEDED
            break
    answers, scores = zip(*states, strict=True)
    assert list(answers) == sorted(answers)
    assert 0 < min(filter(None, answers)) < max(answers)
    assert 0 < scores[-1] < answers[-1]
    before = seconds(world, job_id)
    assert evaluate(world) == expected
    assert rows_of(world, job_id) == rows_of(world, whole)
    assert before < seconds(world, job_id)


@pytest.mark.usefixtures("small_batches")
def test_a_cancel_is_heard_between_batches(
    world: TrainingWorld, trained: TrainingResult, tmp_path: Path
) -> None:
    judge = classifier(tmp_path / "judge")
    job_id = ask(world, trained.run.checkpoint_id, reward_model=judge)

    def run(context: JobContext) -> dict[str, Any]:
        with world.database.transaction() as session:
            JobRepository(session).request_cancel(world.owner_id, job_id)
        return evaluate_checkpoint.run(context)

    with pytest.raises(CancelRequested):
        world.attempt(run)
    assert len(answered(world, job_id)) < 12
    end(world, job_id)


def test_prompts_are_drawn_by_the_seed(
    world: TrainingWorld, trained: TrainingResult, tmp_path: Path
) -> None:
    judge = classifier(tmp_path / "judge")
    drawn = []
    for seed in (1, 1, 2):
        spec = {"reward_model": judge, "max_prompts": 5, "max_new_tokens": 2}
        job_id = ask(world, trained.run.checkpoint_id, **spec)
        with world.database.transaction() as session:
            JobRepository(session).get(world.owner_id, job_id).seed = seed
        win = evaluate(world).win_rate
        assert win is not None
        assert win.verdict == "no significant difference"
        drawn.append([row.pair_id for row in answered(world, job_id)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_other_models_are_no_reward_models(
    world: TrainingWorld, trained: TrainingResult, tmp_path: Path
) -> None:
    two = classifier(tmp_path / "two", outputs=2)
    for judge, said in ((two, "with 2 outputs, expected"), (world.model_ref(), "ForCausalLM")):
        job_id = ask(world, trained.run.checkpoint_id, reward_model=judge)
        with pytest.raises(InvalidInput, match=said):
            world.attempt(evaluate_checkpoint.run)
        end(world, job_id)


def test_a_merged_or_deleted_checkpoint_cannot_be_measured(
    world: TrainingWorld, trained: TrainingResult
) -> None:
    world.job(JobKind.EXPORT, spec={"checkpoint_id": trained.run.checkpoint_id, "merge": True})
    merged = world.attempt(export.run)["checkpoint_id"]
    job_id = ask(world, merged)
    with pytest.raises(RunAborted, match="expected an adapter to measure"):
        world.attempt(evaluate_checkpoint.run)
    end(world, job_id)
    with world.database.transaction() as session:
        session.get_one(Checkpoint, merged).deleted_at = db_now()
    job_id = ask(world, merged)
    with pytest.raises(RunAborted, match="was deleted, expected an adapter"):
        world.attempt(evaluate_checkpoint.run)
    end(world, job_id)
