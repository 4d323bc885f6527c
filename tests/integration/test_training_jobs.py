"""Recommendation, fine-tuning and export jobs in this process, on a real database and dataset."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pydantic import SecretStr
from safetensors.torch import load, load_file, save_file
from sqlalchemy import update

from core.errors import CancelRequested, FailureCode, RunAborted
from core.lifecycle import EndedBy, JobKind, StepStatus, TrialStatus
from core.results import TrainingResult
from core.settings import DbSettings, Settings
from models.job import Job as JobRow
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.paging import PageQuery
from models.repositories.searches import SearchRepository
from models.repositories.steps import StepRepository
from tests.integration.training_world import (
    Job,
    Killed,
    StopAfter,
    TrainingWorld,
    canonical_bytes,
    micro_llama,
    running_world,
)
from tests.unit.core.writable_hub import COMMIT, TOKEN, writable_hub
from worker.context import JobContext, Preempted
from worker.jobs import export, fine_tune, recommend
from worker.jobs.runs import RunRequest
from worker.jobs.scopes import ScopeStore, Span
from worker.jobs.workbench import Workbench
from worker.training.checkpoint import SavedState
from worker.training.folders import open_sealed
from worker.training.optuna_storage import open_storage
from worker.training.run import RunOutcome
from worker.training.trainer import Leave

AUTO: dict[str, Any] = {
    "type": "auto",
    "auto": {
        "search": {"max_trials": 3},
        "hyperparameters": {"batch_size": 14, "lora_r": 2},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_llama(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, model: Path) -> Iterator[TrainingWorld]:
    with running_world(tmp_path, url=sqlite_url, model=model, pairs=80) as made:
        yield made


def outcome_of(world: TrainingWorld, job_id: str, result: dict[str, Any]) -> dict[str, Any]:
    """Everything that must not depend on how often the job was interrupted."""
    parsed = TrainingResult.model_validate(result)
    assert parsed.search is not None
    with world.database.reading() as session:
        experiments = ExperimentRepository(session)
        study = experiments.study_of(job_id)
        assert study is not None
        trials = experiments.trials(study.id)
        scopes = ["train", "baseline", *(f"trial:{t.number}" for t in trials)]
        curves = {
            scope: [(p.step, p.metrics) for p in experiments.metrics(job_id, scope)]
            for scope in scopes
        }
        checkpoints = experiments.checkpoint_page(
            world.owner_id, PageQuery(limit=10, order="asc"), job_id=job_id
        ).rows
        left = {scope: len(experiments.resume_points(job_id, scope)) for scope in scopes}
    adapters = {
        row.label: next(f["sha256"] for f in row.files if f["path"] == "adapter_model.safetensors")
        for row in checkpoints
    }
    assert len(adapters) == len(checkpoints), "each label is published once"
    assert not any(left.values()), "a finished job keeps no resume points"
    return {
        "trials": [
            (t.number, t.status, t.origin, t.candidate, t.log_loss, t.drift, t.feasible)
            for t in trials
        ],
        "curves": curves,
        "adapters": adapters,
        "evaluation": parsed.run.evaluation.model_dump(),
        "comparison": parsed.comparison.model_dump(),
        "samples": [sample.model_dump() for sample in parsed.samples],
        "heavy_tails": None if parsed.heavy_tails is None else parsed.heavy_tails.model_dump(),
        "winner": parsed.search.winner_trial,
        "tied": parsed.search.tied_trials,
        "weights": parsed.run.mixture_weights,
        "attention": parsed.attention,
    }


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path, model: Path
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("uninterrupted")
    (root / "kdpo.db").write_bytes(_sqlite_template.read_bytes())
    url = f"sqlite:///{root / 'kdpo.db'}"
    with running_world(root, url=url, model=model, pairs=80) as world:
        job_id = world.fine_tune(AUTO)
        return outcome_of(world, job_id, world.attempt(fine_tune.run))


def test_auto_ends_with_evidence(uninterrupted: dict[str, Any]) -> None:
    assert [t[1] for t in uninterrupted["trials"]] == [TrialStatus.COMPLETE] * 3
    assert uninterrupted["trials"][0][2] == "baseline"
    assert uninterrupted["trials"][0][3]["objective"]["divergence_term"] is None
    assert uninterrupted["trials"][1][2] == "screen"
    assert len(uninterrupted["samples"]) == 3
    assert all(set(sample) == {"prompt", "base", "aligned"} for sample in uninterrupted["samples"])
    tails = uninterrupted["heavy_tails"]
    assert tails["measured"] == len(tails["layers"]) == 14
    assert all(layer["before"] != layer["after"] for layer in tails["layers"])
    steps = [step for step, _ in uninterrupted["curves"]["train"]]
    assert steps == list(range(1, len(steps) + 1))
    winner = uninterrupted["winner"]
    assert uninterrupted["curves"]["train"] == uninterrupted["curves"][f"trial:{winner}"]
    assert "rewards/margins" in uninterrupted["curves"]["train"][0][1]


@pytest.mark.parametrize(("first", "growth"), [(4, 5), pytest.param(9, 2, marks=pytest.mark.soak)])
def test_preempted_again_and_again_ends_the_same(
    world: TrainingWorld, uninterrupted: dict[str, Any], first: int, growth: int
) -> None:
    job_id = world.fine_tune(AUTO)
    preempted = 0
    for polls in range(first, 400, growth):
        try:
            result = world.attempt(fine_tune.run, stop=StopAfter(polls))
            break
        except Preempted:
            preempted += 1
    assert preempted >= 3
    assert canonical_bytes(outcome_of(world, job_id, result)) == canonical_bytes(uninterrupted)


def test_killed_between_two_writes_ends_the_same(
    world: TrainingWorld, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[tuple[type, str, str]] = [
        (StepRepository, "succeed", "before"),  # the recommendation is stored, its step is not
        (SearchRepository, "create", "after"),
        (SearchRepository, "take", "after"),
        (SearchRepository, "finish", "before"),
        (SearchRepository, "finish", "after"),
        (SearchRepository, "end", "before"),
        (SearchRepository, "end", "after"),
        (StepRepository, "succeed", "before"),  # the search is over, its step is not
        (ExperimentRepository, "add_resume_point", "before"),
        (ExperimentRepository, "publish_checkpoint", "before"),
        (StepRepository, "succeed", "before"),  # checkpoints are published, the step is not
    ]
    job_id = world.fine_tune(AUTO)
    for owner, method, moment in deaths:
        real = getattr(owner, method)

        def deadly(*arguments: Any, real: Any = real, moment: str = moment, **options: Any) -> Any:
            if moment == "after":
                real(*arguments, **options)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, deadly)
            with pytest.raises(Killed):
                world.attempt(fine_tune.run)
    result = world.attempt(fine_tune.run)
    assert canonical_bytes(outcome_of(world, job_id, result)) == canonical_bytes(uninterrupted)


def test_a_damaged_resume_point_is_told_and_passed_over(
    world: TrainingWorld, uninterrupted: dict[str, Any]
) -> None:
    job_id = world.fine_tune(AUTO)
    with pytest.raises(Preempted):
        world.attempt(fine_tune.run, stop=StopAfter(70))
    with world.database.reading() as session:
        experiments = ExperimentRepository(session)
        scopes = ["train", *(f"trial:{number}" for number in range(100))]
        found = {s: len(experiments.resume_points(job_id, s)) for s in scopes}
        scope = next(s for s in scopes if found[s])
        points = experiments.resume_points(job_id, scope)
    assert points, found
    state = world.settings.artifact_dir / points[0].path / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    result = world.attempt(fine_tune.run)
    assert canonical_bytes(outcome_of(world, job_id, result)) == canonical_bytes(uninterrupted)
    with world.database.reading() as session:
        told = [e.message for e in events_after(session, job_id, 0, 1000)]
    assert f"The resume point of `{scope}` at step {points[0].step} is not used." in told


def losses_of(world: TrainingWorld, job_id: str) -> int:
    with world.database.reading() as session:
        return JobRepository(session).get(world.owner_id, job_id).losses


def test_refused_resume_points_are_removed_and_fresh_ones_stay(world: TrainingWorld) -> None:
    job_id = world.fine_tune({"type": "dpo"})

    def state(step: int) -> SavedState:
        return SavedState(
            step=step, epoch=0, offset=0, seconds=0.0, tensors={"t": torch.ones(1)}, window_steps=0,
            num_tokens=0, watch={}, ended=False,
        )  # fmt: skip

    def saves(*steps: int, identity: str) -> Job:
        def job(context: JobContext) -> dict[str, Any]:
            store = ScopeStore(context, scope="train", identity={"run": identity})
            assert store.load() is None
            for step in steps:
                store.save(state(step))
            raise Killed

        return job

    def load_and_save(context: JobContext) -> dict[str, Any]:
        store = ScopeStore(context, scope="train", identity={"run": "new"})
        loaded = store.load()
        assert loaded is not None
        assert loaded.step == 4
        with world.database.transaction() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(losses=2))
        store.save(loaded)
        assert losses_of(world, job_id) == 2, "the same step again is no progress"
        store.save(state(5))
        assert losses_of(world, job_id) == 0
        raise Killed

    for steps, identity in (((50, 60), "old"), ((2, 3, 4), "new")):
        with pytest.raises(Killed):
            world.attempt(saves(*steps, identity=identity))
    with world.database.reading() as session:
        points = ExperimentRepository(session).resume_points(job_id, "train")
    assert [p.step for p in points] == [4, 3]
    folders = (world.settings.artifact_dir / "jobs" / job_id).glob("a*/resume/train/*")
    assert sorted(f.name for f in folders) == ["step-000003", "step-000004"]
    with pytest.raises(Killed):
        world.attempt(load_and_save)


def test_plain_dpo_is_its_own_baseline_and_can_be_merged(world: TrainingWorld) -> None:
    job_id = world.fine_tune({"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 2}}})
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert result.comparison.verdict == "same objective"
    assert result.run == result.baseline
    assert result.run.steps == 2
    assert result.run.seconds < 60
    assert result.bundle["seed"] == "7"
    assert result.heavy_tails is not None
    with world.database.reading() as session:
        steps = StepRepository(session).of_job(job_id)
        job = JobRepository(session).get(world.owner_id, job_id)
        row = ExperimentRepository(session).checkpoint(world.owner_id, result.run.checkpoint_id)
    assert [(s.name, s.status) for s in steps] == [
        (name, StepStatus.SUCCEEDED) for name in ("train", "baseline", "evaluate", "save")
    ]
    assert job.progress is not None
    assert job.gpu_seconds > 0
    assert (row.kind, row.label, row.step) == ("adapter", "final", 2)
    folder = world.settings.artifact_dir / row.path
    assert result.heavy_tails.sentence in (folder / "README.md").read_text()
    open_sealed(folder, manifest_name="manifest.json", sha256=row.manifest_sha256)
    for file in row.files:
        assert (folder / file["path"]).stat().st_size == file["bytes"]

    world.job(JobKind.EXPORT, spec={"checkpoint_id": row.id, "merge": True})
    merged_id = world.attempt(export.run)["checkpoint_id"]
    with world.database.reading() as session:
        merged = ExperimentRepository(session).checkpoint(world.owner_id, merged_id)
    assert (merged.kind, merged.label, merged.step) == ("merged", "merged", 2)
    card = (world.settings.artifact_dir / merged.path / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "peft" not in card.split("## Versions")[0]
    assert "measured with the adapter before merging" in card
    assert "stored as float32" in card
    assert "model.safetensors" in {file["path"] for file in merged.files}

    world.job(JobKind.EXPORT, spec={"checkpoint_id": merged_id, "merge": True})
    with pytest.raises(RunAborted, match="expected an adapter"):
        world.attempt(export.run)


def test_a_checkpoint_is_cast_and_pushed(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fine_tune({"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 1}}})
    adapter_id = world.attempt(fine_tune.run)["run"]["checkpoint_id"]
    world.settings = world.settings.model_copy(
        update={
            "models": world.settings.models.model_copy(update={"push_allow": ("acme/*",)}),
            "sources": world.settings.sources.model_copy(
                update={"secrets": {"writer": SecretStr(TOKEN)}}
            ),
        }
    )
    target = {"repo_id": "acme/aligned", "token_secret": "writer"}
    spec = {"checkpoint_id": adapter_id, "push_to_hub": target}
    with writable_hub(monkeypatch) as hub:
        world.job(JobKind.EXPORT, spec={**spec, "merge": True, "dtype": "bfloat16"})
        result = world.attempt(export.run)
        assert result["hub"]["commit"] == COMMIT
        assert result["checkpoint_id"] in hub.message
        assert b"stored as bfloat16" in hub.files["README.md"]
        dtypes = {tensor.dtype for tensor in load(hub.files["model.safetensors"]).values()}
        assert dtypes == {torch.bfloat16}
        hub.files.clear()
        world.job(JobKind.EXPORT, spec={**spec, "merge": False, "retry_of": "job_x"})
        assert world.attempt(export.run)["hub"]["repo_id"] == "acme/aligned"
        assert "adapter_model.safetensors" in hub.files
        assert b"base_model:" not in hub.files["README.md"], "a folder of this machine"
        world.job(JobKind.EXPORT, spec={**spec, "checkpoint_id": "ckpt_gone", "merge": False})
        with pytest.raises(RunAborted, match="was deleted, expected one to push"):
            world.attempt(export.run)
        hub.status = 403
        world.job(JobKind.EXPORT, spec={**spec, "merge": False})
        with pytest.raises(RunAborted, match="answered 403") as refused:
            world.attempt(export.run)
        assert refused.value.failure is FailureCode.DEPENDENCY_ERROR


def test_a_damaged_checkpoint_is_not_merged(world: TrainingWorld) -> None:
    world.fine_tune({"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 1}}})
    checkpoint_id = world.attempt(fine_tune.run)["run"]["checkpoint_id"]
    with world.database.reading() as session:
        row = ExperimentRepository(session).checkpoint(world.owner_id, checkpoint_id)
    (world.settings.artifact_dir / row.path / "README.md").write_text("?")
    world.job(JobKind.EXPORT, spec={"checkpoint_id": checkpoint_id, "merge": True})
    with pytest.raises(RunAborted) as caught:
        world.attempt(export.run)
    assert caught.value.failure is FailureCode.CHECKPOINT_CORRUPT


def test_another_base_is_not_merged(world: TrainingWorld, model: Path, tmp_path: Path) -> None:
    world.model = Path(shutil.copytree(model, tmp_path / "base"))
    world.fine_tune({"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 1}}})
    checkpoint_id = world.attempt(fine_tune.run)["run"]["checkpoint_id"]
    tensors = load_file(world.model / "model.safetensors")
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, world.model / "model.safetensors", metadata={"format": "pt"})
    world.job(JobKind.EXPORT, spec={"checkpoint_id": checkpoint_id, "merge": True})
    with pytest.raises(RunAborted, match="model_sha256") as caught:
        world.attempt(export.run)
    assert caught.value.failure is FailureCode.CHECKPOINT_CORRUPT


def test_a_baseline_that_diverges_does_not_cost_the_run(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Workbench.train

    def train(
        bench: Workbench, request: RunRequest, *, span: Span, leave: Leave = "best"
    ) -> RunOutcome:
        outcome = real(bench, request, span=span, leave=leave)
        if request.scope == "baseline":
            return replace(outcome, ended_by=EndedBy.NAN, message="not finite at step 2")
        return outcome

    monkeypatch.setattr(Workbench, "train", train)
    settings = {"kernel": "rbf", "divergence": "kl", "hyperparameters": {"max_steps": 2}}
    job_id = world.fine_tune({"type": "kernel_dpo", "kernel_dpo": settings})
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert result.baseline is None
    assert result.comparison.verdict == "baseline diverged"
    assert "not finite at step 2" in result.comparison.sentence
    with world.database.reading() as session:
        rows = (
            ExperimentRepository(session)
            .checkpoint_page(world.owner_id, PageQuery(limit=10, order="asc"), job_id=job_id)
            .rows
        )
    assert [row.label for row in rows] == ["final"]


def test_a_named_pair_is_compared_with_plain_dpo(world: TrainingWorld, model: Path) -> None:
    method = {
        "type": "kernel_dpo",
        "kernel_dpo": {
            "kernel": "hmk",
            "embedding": "encoder",
            "encoder": "the same model",
            "divergence": "jensen_shannon",
            "hyperparameters": {"beta": 0.3, "gamma": 0.2, "alpha": 2.0, "batch_size": 20},
        },
    }
    job_id = world.fine_tune(method, encoder=model)
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert result.run.objective.label == "hmk × jensen_shannon (penalty)"
    assert result.run.mixture_weights is not None
    assert result.baseline is not None
    assert result.baseline.objective.is_plain_dpo
    assert "plain DPO (beta 0.3, learning rate " in result.comparison.sentence
    assert result.baseline.objective.beta == 0.3
    assert result.baseline.learning_rate == result.run.learning_rate
    assert result.baseline.checkpoint_id != result.run.checkpoint_id
    assert result.comparison.verdict != "same objective"
    with world.database.reading() as session:
        page = ExperimentRepository(session).checkpoint_page(
            world.owner_id, PageQuery(limit=10, order="asc"), job_id=job_id
        )
    folders = {row.label: world.settings.artifact_dir / row.path for row in page.rows}
    assert set(folders) == {"final", "baseline"}
    config = json.loads((folders["final"] / "training_config.json").read_text())
    assert config["mixture_weights"] == pytest.approx(result.run.mixture_weights)


def test_a_published_checkpoint_loads_with_plain_peft(world: TrainingWorld) -> None:
    world.fine_tune({"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 2}}})
    checkpoint_id = world.attempt(fine_tune.run)["run"]["checkpoint_id"]
    with world.database.reading() as session:
        row = ExperimentRepository(session).checkpoint(world.owner_id, checkpoint_id)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        loaded = AutoPeftModelForCausalLM.from_pretrained(world.settings.artifact_dir / row.path)
    answer = loaded.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > 3


def test_recommendations_are_stored_and_use_the_reference_again(world: TrainingWorld) -> None:
    ids = []
    for _ in range(2):
        job_id = world.job(JobKind.RECOMMENDATION, spec={"model": world.model_ref()})
        assert world.attempt(recommend.run)["recommendation_id"] == job_id
        ids.append(job_id)
    with world.database.reading() as session:
        experiments = ExperimentRepository(session)
        rows = [experiments.recommendation_of(job_id) for job_id in ids]
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[0].result == rows[1].result
    assert len(rows[0].result["ranking"]) == 35
    entries = [path for path in world.settings.reference_dir.iterdir() if path.is_dir()]
    assert len(entries) == 1


def test_device_seconds_end_a_search(world: TrainingWorld) -> None:
    method = {"type": "auto", "auto": {"search": {"max_trials": 50, "gpu_seconds": 1e-6}}}
    world.fine_tune(method)
    result = TrainingResult.model_validate(world.attempt(fine_tune.run))
    assert result.search is not None
    assert (result.search.trials, result.search.stopped_by) == (0, "budget")
    assert result.search.winner_trial is None
    assert "what the metrics recommend" in result.search.sentence
    assert result.run.objective.divergence_term is not None


def test_a_drift_budget_that_nothing_keeps_is_a_clear_failure(world: TrainingWorld) -> None:
    search = {"max_trials": 2, "drift_budget": 1e-12}
    world.fine_tune({"type": "auto", "auto": {"search": search}})
    with pytest.raises(RunAborted, match="no usable trial") as caught:
        world.attempt(fine_tune.run)
    assert caught.value.failure is FailureCode.BUDGET_EXHAUSTED


def test_cancelling_stops_at_a_step(world: TrainingWorld) -> None:
    job_id = world.fine_tune({"type": "dpo"})

    def cancelled(context: JobContext) -> dict[str, Any]:
        with world.database.transaction() as session:
            JobRepository(session).request_cancel(world.owner_id, job_id)
        return fine_tune.run(context)

    with pytest.raises(CancelRequested):
        world.attempt(cancelled)


def test_changed_rows_are_refused(world: TrainingWorld) -> None:
    path = world.settings.artifact_dir / "datasets" / world.dataset_id / "canonical.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    world.fine_tune({"type": "dpo"})
    with pytest.raises(RunAborted, match="sha256") as caught:
        world.attempt(fine_tune.run)
    assert caught.value.failure is FailureCode.DATASET_INVALID


def test_studies_live_beside_the_main_database(database_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, db=DbSettings.model_validate({"url": database_url}))
    for expected in (1, 2):
        with open_storage(settings) as storage:
            study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
            study.add_trial(optuna.trial.create_trial(value=1.0))
            assert len(study.trials) == expected
