"""What has had its time ends: files, uploads in parts, checkpoints, and what they leave on disk."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.lifecycle import JobKind, JobStatus
from models.experiment import Checkpoint
from models.file import StoredFileRow, UploadSession
from models.webhook import WebhookDelivery
from tests.integration.api_world import MODEL, World, pairs, running_api
from worker.expiry import Expiry

DAY_S = 86_400


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(
        sqlite_url, tmp_path, downloads={"checkpoint_days": 30},
        webhooks={"hosts": ("hooks.example.com",)},
    ) as made:  # fmt: skip
        yield made


def expire(world: World) -> None:
    Expiry(world.settings, world.database).run()


def change(world: World, row: type[Any], id_: str, **values: Any) -> None:
    with world.database.transaction() as session:
        found = session.get_one(row, id_)
        for name, value in values.items():
            setattr(found, name, value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def upload_file(world: World) -> dict[str, Any]:
    answer = world.post(
        "/v1/files", files={"file": ("p.jsonl", pairs(30))}, data={"purpose": "fine-tune"}
    )
    made: dict[str, Any] = answer.json()
    return made


def test_a_file_goes_with_its_dataset_when_no_job_needs_it(world: World) -> None:
    file, other = upload_file(world), upload_file(world)
    job = world.post(
        "/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file["id"]}
    ).json()
    change(world, StoredFileRow, file["id"], expires_at=1.0)
    expire(world)
    assert names(world.settings.file_dir) == sorted([file["id"], other["id"]])
    world.post(f"/v1/jobs/{job['id']}/cancel")
    for made in (file, other):
        world.post(
            f"/v1/jobs/{world.get('/v1/datasets/' + made['dataset_id']).json()['job_id']}/cancel"
        )
    expire(world)
    assert names(world.settings.file_dir) == [other["id"]]
    assert world.get(f"/v1/datasets/{file['dataset_id']}").status_code == 404
    assert world.get(f"/v1/files/{other['id']}").status_code == 200


def test_an_unfinished_upload_goes_with_its_parts(world: World) -> None:
    ids = []
    for _ in range(2):
        body = {"filename": "p", "purpose": "evals", "bytes": 9, "mime_type": "text/plain"}
        ids.append(world.post("/v1/uploads", json=body).json()["id"])
        world.post(f"/v1/uploads/{ids[-1]}/parts", files={"data": b"abc"})
    change(world, UploadSession, ids[0], expires_at=1.0)
    expire(world)
    assert [path.name for path in world.settings.part_dir.iterdir()] == [ids[1]]
    assert world.get(f"/v1/uploads/{ids[0]}").json()["status"] == "expired"
    assert world.get(f"/v1/uploads/{ids[1]}").json()["status"] == "pending"


def test_files_that_no_row_names_go_when_they_are_old(world: World) -> None:
    file = upload_file(world)
    old, young = world.settings.file_dir / "file-old", world.settings.file_dir / ".file-x.part"
    for path in (old, young):
        path.write_bytes(b"x")
    before = time.time() - 2 * DAY_S
    for path in (old, world.settings.file_dir / file["id"]):
        os.utime(path, (before, before))
    expire(world)
    assert names(world.settings.file_dir) == sorted([".file-x.part", file["id"]])


def test_a_checkpoint_goes_with_its_folder(world: World) -> None:
    world.training_job(world.dataset())
    fence = world.claim(JobKind.TRAINING)
    checkpoint = world.publish(fence, {"config.json": b"{}"})
    world.finish(fence, JobStatus.FAILED)
    folder = world.settings.artifact_dir / "checkpoints" / checkpoint
    change(world, Checkpoint, checkpoint, created_at=1.0)
    expire(world)
    # The only checkpoint of its job is its last one, however old.
    assert world.get(f"/v1/checkpoints/{checkpoint}").json()["expires_at"] is None
    change(world, Checkpoint, checkpoint, expires_at=1.0)
    expire(world)
    assert not folder.exists()
    assert world.get(f"/v1/checkpoints/{checkpoint}").status_code == 404
    with world.database.reading() as session:
        row = session.get_one(Checkpoint, checkpoint)
    assert (row.path, row.files, row.bytes) == ("", [], 0)
    expire(world)


def test_a_folder_that_cannot_be_removed_is_met_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.training_job(world.dataset())
    fence = world.claim(JobKind.TRAINING)
    checkpoint = world.publish(fence, {"config.json": b"{}"})
    world.finish(fence, JobStatus.FAILED)
    folder = world.settings.artifact_dir / "checkpoints" / checkpoint
    assert world.client.delete(f"/v1/checkpoints/{checkpoint}", headers=world.headers()).is_success

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refuse)
        expire(world)
    assert folder.exists()
    expire(world)
    assert not folder.exists()


def test_the_log_of_webhooks_is_kept_for_a_while(world: World) -> None:
    hook = world.post("/v1/webhooks", json={"url": "https://hooks.example.com/"}).json()["id"]
    ids = [world.post(f"/v1/webhooks/{hook}/test").json()["id"] for _ in range(3)]
    old = time.time() - 31 * DAY_S
    change(world, WebhookDelivery, ids[0], created_at=old, status="delivered")
    change(world, WebhookDelivery, ids[1], created_at=old)
    change(world, WebhookDelivery, ids[2], status="failed")
    expire(world)
    left = [d["id"] for d in world.get(f"/v1/webhooks/{hook}/deliveries").json()["data"]]
    assert sorted(left) == sorted(ids[1:])
