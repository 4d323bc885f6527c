"""Downloads: whole files and ranges, conditions, hashes, and no way out of the folder."""

import base64
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from core.lifecycle import JobKind
from models.job import Job
from models.session import Database
from tests.integration.api_world import MODEL, World, running_api
from tests.integration.test_api import check_problem

BIG = bytes(range(256)) * 2500  # more than one chunk
CONTENTS = {"model.safetensors": BIG, "config.json": b"{}", "sub dir/é.txt": b"x", "empty": b""}


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared(_sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One API for all tests of this file that change nothing."""
    folder = tmp_path_factory.mktemp("shared")
    file = folder / "kdpo.db"
    file.write_bytes(_sqlite_template.read_bytes())
    with running_api(f"sqlite:///{file}", folder) as made:
        yield made


@pytest.fixture(scope="module")
def stored(shared: World) -> str:
    shared.training_job(shared.dataset())
    return shared.publish(shared.claim(JobKind.TRAINING), CONTENTS)


def test_merged_checkpoint_is_not_exported(world: World) -> None:
    world.training_job(world.dataset())
    merged = world.publish(world.claim(JobKind.TRAINING), CONTENTS, kind="merged")
    answer = world.post(f"/v1/checkpoints/{merged}/export", json={"merge": True})
    check_problem(answer, 409, "checkpoint_not_adapter")
    assert world.get("/v1/jobs?kind=export").json()["data"] == []


def test_exports_that_do_nothing_or_may_not_be_pushed(world: World) -> None:
    world.training_job(world.dataset())
    adapter = world.publish(world.claim(JobKind.TRAINING), CONTENTS)
    url = f"/v1/checkpoints/{adapter}/export"
    target = {"repo_id": "acme/aligned", "token_secret": "writer"}
    for body in (
        {"merge": False},
        {"merge": False, "dtype": "float16", "push_to_hub": target},
        {"dtype": "int8"},
        {"push_to_hub": {**target, "repo_id": "no-owner"}},
    ):
        check_problem(world.post(url, json=body), 422, "invalid_input")
    refused = world.post(url, json={"push_to_hub": target})
    check_problem(refused, 403, "push_not_allowed")
    assert world.get("/v1/jobs?kind=export").json()["data"] == []


def test_head_ignores_a_range(shared: World, stored: str) -> None:
    for asked in ("bytes=1-3", f"bytes={len(BIG)}-"):
        head = shared.client.head(url_of(stored), headers={**shared.headers(), "Range": asked})
        assert head.status_code == 200
        assert head.headers["content-length"] == str(len(BIG))
        assert "content-range" not in head.headers


def test_download_reads_the_database_beside_the_event_loop(
    shared: World, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    reading = Database.reading

    def noted(database: Database) -> AbstractContextManager[Session]:
        threads.append(threading.current_thread().name)
        return reading(database)

    monkeypatch.setattr(Database, "reading", noted)
    assert shared.get(url_of(stored, "empty")).status_code == 200
    assert threads
    assert all(name.startswith("AnyIO worker") for name in threads), threads


@pytest.fixture
def checkpoint(world: World) -> str:
    world.training_job(world.dataset())
    return world.publish(world.claim(JobKind.TRAINING), CONTENTS)


def url_of(checkpoint: str, name: str = "model.safetensors") -> str:
    return f"/v1/checkpoints/{checkpoint}/files/{name}"


def etag_of(data: bytes) -> str:
    return f'"sha256:{hashlib.sha256(data).hexdigest()}"'


def test_manifest_and_every_file(shared: World, stored: str) -> None:
    view = shared.get(f"/v1/checkpoints/{stored}").json()
    assert view["num_files"] == len(CONTENTS)
    assert view["label"] == "best"
    files = shared.get(f"/v1/checkpoints/{stored}/files").json()["data"]
    assert {f["path"] for f in files} == set(CONTENTS)
    for file in files:
        answer = shared.get(file["url"])
        data = CONTENTS[file["path"]]
        assert answer.status_code == 200
        assert answer.content == data
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert answer.headers["etag"] == etag_of(data)
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["content-length"] == str(len(data))
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["content-disposition"].startswith("attachment")


def test_head_is_get_without_the_body(shared: World, stored: str) -> None:
    got = shared.get(url_of(stored))
    head = shared.client.head(url_of(stored), headers=shared.headers())
    assert head.status_code == 200
    assert head.content == b""
    for name in ("etag", "content-length", "repr-digest", "content-type"):
        assert head.headers[name] == got.headers[name]


def test_conditions(shared: World, stored: str) -> None:
    url, etag = url_of(stored), etag_of(BIG)
    for value in (etag, f'W/"x", {etag}', f"W/{etag}", "*"):
        same = shared.get(url, headers={"If-None-Match": value, "Range": "bytes=0-0"})
        assert same.status_code == 304, value
        assert same.content == b""
    assert shared.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    part = shared.get(url, headers={"Range": "bytes=1-3", "If-Range": etag})
    assert part.status_code == 206
    for stale in ('"other"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        whole = shared.get(url, headers={"Range": "bytes=1-3", "If-Range": stale})
        assert whole.status_code == 200
        assert whole.content == BIG


@settings(max_examples=60, deadline=None)
@given(
    start=st.none() | st.integers(0, len(BIG) + 5),
    stop=st.none() | st.integers(0, len(BIG) + 5),
)
def test_ranges_are_slices(shared: World, stored: str, start: int | None, stop: int | None) -> None:
    asked = f"bytes={'' if start is None else start}-{'' if stop is None else stop}"
    answer = shared.get(url_of(stored), headers={"Range": asked})
    if start is None:
        expected = None if stop is None else BIG[max(0, len(BIG) - stop) :]
    elif stop is not None and stop < start:
        expected = None
    else:
        expected = BIG[start : None if stop is None else stop + 1]
    if expected is None:
        assert (answer.status_code, answer.content) == (200, BIG)
    elif not expected:
        check_problem(answer, 416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{len(BIG)}"
    else:
        assert (answer.status_code, answer.content) == (206, expected)
        first = len(BIG) - len(expected) if start is None else start
        assert answer.headers["content-range"] == (
            f"bytes {first}-{first + len(expected) - 1}/{len(BIG)}"
        )
        assert answer.headers["content-length"] == str(len(expected))


@pytest.mark.parametrize("asked", ["bytes=0-1,3-4", "bytes=a-b", "items=0-1", "bytes=-", "0-1"])
def test_ranges_of_other_forms_give_the_whole_file(shared: World, stored: str, asked: str) -> None:
    answer = shared.get(url_of(stored), headers={"Range": asked})
    assert answer.status_code == 200
    assert answer.content == BIG


def test_empty_file_has_no_range(shared: World, stored: str) -> None:
    for asked in ("bytes=0-0", "bytes=-1"):
        answer = shared.get(url_of(stored, "empty"), headers={"Range": asked})
        check_problem(answer, 416, "range_not_satisfiable")


def test_two_halves_make_the_file(shared: World, stored: str) -> None:
    half = len(BIG) // 2
    first = shared.get(url_of(stored), headers={"Range": f"bytes=0-{half - 1}"})
    rest = shared.get(
        url_of(stored), headers={"Range": f"bytes={half}-", "If-Range": first.headers["etag"]}
    )
    assert first.content + rest.content == BIG


@pytest.mark.parametrize(
    "name",
    [
        "../../../kdpo.db",
        "..%2f..%2f..%2fkdpo.db",
        "%2e%2e/%2e%2e/kdpo.db",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "sub dir",
        "config.json/",
        "%2e/config.json",
        "config.json%00",
        "manifest.json",
    ],
)
def test_only_listed_paths_are_opened(shared: World, stored: str, name: str) -> None:
    answer = shared.get(f"/v1/checkpoints/{stored}/files/{name}")
    assert answer.status_code in (404, 405), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("name", ["config.json", "sub dir/é.txt"])
def test_links_in_the_folder_are_not_followed(
    world: World, checkpoint: str, name: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret" / Path(name).name
    secret.parent.mkdir()
    secret.write_bytes(CONTENTS[name])
    folder = world.settings.artifact_dir / "checkpoints" / checkpoint
    target = folder / name
    target.unlink()
    if target.parent == folder:
        target.symlink_to(secret)
    else:
        target.parent.rmdir()
        target.parent.symlink_to(secret.parent)
    check_problem(world.get(url_of(checkpoint, name)), 404, "not_found")


def test_changed_and_lost_files_are_not_sent(world: World, checkpoint: str) -> None:
    folder = world.settings.artifact_dir / "checkpoints" / checkpoint
    (folder / "config.json").write_bytes(b"{}{}")
    check_problem(world.get(url_of(checkpoint, "config.json")), 500, "checkpoint_corrupt")
    (folder / "config.json").unlink()
    check_problem(world.get(url_of(checkpoint, "config.json")), 404, "not_found")
    os.mkfifo(folder / "config.json")
    check_problem(world.get(url_of(checkpoint, "config.json")), 500, "checkpoint_corrupt")


def test_export_is_a_job(world: World, checkpoint: str) -> None:
    answer = world.post(f"/v1/checkpoints/{checkpoint}/export", json={"merge": True})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["kind"] == "export"
    assert job["model"] == MODEL
    with world.database.reading() as session:
        spec = session.get_one(Job, job["id"]).spec
    assert spec == {"checkpoint_id": checkpoint, "merge": True}
    for body in ({"merge": False}, {"merge": True, "push": "x"}):
        wrong = world.post(f"/v1/checkpoints/{checkpoint}/export", json=body)
        check_problem(wrong, 422, "invalid_input")
