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
from core.lifecycle import AttemptOutcome, EventType, JobKind, TrialStatus
from core.modelref import ModelRef
from core.queue import QueueName
from core.settings import Settings, TrainingSettings
from models.experiment import TrialRow
from models.job import Event
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.owners import OwnerRepository
from models.session import Database
from worker.context import JobContext
from worker.jobs import export
from worker.jobs.flags import raise_flags
from worker.jobs.publish import publish_folder
from worker.jobs.scopes import Reporter, ScopeHooks, Span
from worker.jobs.search_trials import _paired_errors, _write_losses
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


class TestPairedErrors:
    """Four validation pairs of three prompts; trial 0 is the best."""

    GROUP = np.array([0, 0, 1, 2])
    LOSSES = (np.array([0.1, 0.3, 0.2, 0.4]), np.array([0.2, 0.3, 0.5, 0.4]), np.full(4, 0.9))
    ALONE = (0.3, 0.4, 1.2)

    def rows(self, context: JobContext) -> list[TrialRow]:
        for number, losses in enumerate(self.LOSSES):
            _write_losses(context, number, losses)
        return [
            TrialRow(
                number=number, status=TrialStatus.COMPLETE, feasible=True,
                log_loss=float(losses.mean()), metrics={"standard_error": self.ALONE[number]},
            )
            for number, losses in enumerate(self.LOSSES)
        ]  # fmt: skip

    def clustered(self, number: int) -> float:
        """The same error from the definition, cluster by cluster."""
        difference = self.LOSSES[number] - self.LOSSES[0]
        centred = difference - difference.mean()
        sums = [centred[g == self.GROUP].sum() for g in range(3)]
        return math.sqrt(3 / 2 * sum(s * s for s in sums)) / 4

    def errors(self, desk: Desk, *, lost: tuple[int, ...]) -> tuple[dict[int, float], list[Event]]:
        job_id = desk.job()
        context = desk.attempt()
        rows = self.rows(context)
        for number in lost:
            (context.job_dir / "trials" / f"{number}.json").unlink()
        return _paired_errors(context, rows, group=self.GROUP), desk.warnings(job_id)

    def test_pairs_cancel_what_trials_share(self, desk: Desk) -> None:
        errors, told = self.errors(desk, lost=())
        expected = {0: 0.0, 1: self.clustered(1), 2: self.clustered(2)}
        assert errors == pytest.approx(expected)
        assert told == []

    def test_a_lost_trial_is_taken_as_independent_and_named(self, desk: Desk) -> None:
        errors, told = self.errors(desk, lost=(1,))
        assert errors == pytest.approx({0: 0.0, 1: math.hypot(0.3, 0.4), 2: self.clustered(2)})
        assert [event.data for event in told] == [{"trials": [1]}]
        assert "independent trials" in told[0].message

    def test_without_the_best_trial_nothing_can_be_paired(self, desk: Desk) -> None:
        errors, told = self.errors(desk, lost=(0,))
        expected = {0: 0.0, 1: math.hypot(0.3, 0.4), 2: math.hypot(0.3, 1.2)}
        assert errors == pytest.approx(expected)
        assert [event.data for event in told] == [{"trials": [0]}]


def test_flags_are_raised_once_whatever_attempts_the_step_takes(desk: Desk) -> None:
    job_id = desk.job()
    context = desk.attempt()
    with context.transaction() as session:
        for step in range(8):
            ExperimentRepository(session).record_metrics(
                context.fence, scope="train", step=step, values={"loss": 0.5 + 0.1 * step}
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
