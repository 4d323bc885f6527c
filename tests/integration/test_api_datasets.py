"""Datasets over HTTP: upload, wait, refuse, report, rows."""

import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.lifecycle import JobKind, JobStatus
from models.repositories.jobs import JobRepository
from tests.integration.api_world import World, gzipped, pairs, running_api
from tests.integration.test_api import check_problem


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path, api={"max_upload_bytes": 2_000_000}) as made:
        yield made


def stored_uploads(world: World) -> list[str]:
    folder = world.settings.upload_dir
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def test_upload_waits_and_answers_ready(world: World) -> None:
    data = pairs(30)
    worker = world.soon(world.validate, JobKind.DATASET)
    answer = world.post(
        "/v1/datasets",
        files={"file": ("C:\\data\\mine.jsonl", data)},
        headers={"Prefer": "respond-async, wait=20"},
    )
    worker.join()
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait=20"
    body = answer.json()
    assert body["object"] == "dataset"
    assert body["status"] in ("ready", "ready_with_warnings")
    assert body["name"] == "mine.jsonl"
    assert body["sha256"] == hashlib.sha256(data).hexdigest()
    assert body["bytes"] == len(data)
    assert body["counts"]["pairs"] == 30
    assert body["error"] is None
    assert isinstance(body["created_at"], int)
    stored = world.settings.upload_dir / body["id"]
    assert stored.read_bytes() == data
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert stored_uploads(world) == [body["id"]]


def test_upload_that_takes_long_is_accepted(world: World) -> None:
    answer = world.upload(name="numbers", policy='{"on_invalid": "fail"}')
    assert answer.status_code == 202
    body = answer.json()
    assert answer.headers["location"] == f"/v1/datasets/{body['id']}"
    assert answer.headers["preference-applied"] == "wait=0"
    assert body["status"] == "validating"
    assert body["name"] == "numbers"
    assert body["policy"]["on_invalid"] == "fail"
    assert world.get(answer.headers["location"]).json() == body
    assert world.get(f"/v1/datasets/{body['id']}/report").json()["status"] == "validating"
    rows = world.get(f"/v1/datasets/{body['id']}/rows")
    check_problem(rows, 409, "dataset_not_ready")


def test_invalid_dataset_is_a_problem_with_lines(world: World) -> None:
    data = pairs(20) + b'{"prompt": "p", "chosen": "c"}\nnot json\n' * 3
    worker = world.soon(world.validate, JobKind.DATASET)
    answer = world.post("/v1/datasets", files={"file": data}, headers={"Prefer": "wait=20"})
    worker.join()
    problem = check_problem(answer, 422, "dataset_invalid")
    assert problem["error"]["param"] == "file"
    by_code = {e["code"]: e for e in problem["errors"]}
    assert by_code["not_json"]["line"] == 22
    assert by_code["missing_field"]["line"] == 21
    assert by_code["missing_field"]["pointer"].startswith("/21/")
    assert problem["report_url"] == f"/v1/datasets/{problem['dataset_id']}/report"
    report = world.get(problem["report_url"]).json()
    assert report["counts"]["rejected"] == 6
    assert report["rejected_rows_url"].endswith("view=rejected&format=jsonl")
    dataset = world.get(f"/v1/datasets/{problem['dataset_id']}").json()
    assert dataset["status"] == "invalid"
    assert dataset["error"]["code"] == "dataset_invalid"
    rejected = world.get(report["rejected_rows_url"])
    assert rejected.headers["content-type"] == "application/jsonl"
    assert [json.loads(line)["line"] for line in rejected.text.splitlines()] == list(range(21, 27))
    job = world.post("/v1/fine_tuning/jobs", json={"model": "tiny-lm", "dataset_id": dataset["id"]})
    check_problem(job, 409, "dataset_not_ready")


def test_validation_that_dies_does_not_leave_the_client_waiting(world: World) -> None:
    def die() -> None:
        error = {"code": "internal", "message": "the parser died", "retryable": False}
        world.finish(world.claim(JobKind.DATASET), JobStatus.FAILED, error=error)

    worker = world.soon(die, JobKind.DATASET)
    answer = world.post("/v1/datasets", files={"file": pairs(20)}, headers={"Prefer": "wait=20"})
    worker.join()
    assert check_problem(answer, 500, "internal")["detail"] == "the parser died"


def test_a_paused_validation_says_what_it_waits_for(world: World) -> None:
    def pause() -> None:
        fence = world.claim(JobKind.DATASET)
        error = {"code": "disk_full", "message": "the disk is full", "hint": "Free some"}
        with world.database.transaction() as session:
            JobRepository(session).pause(fence, error, data={})

    worker = world.soon(pause, JobKind.DATASET)
    answer = world.post("/v1/datasets", files={"file": pairs(20)}, headers={"Prefer": "wait=20"})
    worker.join()
    assert answer.status_code == 202, "the upload is kept: it is not refused"
    view = answer.json()
    assert (view["status"], view["error"]["code"]) == ("validating", "disk_full")
    assert world.post(f"/v1/jobs/{view['job_id']}/resume").json()["status"] == "queued"
    world.validate()
    view = world.get(f"/v1/datasets/{view['id']}").json()
    assert (view["status"], view["error"]) == ("ready_with_warnings", None)


def test_cancelled_validation_is_said(world: World) -> None:
    made = world.upload().json()
    assert world.post(f"/v1/jobs/{made['job_id']}/cancel").json()["status"] == "cancelled"
    view = world.get(f"/v1/datasets/{made['id']}").json()
    assert view["status"] == "invalid"
    assert view["error"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 422, "empty_file"),
        (b"BZh9" + b"x" * 100, 415, "unsupported_media_type"),
        (b"7z\xbc\xaf\x27\x1c" + b"x" * 100, 415, "unsupported_media_type"),
        ("{}".encode("utf-16"), 415, "unsupported_media_type"),
        (b"x" * 2_000_001, 413, "too_large"),
        (b"x" * 4_000_000, 413, "too_large"),
    ],
)
def test_files_that_are_refused_at_once(world: World, data: bytes, status: int, code: str) -> None:
    check_problem(world.upload(data), status, code)
    assert stored_uploads(world) == []
    assert world.get("/v1/datasets").json()["data"] == []


def test_limit_is_exact(world: World) -> None:
    assert world.upload(b"x" * 2_000_000).status_code == 202


def test_chunked_upload_is_counted(world: World) -> None:
    boundary = "b0undary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"\r\n\r\n'.encode()
    parts = [head, *[b"x" * 500_000] * 5, f"\r\n--{boundary}--\r\n".encode()]
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = world.post("/v1/datasets", content=iter(parts), headers=kind)
    assert "content-length" not in answer.request.headers
    check_problem(answer, 413, "too_large")
    assert stored_uploads(world) == []
    broken_off = world.post("/v1/datasets", content=head + b"{}", headers=kind)
    check_problem(broken_off, 400, "malformed_request")
    nonsense = world.post("/v1/datasets", content=b"nonsense", headers=kind)
    check_problem(nonsense, 400, "malformed_request")
    assert stored_uploads(world) == []


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        ({"beat": "1"}, "unknown_parameter", "beat"),
        ({"policy": "{"}, "invalid_input", "policy"),
        ({"policy": '{"on_invalid": "maybe"}'}, "invalid_input", "policy"),
        ({"policy": '{"layout": "nonsense"}'}, "invalid_input", "policy"),
        (
            {"policy": '{"on_invalid": "fail", "max_invalid_fraction": 0.5}'},
            "invalid_input",
            "policy",
        ),
        ({"name": "x" * 201}, "invalid_input", "name"),
        ({"name": "a\nb"}, "invalid_input", "name"),
    ],
)
def test_bad_fields(world: World, form: dict[str, str], code: str, param: str) -> None:
    problem = check_problem(world.upload(None, **form), 422, code)
    assert problem["error"]["param"] == param
    assert stored_uploads(world) == []


def test_policy_errors_have_pointers(world: World) -> None:
    answer = world.upload(None, policy='{"split": {"test": 0.9}}')
    problem = check_problem(answer, 422, "invalid_input")
    assert problem["errors"][0]["pointer"] == "/split/test"


def test_form_without_file_and_other_content_types(world: World) -> None:
    no_file = world.post("/v1/datasets", files={"name": (None, "x")})
    check_problem(no_file, 422, "missing_file")
    check_problem(world.post("/v1/datasets", content=b"x"), 415, "unsupported_media_type")
    check_problem(world.post("/v1/datasets"), 415, "unsupported_media_type")
    twice = world.post("/v1/datasets", files=[("file", pairs(1)), ("file", pairs(1))])
    check_problem(twice, 422, "invalid_input")


def test_full_disk_is_507(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    problem = check_problem(world.upload(), 507, "disk_full")
    assert problem["retryable"] is True
    assert stored_uploads(world) == []


def test_gzip_is_taken(world: World) -> None:
    assert world.upload(gzipped(pairs(30))).status_code == 202
    world.validate()
    dataset = world.get("/v1/datasets").json()["data"][0]
    assert dataset["counts"]["pairs"] == 30


def test_archive_of_another_layout_is_taken(world: World) -> None:
    rows = [
        {"prompt": f"Is {n} even?", "completion": text, "label": text == "Yes."}
        for n in range(0, 40, 2)
        for text in ("Yes.", "No.")
    ]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("README.md", "# Numbers\n")
        archive.writestr("data/train.json", json.dumps(rows))
    made = world.upload(buffer.getvalue(), policy='{"pairing": "all", "layout": "kto"}')
    assert made.status_code == 202, made.text
    assert made.json()["policy"]["pairing"] == "all"
    world.validate()
    report = world.get(f"/v1/datasets/{made.json()['id']}/report").json()
    assert report["detected"]["layout"] == "kto"
    assert report["detected"]["container"] == "zip"
    assert report["detected"]["ignored_members"] == ["README.md"]
    assert (report["counts"]["rows"], report["counts"]["pairs"]) == (40, 20)


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"pairing": "all"}, "option_ignored"),
        ({"layout": "nectar"}, "unusable_layout"),
        ({"column_mapping": {"prompt": "question"}}, "unusable_mapping"),
    ],
)
def test_policies_that_the_file_cannot_follow(
    world: World, policy: dict[str, object], code: str
) -> None:
    made = world.upload(policy=json.dumps(policy)).json()
    world.validate()
    view = world.get(f"/v1/datasets/{made['id']}").json()
    assert (view["status"], view["error"]["code"]) == ("invalid", code)
    assert view["error"]["hint"]


def test_dry_run_has_a_report_and_cannot_be_trained_on(world: World) -> None:
    made = world.upload(policy='{"dry_run": true}').json()
    world.validate()
    view = world.get(f"/v1/datasets/{made['id']}").json()
    assert (view["status"], view["error"], view["canonical_sha256"]) == ("checked", None, None)
    assert view["counts"]["pairs"] == 30
    report = world.get(view["report_url"]).json()
    assert (report["status"], report["counts"]["train"] > 0) == ("checked", True)
    assert world.get(f"/v1/datasets/{made['id']}/rows?view=rejected").json()["data"] == []
    check_problem(world.get(f"/v1/datasets/{made['id']}/rows"), 409, "dataset_not_ready")
    job = world.post("/v1/fine_tuning/jobs", json={"model": "tiny-lm", "dataset_id": made["id"]})
    problem = check_problem(job, 409, "dataset_not_ready")
    assert problem["hint"] == f"POST /v1/datasets/{made['id']}/versions without dry_run"


def test_etag_spares_the_body(world: World) -> None:
    dataset = world.upload().json()["id"]
    for url in (f"/v1/datasets/{dataset}", f"/v1/datasets/{dataset}/report"):
        etag = world.get(url).headers["etag"]
        assert etag.startswith('W/"')
        same = world.get(url, headers={"If-None-Match": f'"other", {etag}'})
        assert same.status_code == 304
        assert same.content == b""
        assert same.headers["etag"] == etag
    world.validate()
    changed = world.get(f"/v1/datasets/{dataset}", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag


def test_rows_in_pages_and_as_a_stream(world: World) -> None:
    dataset = world.dataset()
    numbers: list[int] = []
    url = f"/v1/datasets/{dataset}/rows?limit=12"
    for _ in range(5):
        page = world.get(f"{url}&after={numbers[-1] if numbers else 0}").json()
        numbers += [row["number"] for row in page["data"]]
        assert page["last_id"] == str(numbers[-1])
        if not page["has_more"]:
            break
    assert numbers == list(range(1, 31))
    row = page["data"][0]["row"]
    assert row["chosen"][0]["role"] == "assistant"
    stream = world.get(f"/v1/datasets/{dataset}/rows?format=jsonl")
    path = world.settings.artifact_dir / "datasets" / dataset / "canonical.jsonl"
    assert stream.content == path.read_bytes()
    check_problem(world.get(f"/v1/datasets/{dataset}/rows?view=raw"), 422, "invalid_input")
    assert world.get(f"/v1/datasets/{dataset}/rows?view=rejected").json()["data"] == []
