"""The files of a dataset are on the disk before its row says so."""

import os
from pathlib import Path

import pytest

from core.lifecycle import DatasetStatus
from core.queue import QueueName
from core.settings import Settings
from models.repositories.datasets import DatasetRepository
from models.session import Database
from tests.unit.models.seeds import Seeds
from worker.context import JobContext
from worker.jobs import validate_dataset
from worker.jobs.validate_dataset import _Finding, _publish


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name open files")
def test_folders_are_flushed_before_the_row_is_written(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    fsync, record = os.fsync, DatasetRepository.record_result

    def noted_fsync(handle: int) -> None:
        told.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    class Noted(DatasetRepository):
        def record_result(self, *arguments: str, **values: object) -> None:
            told.append("row")
            record(self, *arguments, **values)  # type: ignore[arg-type]

    database = Database(sqlite_url, pool_size=2)
    try:
        seeds = Seeds(database)
        dataset_id, job_id = seeds.dataset_job()
        fence = seeds.claimed(QueueName.CPU).fence
        settings = Settings(data_dir=tmp_path)
        context = JobContext(
            settings=settings, database=database, fence=fence, job=seeds.get(job_id)
        )
        made = context.attempt_dir / "dataset"
        made.mkdir(parents=True)
        (made / "canonical.jsonl").write_text("{}\n")
        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(validate_dataset, "DatasetRepository", Noted)
        finding = _Finding(DatasetStatus.READY, {}, {}, "0" * 64, None)
        _publish(context, dataset_id, finding)
    finally:
        database.dispose()
    place = settings.artifact_dir / "datasets" / dataset_id
    assert told == [str(place), str(place.parent), "row"]
    assert (place / "canonical.jsonl").read_text() == "{}\n"
    assert not made.exists()
