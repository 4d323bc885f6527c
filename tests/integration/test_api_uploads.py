"""Uploads in parts: any order, again after a break, checked when they are put together."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.file import UploadSession
from tests.integration.api_world import World, pairs, running_api
from tests.integration.test_api import check_problem

DATA = pairs(60)
PARTS = [DATA[start : start + 2000] for start in range(0, len(DATA), 2000)]


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(
        sqlite_url, tmp_path, api={"max_upload_bytes": 100_000}, files={"max_part_bytes": 3000}
    ) as made:
        yield made


def begin(world: World, size: int = len(DATA), **more: Any) -> str:
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": size, "mime_type": "text/plain"}
    answer = world.post("/v1/uploads", json={**body, **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "pending"
    return str(answer.json()["id"])


def add(world: World, upload: str, data: bytes) -> Any:
    return world.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", data)})


def complete(world: World, upload: str, parts: list[str], **more: str) -> Any:
    return world.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts, **more})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_parts_become_a_file_and_a_dataset(world: World) -> None:
    upload = begin(world, expires_after={"anchor": "created_at", "seconds": 3600})
    # Sent backwards: the order of the file is that of `complete`.
    ids = [add(world, upload, part).json()["id"] for part in PARTS[::-1]][::-1]
    listed = world.get(f"/v1/uploads/{upload}/parts").json()["data"]
    assert {part["id"]: part["sha256"] for part in listed} == {
        part_id: hashlib.sha256(part).hexdigest() for part_id, part in zip(ids, PARTS, strict=True)
    }
    md5 = hashlib.md5(DATA, usedforsecurity=False).hexdigest()
    answer = complete(world, upload, ids, md5=md5)
    assert answer.status_code == 200, answer.text
    done = answer.json()
    assert (done["object"], done["status"], done["bytes"]) == ("upload", "completed", len(DATA))
    file = done["file"]
    assert file["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert file["expires_at"] - file["created_at"] in (3600, 3601)
    assert world.get(f"/v1/files/{file['id']}/content").content == DATA
    world.validate()
    assert world.get(f"/v1/files/{file['id']}").json()["status"] == "processed"
    # Asked again, as a client does whose connection broke: the same answer, no other file.
    assert complete(world, upload, ids).json()["file"]["id"] == file["id"]
    assert names(world.settings.file_dir) == [file["id"]]
    check_problem(add(world, upload, b"more"), 409, "upload_not_pending")
    cancel = world.post(f"/v1/uploads/{upload}/cancel")
    check_problem(cancel, 409, "upload_not_pending")


def test_the_same_bytes_are_the_same_part(world: World) -> None:
    upload = begin(world, 20, purpose="user_data")
    first = add(world, upload, b"0123456789").json()
    again = add(world, upload, b"0123456789").json()
    assert again == first
    assert names(world.settings.part_dir) == [first["id"]]
    answer = complete(world, upload, [first["id"], first["id"]])
    file = answer.json()["file"]
    assert world.get(f"/v1/files/{file['id']}/content").content == b"0123456789" * 2


def test_what_was_announced_is_what_must_come(world: World) -> None:
    upload = begin(world, 15, purpose="user_data")
    part = add(world, upload, b"0123456789").json()["id"]
    check_problem(add(world, upload, b"abcdef"), 409, "upload_too_long")
    check_problem(complete(world, upload, [part]), 422, "upload_size_mismatch")
    check_problem(complete(world, upload, [part, "part_x"]), 404, "not_found")
    last = add(world, upload, b"abcde").json()["id"]
    wrong = complete(world, upload, [part, last], md5="0" * 32)
    check_problem(wrong, 422, "upload_damaged")
    assert names(world.settings.part_dir) == sorted([part, last])
    assert complete(world, upload, [part, last]).status_code == 200


def test_a_file_that_is_refused_can_be_completed_no_further(world: World) -> None:
    upload = begin(world, 20)
    part = add(world, upload, b"BZh" + b"x" * 17).json()["id"]
    check_problem(complete(world, upload, [part]), 415, "unsupported_media_type")
    assert names(world.settings.file_dir) == [part]
    assert names(world.settings.upload_dir) == []


def test_a_cancelled_upload_leaves_nothing(world: World) -> None:
    upload = begin(world)
    part = add(world, upload, PARTS[0]).json()["id"]
    for _ in range(2):
        assert world.post(f"/v1/uploads/{upload}/cancel").json()["status"] == "cancelled"
    assert names(world.settings.file_dir) == []
    check_problem(complete(world, upload, [part]), 409, "upload_not_pending")


def test_an_upload_that_took_too_long_takes_no_more(world: World) -> None:
    upload = begin(world)
    with world.database.transaction() as session:
        session.get_one(UploadSession, upload).expires_at = 1.0
    problem = check_problem(add(world, upload, PARTS[0]), 409, "upload_not_pending")
    assert "expired" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"bytes": 100_001}, 413, "too_large"),
        ({"bytes": 0}, 422, "invalid_input"),
        ({"purpose": "vision"}, 422, "invalid_input"),
        ({"more": 1}, 422, "invalid_input"),
    ],
)
def test_what_cannot_come_is_refused_at_once(
    world: World, body: dict[str, Any], status: int, code: str
) -> None:
    whole = {"filename": "p", "purpose": "evals", "bytes": 9, "mime_type": "text/plain", **body}
    check_problem(world.post("/v1/uploads", json=whole), status, code)


def test_parts_have_a_size_and_a_name(world: World) -> None:
    upload = begin(world)
    check_problem(add(world, upload, b"x" * 3001), 413, "too_large")
    url = f"/v1/uploads/{upload}/parts"
    problem = check_problem(world.post(url, files={"file": b"x"}), 422, "unknown_parameter")
    assert "takes data" in problem["detail"]
    assert names(world.settings.file_dir) == []


def test_other_peoples_uploads_are_not_there(world: World) -> None:
    upload = begin(world)
    eve = world.headers("eve")
    part = {"files": {"data": b"x"}}
    for method, path, more in (
        ("GET", "", {}), ("GET", "/parts", {}), ("POST", "/parts", part), ("POST", "/cancel", {}),
        ("POST", "/complete", {"json": {"part_ids": ["part_1"]}}),
    ):  # fmt: skip
        answer = world.client.request(method, f"/v1/uploads/{upload}{path}", headers=eve, **more)
        check_problem(answer, 404, "not_found")
