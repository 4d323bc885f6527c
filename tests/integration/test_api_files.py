"""Files in OpenAI's form: upload, status, list, delete, download, and what jobs make of them."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.keys import Scope
from models.file import StoredFileRow
from tests.integration.api_world import MODEL, World, pairs, running_api
from tests.integration.test_api import check_problem

DATA = pairs(30)


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path, api={"max_upload_bytes": 2_000_000}) as made:
        yield made


def send(world: World, data: bytes = DATA, **form: str) -> dict[str, object]:
    answer = world.post(
        "/v1/files",
        files={"file": ("prefs.jsonl", data)},
        data={"purpose": "fine-tune", **form},
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, object] = answer.json()
    return body


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_a_file_is_openais_object_and_becomes_a_dataset(world: World) -> None:
    file = send(world)
    assert str(file["id"]).startswith("file-")
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(DATA),
        "created_at": file["created_at"],
        "expires_at": None,
        "filename": "prefs.jsonl",
        "purpose": "fine-tune",
        "status": "uploaded",
        "status_details": None,
        "sha256": hashlib.sha256(DATA).hexdigest(),
        "dataset_id": file["dataset_id"],
    }
    assert world.get(f"/v1/files/{file['id']}").json() == file
    world.validate()
    after = world.get(f"/v1/files/{file['id']}").json()
    assert after["status"] == "processed"
    dataset = world.get(f"/v1/datasets/{file['dataset_id']}").json()
    assert dataset["name"] == "prefs.jsonl"
    assert dataset["counts"]["pairs"] == 30
    assert dataset["sha256"] == file["sha256"]


def test_an_invalid_file_says_why(world: World) -> None:
    file = send(world, b"not json\n" * 20)
    world.validate()
    after = world.get(f"/v1/files/{file['id']}").json()
    assert after["status"] == "error"
    assert f"/v1/datasets/{file['dataset_id']}/report" in after["status_details"]


def test_files_of_other_purposes_are_only_kept(world: World) -> None:
    file = send(world, b"\x00any bytes", purpose="user_data")
    assert file["status"] == "processed"
    assert file["dataset_id"] is None
    problem = check_problem(
        world.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": str(file["id"])}),
        409,
        "file_not_dataset",
    )
    assert problem["retryable"] is False
    assert world.get(f"/v1/files/{file['id']}/content").content == b"\x00any bytes"


@pytest.mark.parametrize("name", ["training_file", "dataset_id"])
def test_a_job_waits_for_its_file(world: World, name: str) -> None:
    file = send(world)
    made = world.post("/v1/fine_tuning/jobs", json={"model": MODEL, name: file["id"]})
    assert made.status_code == 200, made.text
    job = made.json()
    assert job["status"] == "validating_files"
    assert job["dataset_id"] == file["dataset_id"]
    assert job["training_file"] == (file["id"] if name == "training_file" else file["dataset_id"])
    world.validate()
    assert world.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] == "queued"


def test_a_job_fails_with_its_file(world: World) -> None:
    file = send(world, b"not json\n" * 20)
    body = {"model": MODEL, "training_file": file["id"]}
    job = world.post("/v1/fine_tuning/jobs", json=body).json()
    world.validate()
    failed = world.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "dataset_invalid"
    check_problem(world.post("/v1/fine_tuning/jobs", json=body), 409, "dataset_not_ready")


def test_a_recommendation_takes_a_file(world: World) -> None:
    file = send(world)
    made = world.post("/v1/recommendations", json={"model": MODEL, "dataset_id": file["id"]})
    assert made.status_code == 202, made.text
    assert made.json()["dataset_id"] == file["dataset_id"]


@pytest.mark.parametrize("body", [{}, {"training_file": "file-1", "dataset_id": "ds_1"}])
def test_a_job_names_its_pairs_once(world: World, body: dict[str, str]) -> None:
    problem = check_problem(
        world.post("/v1/fine_tuning/jobs", json={"model": MODEL, **body}), 422, "invalid_input"
    )
    assert "either training_file or dataset_id" in problem["detail"]


def test_lists_page_and_filter(world: World) -> None:
    made = [send(world, purpose="evals")["id"] for _ in range(3)]
    other = send(world)["id"]
    assert [f["id"] for f in world.get("/v1/files").json()["data"]] == [other, *made[::-1]]
    page = world.get("/v1/files?purpose=evals&limit=2&order=asc").json()
    assert [f["id"] for f in page["data"]] == made[:2]
    assert page["has_more"] is True
    rest = world.get(f"/v1/files?purpose=evals&order=asc&after={page['last_id']}").json()
    assert [f["id"] for f in rest["data"]] == made[2:]
    assert rest["has_more"] is False
    assert world.client.get("/v1/files", headers=world.headers("eve")).json()["data"] == []


def test_deletion_takes_the_dataset_along(world: World) -> None:
    file = send(world)
    world.validate()
    answer = world.client.delete(f"/v1/files/{file['id']}", headers=world.headers())
    assert answer.status_code == 200
    assert answer.json() == {"id": file["id"], "object": "file", "deleted": True}
    check_problem(world.get(f"/v1/files/{file['id']}"), 404, "not_found")
    check_problem(world.get(f"/v1/datasets/{file['dataset_id']}"), 404, "not_found")
    assert names(world.settings.file_dir) == []
    # The dataset's upload goes with the cleanup.
    assert names(world.settings.upload_dir) == [file["dataset_id"]]


def test_a_file_in_use_stays(world: World) -> None:
    file = send(world)
    world.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file["id"]})
    answer = world.client.delete(f"/v1/files/{file['id']}", headers=world.headers())
    check_problem(answer, 409, "dataset_in_use")
    assert world.get(f"/v1/files/{file['id']}/content").content == DATA


def test_a_dataset_can_go_before_its_file(world: World) -> None:
    file = send(world)
    world.validate()
    gone = world.client.delete(f"/v1/datasets/{file['dataset_id']}", headers=world.headers())
    assert gone.status_code == 204
    after = world.get(f"/v1/files/{file['id']}").json()
    assert (after["status"], after["status_details"]) == (
        "error", "the dataset that was made of it has been deleted",
    )  # fmt: skip
    again = world.client.delete(f"/v1/files/{file['id']}", headers=world.headers())
    assert again.status_code == 200


def test_content_has_ranges_and_its_hash(world: World) -> None:
    file = send(world)
    url = f"/v1/files/{file['id']}/content"
    whole = world.get(url)
    assert whole.content == DATA
    assert whole.headers["etag"] == f'"sha256:{file["sha256"]}"'
    assert "prefs.jsonl" in whole.headers["content-disposition"]
    part = world.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, DATA[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(DATA)}"
    head = world.client.head(url, headers=world.headers())
    assert int(head.headers["content-length"]) == len(DATA)
    same = world.get(url, headers={"If-None-Match": whole.headers["etag"]})
    assert same.status_code == 304
    check_problem(world.get(url, headers={"Range": "bytes=999999-"}), 416, "range_not_satisfiable")


def test_files_expire(world: World) -> None:
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = send(world, **fields)
    created, expires = file["created_at"], file["expires_at"]
    assert isinstance(created, int)
    assert isinstance(expires, int)
    assert expires - created in (3600, 3601)
    with world.database.transaction() as session:
        session.get_one(StoredFileRow, str(file["id"])).expires_at = 1.0
    check_problem(world.get(f"/v1/files/{file['id']}"), 404, "not_found")
    assert world.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({}, "purpose"),
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "60"}, "expires_after"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "soon"}, "expires_after"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "now"}, "expires_after"),
    ],
)
def test_wrong_fields_leave_nothing(world: World, form: dict[str, str], param: str) -> None:
    answer = world.post("/v1/files", files={"file": ("a.jsonl", DATA)}, data=form)
    problem = check_problem(answer, 422, "invalid_input")
    assert problem["error"]["param"] == param
    assert names(world.settings.file_dir) == []


def test_refused_bytes_leave_nothing(world: World) -> None:
    for data, status, code in (
        (b"BZh91AY" + DATA, 415, "unsupported_media_type"),
        (b"", 422, "empty_file"),
        (b"x" * 2_000_001, 413, "too_large"),
    ):
        answer = world.post("/v1/files", files={"file": ("a", data)}, data={"purpose": "fine-tune"})
        check_problem(answer, status, code)
    assert names(world.settings.file_dir) == []
    assert names(world.settings.upload_dir) == []
    assert world.get("/v1/files").json()["data"] == []


def test_other_peoples_files_are_not_there(world: World) -> None:
    file = send(world)
    eve = world.headers("eve")
    for method, path in (
        ("GET", f"/v1/files/{file['id']}"),
        ("GET", f"/v1/files/{file['id']}/content"),
        ("DELETE", f"/v1/files/{file['id']}"),
    ):
        check_problem(world.client.request(method, path, headers=eve), 404, "not_found")
    job = {"model": MODEL, "training_file": file["id"]}
    check_problem(
        world.client.post("/v1/fine_tuning/jobs", json=job, headers=eve), 404, "not_found"
    )


def test_scopes(world: World) -> None:
    reader = {"Authorization": f"Bearer {world.key(scopes=(Scope.DATASETS_READ,))}"}
    assert world.client.get("/v1/files", headers=reader).status_code == 200
    answer = world.client.post(
        "/v1/files", files={"file": DATA}, data={"purpose": "evals"}, headers=reader
    )
    check_problem(answer, 403, "missing_scope")


def test_a_file_without_hard_links_is_kept_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    file = send(world)
    upload = world.settings.upload_dir / str(file["dataset_id"])
    assert upload.read_bytes() == DATA
    assert upload.stat().st_mode & 0o777 == 0o600
