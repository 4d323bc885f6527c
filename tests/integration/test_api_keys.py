"""Keys, rates, quotas, usage, workers and the audit log, over HTTP."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.keys import Scope
from core.lifecycle import JobKind
from core.queue import QueueName
from models.repositories.audit import AuditRepository
from models.repositories.jobs import JobRepository
from models.repositories.workers import WorkerRepository
from tests.integration.api_world import LEASE_S, MODEL, World, pairs, running_api

NEW_KEY = {"name": "notebook", "owner": "ben", "scopes": ["datasets:read", "jobs:read"]}


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(database_url, tmp_path) as world:
        yield world


def owner_id(world: World, owner: str) -> str:
    return str(world.client.get("/v1/me", headers=world.headers(owner)).json()["owner"]["id"])


def set_quota(world: World, owner: str, **limits: Any) -> Any:
    path = f"/v1/owners/{owner_id(world, owner)}/quotas"
    return world.client.patch(path, json=limits, headers=world.headers())


def quota_of(world: World, name: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = world.get("/v1/quotas").json()["data"]
    return next(row for row in rows if row["name"] == name)


# ------------------------------------------------------------------------ keys


def test_a_key_is_shown_once_used_and_revoked(world: World) -> None:
    made = world.post("/v1/api_keys", json=NEW_KEY)
    assert made.status_code == 201
    key = made.json()
    assert key["secret"].startswith(key["prefix"])
    bearer = {"Authorization": f"Bearer {key['secret']}"}
    me = world.client.get("/v1/me", headers=bearer).json()
    assert me["owner"]["name"] == "ben"
    assert me["key"]["id"] == key["id"]
    assert me["key"]["scopes"] == ["datasets:read", "jobs:read"]
    listed = world.get("/v1/api_keys", params={"owner": "ben"}).json()["data"]
    assert [one["id"] for one in listed] == [key["id"]]
    assert key["secret"] not in world.get("/v1/api_keys").text
    assert world.client.post("/v1/datasets", headers=bearer).status_code == 403
    gone = world.client.delete(f"/v1/api_keys/{key['id']}", headers=world.headers())
    assert gone.status_code == 204
    assert world.client.get("/v1/me", headers=bearer).status_code == 401
    again = world.client.delete(f"/v1/api_keys/{key['id']}", headers=world.headers())
    assert again.status_code == 404


def test_keys_for_a_new_owner_may_be_made_at_once(world: World) -> None:
    world.headers()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: world.post("/v1/api_keys", json=NEW_KEY), range(8)))
    assert [answer.status_code for answer in made] == [201] * 8
    assert len({answer.json()["owner_id"] for answer in made}) == 1


def test_keys_end_by_themselves_and_are_refused_when_past(world: World) -> None:
    soon = int(time.time()) + 4
    key = world.post("/v1/api_keys", json={**NEW_KEY, "expires_at": soon}).json()
    bearer = {"Authorization": f"Bearer {key['secret']}"}
    assert world.client.get("/v1/me", headers=bearer).status_code == 200
    time.sleep(max(0.0, soon + 0.1 - time.time()))
    assert world.client.get("/v1/me", headers=bearer).status_code == 401
    refused = world.post("/v1/api_keys", json={**NEW_KEY, "expires_at": soon})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "expires_at")


@pytest.mark.parametrize(
    "change",
    [{"scopes": []}, {"scopes": ["root"]}, {"owner": ""}, {"requests_per_minute": 0}, {"x": 1}],
)
def test_bad_keys_are_not_made(world: World, change: dict[str, Any]) -> None:
    assert world.post("/v1/api_keys", json={**NEW_KEY, **change}).status_code == 422


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/api_keys"),
        ("POST", "/v1/api_keys"),
        ("DELETE", "/v1/api_keys/key_x"),
        ("GET", "/v1/workers"),
        ("POST", "/v1/workers/wrk_x/drain"),
        ("GET", "/v1/audit"),
        ("PATCH", "/v1/quotas/default"),
        ("GET", "/v1/owners/own_x/quotas"),
        ("PATCH", "/v1/owners/own_x/quotas"),
    ],
)
def test_the_service_is_for_administrators(world: World, method: str, path: str) -> None:
    scopes = tuple(scope for scope in Scope if scope is not Scope.ADMIN)
    bearer = {"Authorization": f"Bearer {world.key('ben', scopes)}"}
    answer = world.client.request(method, path, headers=bearer)
    assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope")


# ----------------------------------------------------------------------- rates


def test_a_key_asks_at_its_rate(world: World) -> None:
    key = world.post("/v1/api_keys", json={**NEW_KEY, "requests_per_minute": 3}).json()
    bearer = {"Authorization": f"Bearer {key['secret']}"}
    answers = [world.client.get("/v1/jobs", headers=bearer) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[0].headers["ratelimit"].startswith('"key";r=2')
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    refused = answers[-1]
    assert refused.json()["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # Errors of the request itself count, too, and other keys are not held back.
    assert world.client.get("/v1/jobs/none", headers=bearer).status_code == 429
    ours = world.get("/v1/jobs/none")
    assert (ours.status_code, ours.headers["x-ratelimit-limit-requests"]) == (404, "6000")
    assert "ratelimit" not in world.client.get("/v1/jobs").headers


# ---------------------------------------------------------------------- quotas


def test_an_owner_has_so_many_jobs_waiting(world: World) -> None:
    dataset = world.dataset()
    assert set_quota(world, "ada", queued_jobs=1).status_code == 200
    job = world.training_job(dataset)
    body = {"model": MODEL, "dataset_id": dataset}
    refused = world.post("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 429
    problem = refused.json()
    assert problem["code"] == problem["error"]["code"] == "quota_exceeded"
    assert problem["quota"]["name"] == "queued_jobs"
    assert (problem["quota"]["limit"], problem["quota"]["used"]) == (1, 1)
    assert "starts or is cancelled" in problem["quota"]["frees"]
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert world.upload().status_code == 429
    assert not list(world.settings.upload_dir.glob("*part*"))
    assert quota_of(world, "queued_jobs") == {
        "name": "queued_jobs", "limit": 1, "used": 1.0, "frees_at": None,
    }  # fmt: skip
    world.post(f"/v1/jobs/{job['id']}/cancel")
    assert world.post("/v1/fine_tuning/jobs", json=body).status_code == 200


def test_who_resumes_a_job_has_it_waiting_again(world: World) -> None:
    dataset = world.dataset()
    set_quota(world, "ada", queued_jobs=1)
    draft = world.training_job(dataset, auto_start=False)["id"]
    job = world.training_job(dataset)["id"]
    for path in (f"/v1/jobs/{draft}/resume", f"/v1/fine_tuning/jobs/{draft}/resume"):
        refused = world.post(path)
        assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
        assert refused.json()["quota"]["name"] == "queued_jobs"
    assert world.post(f"/v1/jobs/{job}/pause").status_code == 202
    assert world.post(f"/v1/jobs/{draft}/resume").status_code == 202
    assert world.post(f"/v1/jobs/{job}/resume").status_code == 429
    # Nothing is asked of one that waits already.
    assert world.post(f"/v1/jobs/{draft}/resume").status_code == 202
    assert quota_of(world, "queued_jobs")["used"] == 1.0


def test_two_requests_at_once_do_not_both_get_the_last_place(world: World) -> None:
    dataset = world.dataset()
    set_quota(world, "ada", queued_jobs=2)
    body = {"model": MODEL, "dataset_id": dataset}
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: world.post("/v1/fine_tuning/jobs", json=body), range(8)))
    assert sorted(answer.status_code for answer in made) == [200] * 2 + [429] * 6


def test_device_time_of_a_month_is_limited_and_counted(world: World) -> None:
    dataset = world.dataset()
    set_quota(world, "ada", gpu_seconds_month=100)
    world.training_job(dataset)
    fence = world.claim(JobKind.TRAINING)
    with world.database.transaction() as session:
        JobRepository(session).add_gpu_seconds(fence, 70.0)
        JobRepository(session).add_gpu_seconds(fence, 50.0)
    refused = world.post("/v1/fine_tuning/jobs", json={"model": MODEL, "dataset_id": dataset})
    quota = refused.json()["quota"]
    assert (quota["name"], quota["limit"], quota["used"]) == ("gpu_seconds_month", 100, 120.0)
    assert 0 < quota["frees_at"] - time.time() <= 31 * 86_400
    assert int(refused.headers["retry-after"]) >= 1
    assert world.upload().status_code == 202  # reading data takes no device
    usage = world.get("/v1/usage").json()
    assert usage["gpu_seconds"] == 120.0
    assert [(row["kind"], row["gpu_seconds"]) for row in usage["data"]] == [("training", 120.0)]
    assert world.client.get("/v1/usage", headers=world.headers("ben")).json()["data"] == []


def test_uploads_and_what_is_stored_are_limited(world: World) -> None:
    one = len(pairs(30))
    set_quota(world, "ada", upload_bytes=one, stored_bytes=2 * one)
    large = world.upload(pairs(60))
    assert (large.status_code, large.json()["quota"]["name"]) == (429, "upload_bytes")
    first = world.dataset()
    world.dataset()
    stored = world.get("/v1/usage").json()["stored"]
    assert (stored["dataset_bytes"], stored["rows"]) == (2 * one, 60)
    full = world.upload()
    assert (full.status_code, full.json()["quota"]["name"]) == (429, "stored_bytes")
    assert full.json()["quota"]["used"] == 2 * one
    world.client.delete(f"/v1/datasets/{first}", headers=world.headers())
    assert world.upload().status_code == 202


def test_parts_of_an_upload_are_stored_as_well(world: World) -> None:
    def begin(size: int) -> Any:
        body = {"filename": "p", "purpose": "fine-tune", "bytes": size, "mime_type": "text/plain"}
        return world.post("/v1/uploads", json=body)

    def add(upload: str, data: bytes) -> Any:
        # In chunks of unknown number: nothing tells the length before it has come.
        body = (
            b'--b\r\nContent-Disposition: form-data; name="data"\r\n\r\n' + data + b"\r\n--b--\r\n"
        )
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        return world.post(f"/v1/uploads/{upload}/parts", content=iter([body]), headers=kind)

    data = pairs(30)
    set_quota(world, "ada", upload_bytes=len(data), stored_bytes=len(data) + 100)
    large = begin(len(data) + 1)
    assert (large.status_code, large.json()["quota"]["name"]) == (429, "upload_bytes")
    first, second = (begin(len(data)).json()["id"] for _ in range(2))
    part = add(first, data)
    assert part.status_code == 200, part.text
    assert world.get("/v1/usage").json()["stored"]["file_bytes"] == len(data)
    full = add(second, data)
    assert (full.status_code, full.json()["quota"]["name"]) == (429, "stored_bytes")
    assert [p for p in (world.settings.part_dir / second).rglob("*") if p.is_file()] == []
    assert begin(len(data)).status_code == 429
    # What the parts become takes their room.
    done = world.post(f"/v1/uploads/{first}/complete", json={"part_ids": [part.json()["id"]]})
    assert done.status_code == 200, done.text
    stored = world.get("/v1/usage").json()["stored"]
    assert (stored["bytes"], stored["dataset_bytes"]) == (len(data), len(data))
    world.validate()
    gone = world.client.delete(f"/v1/files/{done.json()['file']['id']}", headers=world.headers())
    assert gone.status_code == 200
    assert add(second, data).status_code == 200
    world.post(f"/v1/uploads/{second}/cancel")
    assert world.get("/v1/usage").json()["stored"]["bytes"] == 0


def test_a_told_length_is_enough_to_refuse_an_upload(world: World) -> None:
    set_quota(world, "ada", upload_bytes=1000)
    body = b"x" * 200_000
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    refused = world.post("/v1/datasets", content=body, headers=kind)
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")


def test_limits_for_all_yield_to_an_owners_own(world: World) -> None:
    everybody = world.client.patch(
        "/v1/quotas/default", json={"queued_jobs": 0}, headers=world.headers()
    )
    assert everybody.json()["owner"] is None
    assert world.upload().status_code == 429
    set_quota(world, "ada", queued_jobs="unlimited")
    assert quota_of(world, "queued_jobs")["limit"] is None
    assert world.upload().status_code == 202
    assert world.upload(owner="ben").status_code == 429
    set_quota(world, "ada", running_jobs=3)  # says nothing about waiting jobs
    assert world.upload().status_code == 202
    set_quota(world, "ada", queued_jobs=None)
    assert quota_of(world, "queued_jobs")["limit"] == 0


@pytest.mark.parametrize("value", [-1, 1.5, "none", 2**63])
def test_bad_limits_are_refused(world: World, value: object) -> None:
    assert set_quota(world, "ada", queued_jobs=value).status_code == 422


def test_usage_wants_days_in_order(world: World) -> None:
    for days in ({"start": "2026-02-01", "end": "2026-01-01"}, {"start": "2020-01-01"}):
        assert world.get("/v1/usage", params=days).status_code == 422
    for day in ("0", "0.0", "1767225600", "2026-02-01T00:00:00", "20260201"):
        assert world.get("/v1/usage", params={"end": day}).status_code == 422
    one = world.get("/v1/usage", params={"start": "2026-02-01", "end": "2026-02-01"})
    assert one.json()["start"] == one.json()["end"] == "2026-02-01"


# --------------------------------------------------------------------- workers


def test_workers_are_shown_and_drained(world: World) -> None:
    with world.database.transaction() as session:
        for one in ("wrk_test", "wrk_idle"):
            WorkerRepository(session).beat(
                one, host="h", pid=7, version="1", queues=[QueueName.GPU], draining=False
            )
    job = world.training_job(world.dataset())["id"]
    world.claim(JobKind.TRAINING)
    shown = {one["id"]: one for one in world.get("/v1/workers").json()["data"]}
    assert (shown["wrk_test"]["status"], shown["wrk_test"]["job_id"]) == ("busy", job)
    assert (shown["wrk_idle"]["status"], shown["wrk_idle"]["job_id"]) == ("idle", None)
    drained = world.post("/v1/workers/wrk_idle/drain")
    assert (drained.status_code, drained.json()["status"]) == (202, "draining")
    assert world.post("/v1/workers/wrk_none/drain").status_code == 404
    assert "gpu" in world.client.get("/readyz").json()["workers"]["detail"] or (
        world.client.get("/readyz").json()["live_workers"] == 2
    )


def test_a_worker_that_loses_job_after_job_is_shown_in_quarantine(world: World) -> None:
    dataset = world.dataset()
    jobs = [world.training_job(dataset)["id"] for _ in range(3)]
    with world.database.transaction() as session:
        WorkerRepository(session).beat(
            "wrk_test", host="h", pid=7, version="1", queues=[QueueName.GPU], draining=False
        )
    for _ in jobs:
        fence = world.claim(JobKind.TRAINING)
        with world.database.transaction() as session:
            JobRepository(session).lose(
                fence, message="killed", log_tail=[], max_losses=9, backoff_s=600.0
            )
            # The first loss has no pause; the next claim is to take another job.
            JobRepository(session).request_cancel(owner_id(world, "ada"), fence.job_id)
    shown = world.get("/v1/workers").json()["data"][0]
    assert shown["status"] == "quarantined"
    assert set(shown["quarantine"]["job_ids"]) == set(jobs)
    assert 500 < shown["quarantine"]["until"] - time.time() <= 600
    world.training_job(dataset)
    with world.database.transaction() as session:
        claim = JobRepository(session).claim(QueueName.GPU, worker_id="wrk_test", lease_s=LEASE_S)
    assert claim is None


# ----------------------------------------------------------------------- audit


def audit(world: World, **wanted: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = world.get("/v1/audit", params=wanted).json()["data"]
    return rows


def test_every_write_is_in_the_audit_log(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    world.post(f"/v1/jobs/{job}/cancel")
    world.post(f"/v1/jobs/{job}/resume")
    world.get(f"/v1/jobs/{job}")
    seen = [(row["operation"], row["object_id"], row["outcome"]) for row in audit(world)]
    assert seen == [
        ("resume_job", job, "refused"),
        ("cancel_job", job, "done"),
        ("create_fine_tuning_job", job, "done"),
        ("create_dataset", dataset, "done"),
    ]
    row = audit(world)[1]
    me = world.get("/v1/me").json()
    assert row["owner_id"] == me["owner"]["id"]
    assert row["key_id"] == me["key"]["id"]
    assert (row["method"], row["path"], row["status"]) == ("POST", f"/v1/jobs/{job}/cancel", 202)
    assert row["address"] == "testclient"
    assert row["request_id"].startswith("req_")
    assert abs(row["created_at"] - time.time()) < 60


def test_audit_log_is_filtered_and_paged(world: World) -> None:
    for owner in ("ada", "ben", "ada"):
        world.upload(owner=owner)
    mine = owner_id(world, "ada")
    assert len(audit(world, owner_id=mine)) == 2
    assert len(audit(world, operation="create_dataset", limit=2)) == 2
    assert audit(world, operation="delete_dataset") == []
    one = audit(world)[-1]
    assert audit(world, object_id=one["object_id"]) == [one]
    assert audit(world, until=one["created_at"]) == []
    assert len(audit(world, since=one["created_at"])) == 3
    assert len(audit(world, after=one["id"], order="asc")) == 2


def test_who_is_unknown_or_asks_too_often_has_no_entry(world: World) -> None:
    world.client.post("/v1/datasets")
    key = world.post("/v1/api_keys", json={**NEW_KEY, "requests_per_minute": 1}).json()
    bearer = {"Authorization": f"Bearer {key['secret']}"}
    assert world.client.post("/v1/datasets", headers=bearer).status_code == 403
    assert world.client.post("/v1/datasets", headers=bearer).status_code == 429
    rows = audit(world)
    assert [(row["operation"], row["status"]) for row in rows] == [
        ("create_dataset", 403), ("create_api_key", 201),
    ]  # fmt: skip
    assert rows[1]["object_id"] == key["id"]
    assert key["secret"] not in str(rows)


def test_old_entries_are_forgotten(world: World) -> None:
    world.upload()
    with world.database.transaction() as session:
        AuditRepository(session).sweep(older_than_s=3600.0)
    assert len(audit(world)) == 1
    with world.database.transaction() as session:
        AuditRepository(session).sweep(older_than_s=-1.0)
    assert audit(world) == []


@pytest.mark.parametrize(
    "path", ["/v1/files/%00", "/v1/files/" + "x" * 3000, "/v1/files/%ED%A0%80"]
)
def test_odd_paths_are_noted_and_refused(world: World, path: str) -> None:
    answer = world.client.delete(path, headers=world.headers())
    assert answer.status_code in (404, 422), answer.text
    entry = world.get("/v1/audit").json()["data"][0]
    assert (entry["operation"], entry["status"]) == ("delete_file", answer.status_code)
