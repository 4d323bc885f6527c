"""Datasets of rows in the body and of files, dry runs, another name, the content as one file."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api_world import World, pairs, running_api
from tests.integration.test_api import check_problem

ROWS = [json.loads(line) for line in pairs(30).splitlines()]


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def make(world: World, source: dict[str, Any], query: str = "", **body: Any) -> dict[str, Any]:
    answer = world.post(
        f"/v1/datasets{query}", json={"source": source, **body}, headers={"Prefer": "wait=0"}
    )
    assert answer.status_code == 202, answer.text
    world.validate()
    view: dict[str, Any] = world.get(answer.headers["location"]).json()
    return view


def canonical(world: World, dataset_id: str) -> list[dict[str, Any]]:
    text = world.get(f"/v1/datasets/{dataset_id}/content").text
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------- rows in the body


def test_rows_in_the_body_are_what_a_file_of_them_would_be(world: World) -> None:
    view = make(world, {"type": "inline", "rows": ROWS}, name="sums")
    assert (view["status"], view["name"], view["source"]) == ("ready", "sums", None)
    kept = (world.settings.upload_dir / view["id"]).read_bytes()
    assert [json.loads(line) for line in kept.splitlines()] == ROWS
    assert (view["bytes"], view["sha256"]) == (len(kept), hashlib.sha256(kept).hexdigest())
    uploaded = world.dataset()
    assert canonical(world, view["id"]) == canonical(world, uploaded)


def test_rows_have_any_numbers_and_texts(world: World) -> None:
    rows = [{**row, "n": 10**30 + n, "note": "größer ☃"} for n, row in enumerate(ROWS)]
    view = make(world, {"type": "inline", "rows": rows})
    kept = (world.settings.upload_dir / view["id"]).read_bytes()
    assert [json.loads(line) for line in kept.splitlines()] == rows
    assert view["counts"]["pairs"] == 30


@pytest.mark.parametrize(
    ("source", "pointer"),
    [
        ({"type": "inline", "rows": []}, "/source/rows"),
        ({"type": "inline", "rows": [{}, 3]}, "/source/rows/1"),
        ({"type": "inline", "rows": [{}], "more": 1}, "/source/more"),
        ({"type": "inline"}, "/source/rows"),
        ({"type": "file", "file_id": "../x"}, "/source/file_id"),
        ({"type": "ftp"}, "/source"),
    ],
)
def test_sources_that_are_none_are_refused(
    world: World, source: dict[str, Any], pointer: str
) -> None:
    answer = world.post("/v1/datasets", json={"source": source})
    problem = check_problem(answer, 422, "invalid_input")
    assert problem["errors"][0]["pointer"] == pointer
    folder = world.settings.upload_dir
    assert not folder.exists() or list(folder.iterdir()) == []


def test_bodies_are_as_long_as_the_server_takes(sqlite_url: str, tmp_path: Path) -> None:
    with running_api(sqlite_url, tmp_path, api={"max_body_bytes": 4000}) as world:
        small = make(world, {"type": "inline", "rows": ROWS})
        assert small["status"] == "ready"
        large = world.post("/v1/datasets", json={"source": {"type": "inline", "rows": ROWS * 2}})
        check_problem(large, 413, "too_large")


# ---------------------------------------------------------------------- a stored file


def test_a_stored_file_is_read_as_often_as_one_likes(world: World) -> None:
    sent = world.post(
        "/v1/files", files={"file": ("p.jsonl", pairs(30))}, data={"purpose": "user_data"}
    ).json()
    assert sent["dataset_id"] is None
    view = make(world, {"type": "file", "file_id": sent["id"]})
    assert (view["name"], view["sha256"], view["status"]) == ("p.jsonl", sent["sha256"], "ready")
    again = make(world, {"type": "file", "file_id": sent["id"]}, name="again")
    assert again["version"] == 1
    assert canonical(world, view["id"]) == canonical(world, again["id"])
    assert world.client.delete(f"/v1/files/{sent['id']}", headers=world.headers()).is_success
    assert world.get(f"/v1/datasets/{view['id']}").status_code == 200
    assert (world.settings.upload_dir / view["id"]).read_bytes() == pairs(30)


def test_somebody_elses_file_is_no_source(world: World) -> None:
    sent = world.post(
        "/v1/files", files={"file": ("p.jsonl", pairs(30))}, data={"purpose": "user_data"}
    ).json()
    body = {"source": {"type": "file", "file_id": sent["id"]}}
    answer = world.client.post("/v1/datasets", json=body, headers=world.headers("eve"))
    check_problem(answer, 404, "not_found")
    (world.settings.file_dir / sent["id"]).unlink()
    check_problem(world.post("/v1/datasets", json=body), 404, "not_found")
    assert world.get("/v1/datasets").json()["data"] == []


# --------------------------------------------------------------------------- dry runs


def test_a_dry_run_reports_and_keeps_no_pairs(world: World) -> None:
    view = make(world, {"type": "inline", "rows": ROWS}, "?dry_run=true")
    assert (view["status"], view["policy"]["dry_run"]) == ("checked", True)
    assert [file["path"] for file in view["files"]] == ["rejected.jsonl"]
    assert view["counts"]["pairs"] == 30
    form = world.client.post(
        "/v1/datasets?dry_run=true",
        files={"file": ("p.jsonl", pairs(30))},
        data={"policy": '{"on_invalid": "fail"}'},
        headers={**world.headers(), "Prefer": "wait=0"},
    )
    assert form.json()["policy"] | {"dry_run": True, "on_invalid": "fail"} == form.json()["policy"]
    world.validate()
    assert world.get(form.headers["location"]).json()["status"] == "checked"
    named = make(world, {"type": "inline", "rows": ROWS}, policy={"dry_run": True})
    assert named["status"] == "checked", "the parameter does not switch the policy's off"


# ---------------------------------------------------------------------------- changes


def test_another_name_needs_the_version_that_one_has_seen(world: World) -> None:
    made = world.dataset()
    path = f"/v1/datasets/{made}"
    seen = world.get(path)
    named = world.client.patch(
        path, json={"name": "März"}, headers={**world.headers(), "If-Match": seen.headers["etag"]}
    )
    assert (named.status_code, named.json()) == (200, {**seen.json(), "name": "März"})
    assert named.headers["etag"] == world.get(path).headers["etag"] != seen.headers["etag"]
    late = world.client.patch(
        path, json={"name": "x"}, headers={**world.headers(), "If-Match": seen.headers["etag"]}
    )
    check_problem(late, 412, "precondition_failed")
    same = world.client.patch(path, json={}, headers=world.headers())
    assert same.json()["name"] == "März"


@pytest.mark.parametrize("body", [{"name": ""}, {"name": "a\tb"}, {"name": 3}, {"policy": {}}])
def test_nothing_else_is_changed(world: World, body: dict[str, Any]) -> None:
    path = f"/v1/datasets/{world.dataset()}"
    before = world.get(path).json()
    refused = world.client.patch(path, json=body, headers=world.headers())
    check_problem(refused, 422, "invalid_input")
    strange = world.client.patch(path, json={"name": "mine"}, headers=world.headers("eve"))
    check_problem(strange, 404, "not_found")
    assert world.get(path).json() == before


# ---------------------------------------------------------------------------- content


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_content_is_the_file_of_the_rows(world: World, form: str) -> None:
    made = world.dataset()
    whole = world.get(f"/v1/datasets/{made}/content?format={form}")
    rows = world.get(f"/v1/datasets/{made}/rows?format={form}")
    assert whole.content == rows.content
    assert whole.headers["etag"] == rows.headers["etag"]
    assert f"{made}.{form}" in whole.headers["content-disposition"]
    assert whole.headers["repr-digest"].startswith("sha-256=:")
    path = f"/v1/datasets/{made}/content?format={form}"
    part = world.get(path, headers={"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, whole.content[5:10])
    etag = {"If-None-Match": whole.headers["etag"]}
    assert world.get(path, headers=etag).status_code == 304
    head = world.client.head(path, headers={**world.headers(), **etag})
    assert (head.status_code, head.content) == (304, b"")
    size = world.client.head(path, headers=world.headers()).headers["content-length"]
    assert size == str(len(whole.content))


def test_content_is_there_when_the_dataset_is_read(world: World) -> None:
    made = world.upload().json()["id"]
    problem = check_problem(world.get(f"/v1/datasets/{made}/content"), 409, "dataset_not_ready")
    assert problem["retryable"]
    refused = world.get(f"/v1/datasets/{made}/content?format=csv")
    check_problem(refused, 422, "invalid_input")
