"""Cleaning removes what nothing needs, and nothing else."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.ids import IdPrefix, new_id
from core.lifecycle import JobStatus
from core.queue import QueueName
from core.run_spec import DatasetPolicy
from core.settings import Settings
from models.repositories.datasets import DatasetRepository
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import Fence, JobRepository
from models.session import Database
from tests.unit.models.seeds import Seeds
from worker.cleanup import STALE_S, Cleanup
from worker.training.entries import EntryFolder


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, pool_size=2)
    yield database
    database.dispose()


@pytest.fixture
def seeds(database: Database) -> Seeds:
    return Seeds(database)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


def write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")


def age(path: Path) -> None:
    then = time.time() - STALE_S - 60
    os.utime(path, (then, then))


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def publish(database: Database, seeds: Seeds, fence: Fence, path: str) -> None:
    with database.transaction() as session:
        ExperimentRepository(session).publish_checkpoint(
            fence, owner_id=seeds.owner_id, checkpoint_id=f"ckpt_{fence.job_id[-20:]}",
            kind="adapter", label="best", step=1, path=path, files=[], manifest_sha256="0" * 64,
            size_bytes=1, metrics={},
        )  # fmt: skip


def finish(database: Database, fence: Fence) -> None:
    with database.transaction() as session:
        JobRepository(session).finish(fence, JobStatus.SUCCEEDED, message="done")


def attempt_files(settings: Settings, fence: Fence) -> Path:
    """Make what an attempt at training leaves; return its folder."""
    folder = settings.artifact_dir / "jobs" / fence.job_id / f"a{fence.attempt}"
    write(
        *(folder / "log.txt", folder / "outcome.json"),
        *(folder / "checkpoints" / "best" / name for name in ("manifest.json", "sub/weights")),
        folder / "checkpoints" / "other" / "weights",
        folder / "checkpoints" / ".tmp-abc" / "weights",
        folder / "resume" / "train" / "step-10" / "state",
    )
    return folder


def test_ended_job_keeps_what_it_published_and_how_it_ended(
    database: Database, seeds: Seeds, settings: Settings
) -> None:
    seeds.job()
    fence = seeds.claimed().fence
    folder = attempt_files(settings, fence)
    publish(database, seeds, fence, f"jobs/{fence.job_id}/a1/checkpoints/best")
    cleanup = Cleanup(settings, database)
    before = files_under(folder)
    cleanup.run()
    assert files_under(folder) == before, "the job still runs"
    finish(database, fence)
    cleanup.run()
    assert files_under(folder) == {
        *("log.txt", "outcome.json"),
        *("checkpoints/best/manifest.json", "checkpoints/best/sub/weights"),
    }


def test_job_that_goes_on_keeps_its_earlier_attempts(
    database: Database, seeds: Seeds, settings: Settings
) -> None:
    job_id = seeds.job()
    first = attempt_files(settings, seeds.claimed().fence)
    before = files_under(first)
    seeds.expire(job_id)
    cleanup = Cleanup(settings, database)
    cleanup.run()
    with database.transaction() as session:
        JobRepository(session).reap(max_losses=5, backoff_s=0.0)
    seeds.make_due()
    cleanup.run()
    assert files_under(first) == before, "the job is queued"
    fence = seeds.claimed().fence
    assert fence.attempt == 2
    second = attempt_files(settings, fence)
    cleanup.run()
    assert files_under(first) == before, "the second attempt may go on from it"
    finish(database, fence)
    cleanup.run()
    assert files_under(first) == files_under(second) == {"log.txt", "outcome.json"}


def test_trials_stay_as_long_as_their_job_goes_on(
    database: Database, seeds: Seeds, settings: Settings
) -> None:
    seeds.job()
    fence = seeds.claimed().fence
    trials = settings.artifact_dir / "jobs" / fence.job_id / "trials"
    write(trials / "3-0.json", trials / "trial-3" / "job_1-a1" / "step-000005" / "state")
    Cleanup(settings, database).run()
    assert len(files_under(trials)) == 2
    finish(database, fence)
    Cleanup(settings, database).run()
    assert not trials.exists()


def test_folders_of_unknown_jobs_are_left_alone(database: Database, settings: Settings) -> None:
    file = settings.artifact_dir / "jobs" / "ftjob_of_another_database" / "a1" / "state"
    write(file)
    age(file)
    Cleanup(settings, database).run()
    assert file.is_file()


def test_links_are_removed_and_never_followed(
    database: Database, seeds: Seeds, settings: Settings, tmp_path: Path
) -> None:
    write(tmp_path / "elsewhere" / "precious")
    seeds.job()
    fence = seeds.claimed().fence
    folder = attempt_files(settings, fence)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    finish(database, fence)
    Cleanup(settings, database).run()
    assert not (folder / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "precious").is_file()


def test_an_upload_goes_with_its_last_version(
    database: Database, seeds: Seeds, settings: Settings
) -> None:
    read, other = DatasetPolicy(), DatasetPolicy(on_invalid="fail")
    first, first_job = seeds.dataset_job()
    alone, alone_job = seeds.dataset_job()
    waiting, _ = seeds.dataset_job()
    second = new_id(IdPrefix.DATASET)
    with database.transaction() as session:
        for job_id in (first_job, alone_job):
            JobRepository(session).request_cancel(seeds.owner_id, job_id)
        datasets = DatasetRepository(session)
        parent = datasets.lock_versions(seeds.owner_id, first)
        made = datasets.add_version(
            parent, dataset_id=second, job_id=new_id(IdPrefix.JOB), name="d",
            policy=other.model_dump(mode="json"),
        )  # fmt: skip
        assert (made.version, made.parent_id, made.upload_id) == (2, first, first)
        assert datasets.version_with(parent, other) is made
        assert datasets.version_with(parent, read) is None, "cancelled: reading again may help"
        datasets.delete(seeds.owner_id, first)
    uploads, rows = settings.upload_dir, settings.artifact_dir / "datasets"
    write(*(uploads / name for name in (first, alone, waiting, "arriving", "forgotten")))
    write(*(rows / name / "canonical.jsonl" for name in (first, second)))
    age(uploads / "forgotten")
    age(uploads / waiting)
    Cleanup(settings, database).run()
    assert files_under(uploads) == {first, alone, waiting, "arriving"}
    assert files_under(rows) == {f"{second}/canonical.jsonl"}
    with database.transaction() as session:
        DatasetRepository(session).delete(seeds.owner_id, second)
    Cleanup(settings, database).run()
    assert files_under(uploads) == {alone, waiting, "arriving"}
    assert files_under(rows) == set()


def test_forgotten_temporary_files_go(database: Database, settings: Settings) -> None:
    datasets = settings.artifact_dir / "datasets"
    old = [datasets / ".tmp-x", datasets / "d" / ".rows.a.tmp"]
    kept = [datasets / "d" / ".rows.b.tmp", datasets / "d" / "rows"]
    write(*old, *kept)
    for path in (*old, kept[1]):
        age(path)
    Cleanup(settings, database).run()
    assert [path for path in (*old, *kept) if path.exists()] == kept


def test_half_written_references_go_as_soon_as_nobody_writes_them(
    database: Database, settings: Settings
) -> None:
    folder = settings.reference_dir
    write(*(folder / name / "states.bin" for name in (".tmp-dead", ".tmp-alive", "whole")))
    with EntryFolder(folder).locked("alive", waiting=lambda: None):
        Cleanup(settings, database).run()
        assert {path.name for path in folder.iterdir()} == {".tmp-alive", "alive.lock", "whole"}


def test_data_folder_without_anything_is_no_error(database: Database, settings: Settings) -> None:
    Cleanup(settings, database).run()
    assert not settings.root.exists()


def test_what_cannot_be_removed_is_said_and_met_again(
    database: Database, seeds: Seeds, settings: Settings,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seeds.dataset_job()
    fence = seeds.claimed(QueueName.CPU).fence
    folder = attempt_files(settings, fence)
    finish(database, fence)
    cleanup = Cleanup(settings, database)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refuse)
        cleanup.run()
    assert "resume cannot be removed: Operation not permitted" in caplog.text
    assert (folder / "resume").is_dir()
    cleanup.run()
    assert files_under(folder) == {"log.txt", "outcome.json"}
