"""What jobs say once, do without, and refuse, apart from training itself."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import FailureCode, RunAborted
from core.ids import IdPrefix, new_id
from core.lifecycle import AttemptOutcome, EventType, JobKind
from core.modelref import ModelRef
from core.queue import QueueName
from core.run_spec import CandidateSpec
from core.settings import Settings, TrainingSettings
from core.spec import ObjectiveSpec
from models.experiment import TaskRow, TrialRow
from models.job import Event
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.owners import OwnerRepository
from models.repositories.searches import TaskRecord
from models.session import Database
from selection.winner import FinishedTrial
from tests.unit.selection.searches import plan
from worker.context import JobContext
from worker.jobs import export
from worker.jobs.flags import raise_flags
from worker.jobs.publish import publish_folder
from worker.jobs.scopes import Reporter, ScopeHooks, Span
from worker.jobs.search import _configs, _finished
from worker.jobs.search_losses import losses_path, write_losses
from worker.training.export import MANIFEST
from worker.training.folders import seal_folder
from worker.training.reference import model_sha256, tokenizer_sha256

TINY_LM = Path(__file__).parents[4] / "examples" / "models" / "tiny-lm"


@dataclass
class Desk:
    """A database and attempts at its jobs."""

    settings: Settings
    database: Database
    owner_id: str

    def job(self, kind: JobKind = JobKind.TRAINING, **spec: Any) -> str:
        with self.database.transaction() as session:
            return (
                JobRepository(session)
                .create(owner_id=self.owner_id, kind=kind, spec=spec, model="tiny-lm")
                .id
            )

    def attempt(self) -> JobContext:
        """Claim the job that is due."""
        with self.database.transaction() as session:
            claim = JobRepository(session).claim(QueueName.GPU, worker_id="w", lease_s=3600)
        assert claim is not None
        with self.database.reading() as session:
            job = JobRepository(session).load(claim.fence)
        return JobContext(
            settings=self.settings, database=self.database, fence=claim.fence, job=job,
            stop=threading.Event(),
        )  # fmt: skip

    def lose(self, context: JobContext) -> None:
        """Let the attempt die; the job is due again."""
        with self.database.transaction() as session:
            JobRepository(session).requeue(
                context.fence, AttemptOutcome.LOST, delay_s=0, message="the process ended"
            )

    def warnings(self, job_id: str) -> list[Event]:
        with self.database.reading() as session:
            events = events_after(session, job_id, 0, 1000)
        return [event for event in events if event.type is EventType.JOB_WARNING]


@pytest.fixture
def desk(tmp_path: Path, sqlite_url: str) -> Iterator[Desk]:
    settings = Settings(
        data_dir=tmp_path,
        training=TrainingSettings(num_threads=torch.get_num_threads(), progress_every_s=1e-9),
    )
    database = Database(sqlite_url, pool_size=2)
    with database.transaction() as session:
        owner_id = OwnerRepository(session).ensure("owner").id
    yield Desk(settings, database, owner_id)
    database.dispose()


class TestLossesOfTrials:
    """Three trials on four validation pairs; trial 0 is the best."""

    RUNG = 2
    LOSSES = (np.array([0.1, 0.3, 0.2, 0.4]), np.array([0.2, 0.3, 0.5, 0.4]), np.full(4, 0.9))
    ALONE = (0.3, 0.4, 1.2)

    def record(self, number: int) -> TaskRecord:
        log_loss = float(self.LOSSES[number].mean())
        trial = TrialRow(
            number=number, arm=f"arm {number}", draw=0, repeat=0,
            metrics={"standard_error": self.ALONE[number]},
            candidate=CandidateSpec(
                objective=ObjectiveSpec(), learning_rate=1e-4
            ).model_dump(mode="json"),
        )  # fmt: skip
        return TaskRecord(task=TaskRow(rung=self.RUNG, log_loss=log_loss, drift=0.1), trial=trial)

    def finished(
        self, desk: Desk, *, lost: tuple[int, ...] = ()
    ) -> tuple[list[FinishedTrial], list[Event]]:
        job_id = desk.job()
        context = desk.attempt()
        for number, losses in enumerate(self.LOSSES):
            write_losses(context, number, self.RUNG, losses)
        for number in lost:
            losses_path(context, number, self.RUNG).unlink()
        records = [self.record(number) for number in range(3)]
        return _finished(_configs(context, plan(), records, self.RUNG)), desk.warnings(job_id)

    def test_what_is_kept_is_compared_pair_by_pair(self, desk: Desk) -> None:
        found, told = self.finished(desk)
        for trial, losses in zip(found, self.LOSSES, strict=True):
            assert trial.losses is not None
            assert np.array_equal(trial.losses, losses[None])
        assert told == []

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_lost_trial_is_taken_as_independent_and_named(self, desk: Desk, lost: int) -> None:
        found, told = self.finished(desk, lost=(lost,))
        assert [trial.number for trial in found if trial.losses is None] == [lost]
        errors = [trial.standard_error for trial in found]
        assert errors == pytest.approx([0.0, math.hypot(0.3, 0.4), math.hypot(0.3, 1.2)])
        assert [event.data for event in told] == [{"trials": [lost]}]
        assert "independent trials" in told[0].message


def test_flags_are_raised_once_whatever_attempts_the_step_takes(desk: Desk) -> None:
    job_id = desk.job()
    context = desk.attempt()
    with context.transaction() as session:
        for step in range(8):
            ExperimentRepository(session).record_metrics(
                context.fence,
                job_id=job_id,
                scope="train",
                step=step,
                values={"loss": 0.5 + 0.1 * step},
            )
    expected = ("likelihood_displacement", "loss_diverging")
    for _ in range(2):
        assert raise_flags(context, chosen_displacement=-0.9, mean_margin=1.0) == expected
        desk.lose(context)
        context = desk.attempt()
    assert context.job.attention == list(expected)
    assert [event.data for event in desk.warnings(job_id)] == [
        {"attention": flag} for flag in expected
    ]


def test_a_run_without_reason_raises_no_flag(desk: Desk) -> None:
    job_id = desk.job()
    context = desk.attempt()
    assert raise_flags(context, chosen_displacement=-0.4, mean_margin=1.0) == ()
    assert desk.warnings(job_id) == []


def test_passes_and_steps_of_a_run_fill_its_part_of_the_bar(desk: Desk) -> None:
    """A pass takes the first tenth of the run's part, steps the rest; nothing goes back."""
    desk.job()
    context = desk.attempt()
    span = Span(0.2, 0.7)
    passes = Span(span.start, span.at(0.1))
    seen = []

    def report() -> None:
        with desk.database.reading() as session:
            progress = JobRepository(session).load(context.fence).progress
        assert progress is not None
        seen.append((progress["unit"], progress["done"], progress["fraction"]))

    reporter = Reporter(context, "pairs", passes)
    hooks = ScopeHooks(context, "train", Span(passes.end, span.end))
    for done in (0, 3, 6):
        reporter(done, 6)
        report()
    for step in (1, 2, 3):
        hooks.stepped(step, 3)
        report()
    assert seen == [
        ("pairs", 0, 0.2), ("pairs", 3, 0.225), ("pairs", 6, 0.25),
        ("steps", 1, 0.4), ("steps", 2, 0.55), ("steps", 3, 0.7),
    ]  # fmt: skip


@pytest.mark.parametrize("missing", ["model_sha256", "tokenizer_sha256"])
def test_an_adapter_that_does_not_say_its_base_is_not_merged(desk: Desk, missing: str) -> None:
    """Checkpoints of before their manifests held both hashes."""
    desk.job()
    training = desk.attempt()
    base = ModelRef(name="tiny-lm", source="local", path=TINY_LM)
    about: dict[str, Any] = {
        "base_model": base.model_dump(mode="json"),
        "model_sha256": model_sha256(TINY_LM),
        "tokenizer_sha256": tokenizer_sha256(TINY_LM),
    }
    del about[missing]
    sealed = seal_folder(
        training.attempt_dir / "final", token="t", manifest_name=MANIFEST, about=about,
        write=lambda _folder: None,
    )  # fmt: skip
    checkpoint_id = new_id(IdPrefix.CHECKPOINT)
    publish_folder(
        training, sealed, checkpoint_id=checkpoint_id, kind="adapter", label="final", step=1,
        metrics={},
    )  # fmt: skip
    desk.job(JobKind.EXPORT, checkpoint_id=checkpoint_id, merge=True)
    with pytest.raises(RunAborted, match=rf"manifest\.json has no {missing}, expected") as caught:
        export.run(desk.attempt())
    assert caught.value.failure is FailureCode.CHECKPOINT_CORRUPT
    assert caught.value.hint is not None
    assert "fine-tuning job again" in caught.value.hint
