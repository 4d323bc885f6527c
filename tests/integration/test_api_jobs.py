"""Recommendations, fine-tuning jobs, events, metrics and studies over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import StorageFull, Unavailable
from core.lifecycle import JobKind, JobStatus, Phase
from core.methods import KernelDpoMethod
from core.modelref import ModelRef
from models.job import Job
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.searches import SearchRepository
from tests.integration.api_world import (
    MODEL,
    MODEL_DIR,
    World,
    recommendation,
    running_api,
    training_result,
)
from tests.integration.object_world import running_search
from tests.integration.test_api import check_problem


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def recommend(world: World) -> None:
    fence = world.claim(JobKind.RECOMMENDATION)
    with world.database.transaction() as session:
        job = session.get_one(Job, fence.job_id)
        ExperimentRepository(session).save_recommendation(
            fence,
            owner_id=job.owner_id,
            dataset_id=str(job.dataset_id),
            model=str(job.model),
            result=recommendation().model_dump(mode="json"),
        )
    world.finish(fence, result={"summary": "rbf"})


# ---------------------------------------------------------- recommendations


def test_recommendation_from_queue_to_answer(world: World) -> None:
    dataset = world.dataset()
    body = {"model": MODEL, "dataset_id": dataset, "seed": 7, "metadata": {"team": "a"}}
    answer = world.post("/v1/recommendations", json=body)
    assert answer.status_code == 202
    queued = answer.json()
    url = answer.headers["location"]
    assert url == f"/v1/recommendations/{queued['id']}"
    assert queued["id"].startswith("rec_")
    assert queued["status"] == "queued"
    assert queued["recommendation"] is None
    assert queued["queue"]["position"] == 1
    assert queued["metadata"] == {"team": "a"}
    etag = world.get(url).headers["etag"]
    assert world.get(url, headers={"If-None-Match": etag}).status_code == 304
    recommend(world)
    done = world.get(url, headers={"If-None-Match": etag})
    assert done.status_code == 200
    view = done.json()
    assert view["status"] == "succeeded"
    assert view["provisional"] is False
    assert view["recommendation"]["kernel"] == "rbf"
    assert view["recommendation"]["runner_up"]["kernel"] == "polynomial"
    assert [pair["rank"] for pair in view["ranking"]] == [1, 2]
    assert view["evidence"]["pairs"] == 30
    assert [r["id"] for r in world.get("/v1/recommendations").json()["data"]] == [view["id"]]


def test_recommendation_with_wait(world: World) -> None:
    dataset = world.dataset()
    worker = world.soon(lambda: recommend(world), JobKind.RECOMMENDATION)
    answer = world.post(
        "/v1/recommendations",
        json={"model": MODEL, "dataset_id": dataset},
        headers={"Prefer": "wait=20"},
    )
    worker.join()
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=20"
    assert answer.json()["recommendation"]["confidence"] == 0.8


def test_recommendation_is_provisional_while_its_job_runs(world: World) -> None:
    dataset = world.dataset()
    made = world.post("/v1/recommendations", json={"model": MODEL, "dataset_id": dataset}).json()
    fence = world.claim(JobKind.RECOMMENDATION)
    with world.database.transaction() as session:
        job = session.get_one(Job, fence.job_id)
        ExperimentRepository(session).save_recommendation(
            fence, owner_id=job.owner_id, dataset_id=dataset, model=MODEL,
            result=recommendation().model_dump(mode="json"),
        )  # fmt: skip
    assert world.get(f"/v1/recommendations/{made['id']}").json()["provisional"] is True
    error = {"code": "out_of_memory", "message": "no room", "retryable": False, "attempt": 1}
    world.finish(fence, JobStatus.FAILED, error=error)
    failed = world.get(f"/v1/recommendations/{made['id']}").json()
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "out_of_memory"


# --------------------------------------------------------------- fine-tuning


def test_job_object_has_all_members(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset, seed=7, suffix="v1", metadata={"a": "b"})
    assert job["id"].startswith("ftjob-")
    expected = {
        "id", "object", "kind", "status", "phase", "attempt", "attention", "created_at",
        "queued_at", "started_at", "finished_at", "estimated_finish", "heartbeat_at", "version",
        "progress", "queue", "steps", "model", "training_file", "dataset_id", "validation_file",
        "seed", "method", "resumable", "resume_blocked_reason", "cancel_requested",
        "parent_job_id", "estimate", "usage", "fine_tuned_model", "result_files", "metadata",
        "hyperparameters", "error",
    }  # fmt: skip
    assert expected <= set(job)
    assert job["object"] == "fine_tuning.job"
    assert job["kind"] == "training"
    assert job["status"] == "queued"
    assert job["method"]["type"] == "auto"
    assert job["method"]["auto"]["search"]["max_trials"] is None
    assert job["suffix"] == "v1"
    assert job["queue"] == {"position": 1, "ahead": 0, "estimated_start": None}
    assert job["result"] is None
    second = world.training_job(dataset)
    assert second["queue"]["ahead"] == 1


def test_worker_gets_pinned_models(world: World) -> None:
    dataset = world.dataset()
    method = {
        "type": "kernel_dpo",
        "kernel_dpo": {"kernel": "rbf", "embedding": "encoder", "encoder": MODEL},
    }
    job = world.training_job(dataset, method=method)
    with world.database.reading() as session:
        row = session.get_one(Job, job["id"])
    assert set(row.spec) == {"model", "method", "encoder"}
    for name in ("model", "encoder"):
        ref = ModelRef.model_validate(row.spec[name])
        assert ref.path == MODEL_DIR / MODEL
        assert ref.source == "local"
    assert KernelDpoMethod.model_validate(row.spec["method"]).kernel_dpo.encoder == MODEL
    assert row.model == MODEL


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/recommendations"])
def test_models_that_cannot_be_used(world: World, path: str) -> None:
    dataset = world.dataset()
    for model, code in (
        ("nothing", "model_not_found"),
        ("../models/tiny-lm", "model_not_found"),
        ("/etc", "model_not_found"),
        ("org/name", "model_unreachable"),
    ):
        answer = world.post(path, json={"model": model, "dataset_id": dataset})
        problem = check_problem(answer, 422, code)
        assert problem["error"]["param"] == "model"
        assert problem["hint"]
    assert world.get("/v1/jobs?status=queued").json()["data"] == []


def test_encoder_is_checked_too(world: World) -> None:
    dataset = world.dataset()
    method = {
        "type": "kernel_dpo",
        "kernel_dpo": {"kernel": "rbf", "embedding": "encoder", "encoder": "nothing"},
    }
    answer = world.post(
        "/v1/fine_tuning/jobs", json={"model": MODEL, "dataset_id": dataset, "method": method}
    )
    check_problem(answer, 422, "model_not_found")


def test_finished_job_has_its_evidence(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    made = world.train(job)
    view = world.get(f"/v1/fine_tuning/jobs/{job}").json()
    assert view["status"] == "succeeded"
    assert view["fine_tuned_model"] == made["checkpoint"]
    assert view["study_id"] == made["study"]
    assert view["recommendation_id"] == made["recommendation"]
    assert view["usage"]["gpu_seconds"] == 4.0
    expected = training_result(made["checkpoint"]).model_dump(mode="json")
    assert view["result"] == expected
    steps = {step["name"]: step for step in view["steps"]}
    assert list(steps) == ["recommend", "search", "train"]
    assert steps["search"]["status"] == "succeeded"
    assert steps["search"]["study_id"] == made["study"]
    found = world.get(f"/v1/recommendations/{made['recommendation']}").json()
    assert found["status"] == "succeeded"
    assert found["job_id"] == job
    assert found["recommendation"]["kernel"] == "rbf"
    same = world.get(f"/v1/jobs/{job}").json()
    assert same["object"] == "job"
    assert same["result"] == expected
    checkpoints = world.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"]
    assert [c["id"] for c in checkpoints] == [made["checkpoint"]]
    assert checkpoints[0]["object"] == "fine_tuning.job.checkpoint"
    assert checkpoints[0]["fine_tuning_job_id"] == job


def test_running_job_shows_progress(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    url = f"/v1/fine_tuning/jobs/{job}"
    etag = world.get(url).headers["etag"]
    fence = world.claim(JobKind.TRAINING)
    progress = {
        "fraction": 0.5, "unit": "step", "done": 5, "total": 10, "rate": 1.0, "eta_seconds": 5.0,
        "eta_low": 4.5, "eta_high": 6.0, "basis": "measured",
    }  # fmt: skip
    with world.database.transaction() as session:
        JobRepository(session).set_phase(fence, Phase.TRAINING)
        JobRepository(session).set_progress(fence, progress)
    answer = world.get(url, headers={"If-None-Match": etag})
    assert answer.status_code == 200
    view = answer.json()
    assert view["progress"] == progress
    assert view["phase"] == "training"
    assert view["attempt"] == 1
    assert view["estimated_finish"] >= view["started_at"]
    assert view["queue"]["position"] is None


@pytest.mark.parametrize("pair", [{}, {"kernel": "rbf"}], ids=["dpo", "kernel_dpo"])
def test_a_job_may_train_all_weights(world: World, pair: dict[str, str]) -> None:
    kind = "kernel_dpo" if pair else "dpo"
    dataset = world.dataset()

    def method(**params: object) -> dict[str, Any]:
        return {"type": kind, kind: {**pair, "hyperparameters": {"adaptation": "full", **params}}}

    job = world.training_job(dataset, method=method())
    assert job["method"][kind]["hyperparameters"]["adaptation"] == "full"
    assert world.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["method"] == job["method"]
    body = {"model": "tiny-lm", "dataset_id": dataset, "method": method(lora_r=4)}
    refused = world.post("/v1/fine_tuning/jobs", json=body)
    assert "lora_r describe an adapter" in check_problem(refused, 422, "invalid_input")["detail"]


def test_a_client_that_knows_only_dpo_asks_for_a_selection(world: World) -> None:
    dataset = world.dataset()
    body = {"model": "tiny-lm", "dataset_id": dataset, "selection": "auto"}
    auto = {"type": "auto", "auto": {"search": {"max_trials": 9}}}
    for method, trials in ({"type": "dpo"}, None), ({"type": "dpo", "dpo": {}}, None), (auto, 9):
        job = world.post("/v1/fine_tuning/jobs", json={**body, "method": method}).json()
        assert job["method"]["type"] == "auto"
        assert job["method"]["auto"]["search"]["max_trials"] == trials
    for method in (
        {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
        {"type": "kernel_dpo", "kernel_dpo": {"kernel": "rbf"}},
    ):
        refused = world.post("/v1/fine_tuning/jobs", json={**body, "method": method})
        assert "nothing is left to select" in check_problem(refused, 422, "invalid_input")["detail"]


def test_the_estimate_is_what_the_search_has_promised_last(world: World) -> None:
    study_id = running_search(world, world.dataset())
    job = f"/v1/fine_tuning/jobs/{world.get(f'/v1/studies/{study_id}').json()['job_id']}"
    assert world.get(job).json()["estimate"] is None
    for at, p50, p90 in (("start", 310.5, 340.0), ("screened", 290.0, 300.25)):
        with world.database.transaction() as session:
            searches = SearchRepository(session)
            quote = {"at": at, "p50": p50, "p90": p90, "spent": 1.0}
            searches.quote(searches.lock(study_id), quote, "It will take a while.")
        assert world.get(job).json()["estimate"] == {
            "at": at, "gpu_seconds": p50, "gpu_seconds_p90": p90
        }  # fmt: skip


# ------------------------------------------------------------ cancel, events


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/fine_tuning/jobs"])
def test_cancel(world: World, path: str) -> None:
    dataset = world.dataset()
    first, second = world.training_job(dataset)["id"], world.training_job(dataset)["id"]
    world.claim(JobKind.TRAINING)
    running = world.post(f"{path}/{first}/cancel")
    assert running.status_code in (200, 202)
    assert running.json()["status"] == "running"
    assert running.json()["cancel_requested"] is True
    queued = world.post(f"{path}/{second}/cancel")
    assert queued.json()["status"] == "cancelled"
    again = world.post(f"{path}/{second}/cancel")
    assert again.status_code == queued.status_code
    assert again.json()["status"] == "cancelled"


def test_cancel_after_the_end_is_a_conflict(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    world.train(job)
    answer = world.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    check_problem(answer, 409, "job_not_cancellable")
    assert answer.headers["x-should-retry"] == "false"


def pause(world: World, kind: JobKind = JobKind.TRAINING) -> str:
    fence = world.claim(kind)
    error = {
        "code": "disk_full", "message": "the disk is full: 10 bytes are free", "retryable": True,
        "hint": "Free disk space, then resume the job", "phase": "training", "attempt": 1,
    }  # fmt: skip
    with world.database.transaction() as session:
        JobRepository(session).pause(fence, error, data={"free_bytes": 10, "folder": "/data"})
    return fence.job_id


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/fine_tuning/jobs"])
def test_a_paused_job_says_why_and_is_resumed(world: World, path: str) -> None:
    job = world.training_job(world.dataset())["id"]
    assert pause(world) == job
    url = f"{path}/{job}"
    paused = world.get(url).json()
    assert (paused["status"], paused["attention"]) == ("paused", ["low_disk"])
    assert paused["error"]["code"] == "disk_full"
    assert paused["error"]["message"] == "the disk is full: 10 bytes are free"
    assert paused["finished_at"] is None
    assert paused.get("resumable", True) is True
    event = world.get(f"{url}/events?limit=1").json()["data"][0]
    assert event["data"] == {
        "status": "paused", "code": "disk_full", "free_bytes": 10, "folder": "/data"
    }  # fmt: skip
    assert [j["id"] for j in world.get(f"{path}?status=paused").json()["data"]] == [job]
    body = check_problem(world.post(f"{url}/resume", json={"now": 1}), 422, "invalid_input")
    assert body["errors"][0]["pointer"] == "/now"
    resumed = world.post(f"{url}/resume")
    assert resumed.status_code in (200, 202)
    view = resumed.json()
    assert (view["status"], view["error"], view["attention"]) == ("queued", None, [])
    assert world.post(f"{url}/resume", json={}).json()["status"] == "queued"
    world.claim(JobKind.TRAINING)
    assert world.post(f"{url}/resume").json()["status"] == "running"


def test_a_paused_job_can_be_cancelled_and_then_not_resumed(world: World) -> None:
    job = world.training_job(world.dataset())["id"]
    pause(world)
    assert world.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"
    for path in ("/v1/jobs", "/v1/fine_tuning/jobs"):
        answer = world.post(f"{path}/{job}/resume")
        check_problem(answer, 409, "job_not_resumable")
        assert answer.headers["x-should-retry"] == "false"
    check_problem(world.post("/v1/jobs/ftjob-none/resume"), 404, "not_found")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/fine_tuning/jobs"])
def test_events_from_any_cursor_in_both_orders(world: World, path: str) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    world.train(job)
    url = f"{path}/{job}/events"
    events: list[dict[str, Any]] = world.get(f"{url}?order=asc&limit=100").json()["data"]
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert events[0]["type"] == "job.status"
    assert events[0]["object"] == "fine_tuning.job.event"
    assert events[-1]["type"] == "done"
    by_seq = world.get(f"{url}?order=asc&after=3&limit=2").json()
    assert [e["seq"] for e in by_seq["data"]] == [4, 5]
    assert by_seq["has_more"] is True
    by_id = world.get(f"{url}?order=asc&after={events[2]['id']}&limit=2").json()
    assert by_id == by_seq
    newest = world.get(f"{url}?limit=2").json()["data"]
    assert [e["seq"] for e in newest] == [len(events), len(events) - 1]
    older = world.get(f"{url}?after={newest[-1]['id']}&limit=1").json()["data"]
    assert older[0]["seq"] == len(events) - 2
    check_problem(world.get(f"{url}?after=x"), 422, "invalid_input")
    check_problem(world.get(f"{url}?after=evt_unknown"), 404, "not_found")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/fine_tuning/jobs"])
def test_cancel_takes_no_options(world: World, path: str) -> None:
    job = world.training_job(world.dataset())["id"]
    url = f"{path}/{job}/cancel"
    body = check_problem(world.post(url, json={"force": True}), 422, "invalid_input")
    assert body["errors"][0]["pointer"] == "/force"
    assert world.get(f"{path}/{job}").json()["status"] == "queued"
    assert world.post(url, json={}).json()["status"] == "cancelled"
    assert world.post(url).json()["status"] == "cancelled"


def test_etag_of_a_job_changes_with_its_heartbeat(world: World) -> None:
    job = world.training_job(world.dataset())["id"]
    fence = world.claim(JobKind.TRAINING)
    with world.database.transaction() as session:
        session.get_one(Job, job).heartbeat_at = 1.0
    for path in ("/v1/jobs", "/v1/fine_tuning/jobs"):
        etag = world.get(f"{path}/{job}").headers["etag"]
        with world.database.transaction() as session:
            JobRepository(session).heartbeat(fence, lease_s=60.0)
        fresh = world.get(f"{path}/{job}", headers={"If-None-Match": etag})
        assert fresh.status_code == 200
        assert fresh.json()["heartbeat_at"] > 1
        with world.database.transaction() as session:
            session.get_one(Job, job).heartbeat_at = 1.0


@pytest.mark.parametrize("query", ["limit=2", "order=asc&limit=2", "order=asc&limit=2&before=zzz"])
def test_link_leads_through_all_pages(world: World, query: str) -> None:
    job = world.training_job(world.dataset())["id"]
    for _ in range(4):
        world.dataset()
    lists = [f"/v1/datasets?{query}"]
    if "before" not in query:
        world.train(job)
        lists.append(f"/v1/jobs/{job}/events?{query}")
    for first in lists:
        url: str | None = first
        seen: list[str] = []
        while url is not None:
            answer = world.get(url)
            page = answer.json()
            seen += [item["id"] for item in page["data"]]
            url = answer.links.get("next", {}).get("url")
            assert (url is not None) is page["has_more"]
        assert len(seen) == len(set(seen)) >= 5


@pytest.mark.parametrize("error", [StorageFull("full"), Unavailable("away")])
def test_committed_request_succeeds_though_its_wake_up_cannot_be_sent(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    dataset = world.dataset()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("app.queue.relay_once", fail)
    assert world.training_job(dataset)["status"] == "queued"


def test_metrics(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    world.train(job)
    for path in ("/v1/jobs", "/v1/fine_tuning/jobs"):
        series = world.get(f"{path}/{job}/metrics?scope=train").json()
        assert [(p["step"], p["values"]["loss"]) for p in series["data"]] == [(1, 0.7), (2, 0.35)]
        assert world.get(f"{path}/{job}/metrics?scope=baseline").json()["data"] == []


def test_kinds_do_not_mix(world: World) -> None:
    dataset = world.dataset()
    validation = world.get(f"/v1/datasets/{dataset}").json()["job_id"]
    assert world.get(f"/v1/jobs/{validation}").json()["kind"] == "dataset"
    for tail in ("", "/events", "/checkpoints", "/metrics"):
        check_problem(world.get(f"/v1/fine_tuning/jobs/{validation}{tail}"), 404, "not_found")
    check_problem(world.post(f"/v1/fine_tuning/jobs/{validation}/cancel"), 404, "not_found")
    check_problem(world.post(f"/v1/fine_tuning/jobs/{validation}/resume"), 404, "not_found")
    check_problem(world.get(f"/v1/recommendations/{validation}"), 404, "not_found")


# ------------------------------------------------------------------- studies


def test_study_and_trials(world: World) -> None:
    dataset = world.dataset()
    made = world.train(world.training_job(dataset)["id"])
    study = world.get(f"/v1/studies/{made['study']}").json()
    assert study["object"] == "study"
    assert study["trials"]["complete"] == 2
    assert study["best_trial"]["number"] == 1
    assert study["gpu_seconds"] == 4.0
    url = f"/v1/studies/{made['study']}/trials"
    numbers = [t["number"] for t in world.get(f"{url}?order=asc").json()["data"]]
    assert numbers == [0, 1]
    page = world.get(f"{url}?order=asc&limit=1").json()
    assert page["has_more"] is True
    rest = world.get(f"{url}?order=asc&limit=1&after={page['last_id']}").json()
    assert [t["number"] for t in rest["data"]] == [1]
