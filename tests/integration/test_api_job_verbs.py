"""Pause, resume, retry, drafts, dry runs, `If-Match`, filters, logs and metric series of jobs."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.lifecycle import AttemptOutcome, JobKind, JobStatus
from core.queue import QueueName
from models.job import Job
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import Fence, JobRepository
from tests.integration.api_world import MODEL, World, running_api
from tests.integration.test_api import check_problem

PATHS = ["/v1/jobs", "/v1/fine_tuning/jobs"]


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def beat(world: World, fence: Fence) -> Any:
    with world.database.transaction() as session:
        return JobRepository(session).heartbeat(fence, lease_s=60.0)


def give_back(world: World, fence: Fence) -> JobStatus:
    """Do what a supervisor does after the process has saved and left."""
    with world.database.transaction() as session:
        return JobRepository(session).requeue(
            fence, AttemptOutcome.PREEMPTED, delay_s=0.0, message="made room"
        )


def fail(world: World, fence: Fence) -> None:
    error = {"code": "out_of_memory", "message": "no room", "retryable": False, "attempt": 1}
    world.finish(fence, JobStatus.FAILED, error=error)


# ------------------------------------------------------------- pause, resume


@pytest.mark.parametrize("path", PATHS)
def test_a_queued_job_is_paused_at_once(world: World, path: str) -> None:
    job = world.training_job(world.dataset())["id"]
    paused = world.post(f"{path}/{job}/pause").json()
    assert (paused["status"], paused["pause_requested"], paused["error"]) == ("paused", False, None)
    assert world.post(f"{path}/{job}/pause", json={}).json()["status"] == "paused"
    with world.database.transaction() as session:
        jobs = JobRepository(session)
        assert jobs.claim(QueueName.GPU, worker_id="wrk_a", lease_s=60.0) is None
    assert world.post(f"{path}/{job}/resume").json()["status"] == "queued"
    assert world.claim(JobKind.TRAINING).job_id == job


@pytest.mark.parametrize("path", PATHS)
def test_a_running_job_is_paused_when_it_has_saved(world: World, path: str) -> None:
    job = world.training_job(world.dataset())["id"]
    fence = world.claim(JobKind.TRAINING)
    assert not beat(world, fence).pause_requested
    asked = world.post(f"{path}/{job}/pause").json()
    assert (asked["status"], asked["pause_requested"]) == ("running", True)
    assert beat(world, fence).pause_requested
    assert give_back(world, fence) is JobStatus.PAUSED
    view = world.get(f"{path}/{job}").json()
    assert (view["status"], view["pause_requested"], view["phase"]) == ("paused", False, None)
    event = world.get(f"{path}/{job}/events?limit=1").json()["data"][0]
    assert event["data"] == {"status": "paused"}
    world.post(f"{path}/{job}/resume")
    again = world.claim(JobKind.TRAINING)
    assert again == Fence(job, 2)
    assert not beat(world, again).pause_requested


def test_a_pause_is_taken_back(world: World) -> None:
    job = world.training_job(world.dataset())["id"]
    fence = world.claim(JobKind.TRAINING)
    world.post(f"/v1/jobs/{job}/pause")
    assert world.post(f"/v1/jobs/{job}/resume").json()["pause_requested"] is False
    assert give_back(world, fence) is JobStatus.QUEUED


def test_a_cancel_wins_over_a_pause(world: World) -> None:
    job = world.training_job(world.dataset())["id"]
    fence = world.claim(JobKind.TRAINING)
    world.post(f"/v1/jobs/{job}/pause")
    world.post(f"/v1/jobs/{job}/cancel")
    check_problem(world.post(f"/v1/jobs/{job}/pause"), 409, "job_not_pausable")
    assert give_back(world, fence) is JobStatus.CANCELLED
    check_problem(world.post(f"/v1/jobs/{job}/pause"), 409, "job_not_pausable")


# -------------------------------------------------------------------- cancel


@pytest.mark.parametrize("path", PATHS)
def test_a_forced_cancel_reaches_the_worker(world: World, path: str) -> None:
    job = world.training_job(world.dataset())["id"]
    fence = world.claim(JobKind.TRAINING)
    world.post(f"{path}/{job}/cancel")
    found = beat(world, fence)
    assert (found.cancel_requested, found.cancel_forced) == (True, False)
    world.post(f"{path}/{job}/cancel", json={"mode": "force"})
    assert beat(world, fence).cancel_forced
    check_problem(world.post(f"{path}/{job}/cancel", json={"mode": "x"}), 422, "invalid_input")


@pytest.mark.parametrize("keep", [True, False])
def test_a_cancel_keeps_checkpoints_unless_told_otherwise(world: World, keep: bool) -> None:
    job = world.training_job(world.dataset())["id"]
    fence = world.claim(JobKind.TRAINING)
    checkpoint = world.publish(fence, {"config.json": b"{}"})
    world.post(f"/v1/jobs/{job}/cancel", json={"keep_checkpoints": keep})
    assert give_back(world, fence) is JobStatus.CANCELLED
    assert world.get(f"/v1/checkpoints/{checkpoint}").status_code == (200 if keep else 404)


# --------------------------------------------------------------------- retry


def test_a_failed_job_is_done_again_by_a_new_one(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset, seed=5, suffix="v1", metadata={"team": "a"})
    url = f"/v1/jobs/{job['id']}"
    check_problem(world.post(f"{url}/retry"), 409, "job_not_retryable")
    fail(world, world.claim(JobKind.TRAINING))
    ended = world.get(url).json()
    answer = world.post(f"{url}/retry")
    assert answer.status_code == 202
    new = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{new['id']}"
    assert (new["status"], new["retry_of"], new["attempt"]) == ("queued", job["id"], 0)
    view = world.get(f"/v1/fine_tuning/jobs/{new['id']}").json()
    for name in ("model", "dataset_id", "seed", "suffix", "metadata", "method"):
        assert view[name] == job[name]
    assert world.get(url).json() == ended
    assert world.claim(JobKind.TRAINING).job_id == new["id"]


def test_a_validation_is_not_retried(world: World) -> None:
    dataset = world.upload().json()
    fail(world, world.claim(JobKind.DATASET))
    check_problem(world.post(f"/v1/jobs/{dataset['job_id']}/retry"), 409, "job_not_retryable")
    check_problem(world.post("/v1/jobs/job_none/retry"), 404, "not_found")


# ------------------------------------------------------------ drafts, dry run


def test_a_draft_waits_until_it_is_resumed(world: World) -> None:
    job = world.training_job(world.dataset(), auto_start=False)
    assert (job["status"], job["draft"], job["queued_at"]) == ("queued", True, None)
    assert world.get(f"/v1/jobs/{job['id']}").json()["status"] == "draft"
    drafts = world.get("/v1/jobs?status=draft").json()["data"]
    assert [one["id"] for one in drafts] == [job["id"]]
    with pytest.raises(AssertionError, match="no training job is queued"):
        world.claim(JobKind.TRAINING)
    begun = world.post(f"/v1/fine_tuning/jobs/{job['id']}/resume").json()
    assert (begun["status"], begun["draft"]) == ("queued", False)
    assert begun["queued_at"] is not None
    assert world.claim(JobKind.TRAINING).job_id == job["id"]


def test_a_draft_can_be_cancelled(world: World) -> None:
    job = world.training_job(world.dataset(), auto_start=False)["id"]
    assert world.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"


def test_a_dry_run_checks_everything_and_makes_nothing(world: World) -> None:
    url = "/v1/fine_tuning/jobs?dry_run=true"
    dataset = world.dataset()
    shown = world.post(url, json={"model": MODEL, "dataset_id": dataset}).json()
    assert shown["dry_run"] is True
    assert shown["queue"]["position"] == 1
    assert shown["method"]["type"] == "auto"
    check_problem(world.get(f"/v1/jobs/{shown['id']}"), 404, "not_found")
    assert world.get("/v1/fine_tuning/jobs").json()["data"] == []
    refused = world.post(url, json={"model": "nothing", "dataset_id": dataset})
    check_problem(refused, 422, "model_not_found")


# ------------------------------------------------------------------ If-Match


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
@pytest.mark.parametrize("path", PATHS)
def test_if_match_guards_every_verb(world: World, path: str, verb: str) -> None:
    job = world.training_job(world.dataset())["id"]
    url = f"{path}/{job}"
    before = world.get(url)
    for stale in ('W/"99"', '"99.1"', "nonsense", 'W/"98", "97"'):
        answer = world.post(f"{url}/{verb}", headers={"If-Match": stale})
        check_problem(answer, 412, "precondition_failed")
    assert world.get(url).json() == before.json()
    for fresh in (f'W/"7", {before.headers["etag"]}', "*"):
        assert world.post(f"{url}/{verb}", headers={"If-Match": fresh}).status_code in (200, 202)


# ------------------------------------------------------------------- filters


def test_filters(database_url: str, tmp_path: Path) -> None:
    with running_api(database_url, tmp_path) as world:
        dataset = world.dataset()
        labels = [{"team": "a", "run": "1"}, {"team": "a b&c", "run": "1"}, {}]
        ids = [world.training_job(dataset, metadata=one)["id"] for one in labels]
        with world.database.transaction() as session:
            session.get_one(Job, ids[0]).created_at = 1000.0
            session.get_one(Job, ids[1]).parent_id = ids[0]

        def found(path: str, **query: str) -> list[str]:
            listed = world.get(path, params=query).json()["data"]
            return sorted(one["id"] for one in listed if one["kind"] == "training")

        for path in PATHS:
            assert found(path) == ids
            assert found(path, **{"metadata[run]": "1"}) == ids[:2]
            assert found(path, **{"metadata[run]": "1", "metadata[team]": "a b&c"}) == [ids[1]]
            assert found(path, **{"metadata[none]": "1"}) == []
            assert found(path, created_before="1001") == [ids[0]]
            assert found(path, created_after="1000") == ids[1:]
            check_problem(world.get(f"{path}?metadata[a]b=1"), 422, "unknown_parameter")
            check_problem(world.get(f"{path}?metadata[a]=%00"), 422, "invalid_input")
            check_problem(world.get(f"{path}?metadata[a]=1&metadata[a]=2"), 422, "invalid_input")
        assert found("/v1/jobs", parent=ids[0]) == [ids[1]]
        assert found("/v1/jobs", parent=ids[0], kind="dataset") == []
        check_problem(world.get("/v1/datasets?metadata[a]=1"), 422, "unknown_parameter")
        body = {"model": MODEL, "dataset_id": dataset, "metadata": {"team": "r"}}
        asked = world.post("/v1/recommendations", json=body).json()["id"]
        for value, expected in (("r", [asked]), ("x", [])):
            listed = world.get("/v1/recommendations", params={"metadata[team]": value}).json()
            assert [one["id"] for one in listed["data"]] == expected
        first = world.get("/v1/jobs?metadata[run]=1&limit=1")
        rest = world.get(first.links["next"]["url"])
        assert [one["id"] for one in (first.json()["data"] + rest.json()["data"])] == [
            ids[1], ids[0]
        ]  # fmt: skip


# ---------------------------------------------------------------------- logs

SECRET = "hf_abcdefghijklmnop"  # gitleaks:allow
LINES = [f"line {number} {'x' * (number % 7)}" for number in range(200)]


def write_log(world: World, fence: Fence, text: str) -> None:
    folder = world.settings.artifact_dir / "jobs" / fence.job_id / f"a{fence.attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        log.write(text)


@pytest.fixture
def logged(world: World) -> tuple[World, Fence, str]:
    world.training_job(world.dataset())
    fence = world.claim(JobKind.TRAINING)
    LINES[150] = f"token {SECRET} end"
    text = "".join(f"{line}\n" for line in LINES)
    write_log(world, fence, text)
    return world, fence, text.replace(SECRET, "hf_" + "*" * 16)


def test_a_log_as_text_and_its_ranges(logged: tuple[World, Fence, str]) -> None:
    world, fence, text = logged
    url = f"/v1/jobs/{fence.job_id}/logs"
    whole = world.get(url)
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert whole.text == text
    assert world.get(f"{url}?tail=3").text == "".join(f"{line}\n" for line in LINES[-3:])
    assert world.get(f"{url}?tail=1000").text == text
    assert world.get(f"{url}?after=1000").text == text[1000:]
    inside = text.index("hf_") + 5
    for start, stop in ((0, 10), (inside, inside + 3), (inside - 9, len(text))):
        part = world.get(url, headers={"Range": f"bytes={start}-{stop - 1}"})
        assert (part.status_code, part.text) == (206, text[start:stop])
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(text)}"
    nothing_new = world.get(url, headers={"Range": f"bytes={len(text)}-"})
    check_problem(nothing_new, 416, "range_not_satisfiable")
    check_problem(world.get(f"{url}?tail=1&after=1"), 422, "invalid_input")


def test_a_log_as_json_lines_goes_on_from_its_offsets(logged: tuple[World, Fence, str]) -> None:
    world, fence, text = logged
    url = f"/v1/jobs/{fence.job_id}/logs?format=jsonl"
    write_log(world, fence, "half a li")
    entries = [json.loads(line) for line in world.get(url).text.splitlines()]
    assert [entry["line"] for entry in entries] == text.splitlines()
    assert entries[-1]["offset"] == len(text)
    assert {entry["attempt"] for entry in entries} == {1}
    write_log(world, fence, "ne\n")
    new = world.get(f"{url}&after={entries[-1]['offset']}").text.splitlines()
    assert [json.loads(line)["line"] for line in new] == ["half a line"]


def test_logs_of_attempts(world: World) -> None:
    job = world.training_job(world.dataset())["id"]
    url = f"/v1/jobs/{job}/logs"
    assert (world.get(url).status_code, world.get(url).text) == (200, "")
    for number in (1, 2):
        fence = world.claim(JobKind.TRAINING)
        write_log(world, fence, f"attempt {number}\n")
        give_back(world, fence)
    assert world.get(url).text == "attempt 2\n"
    assert world.get(f"{url}?attempt=1").text == "attempt 1\n"
    check_problem(world.get(f"{url}?attempt=3"), 404, "not_found")
    other = world.client.get(url, headers=world.headers("bob"))
    check_problem(other, 404, "not_found")


# ------------------------------------------------------------------- metrics


@pytest.mark.parametrize("path", PATHS)
def test_series_are_chosen_and_thinned(world: World, path: str) -> None:
    job = world.training_job(world.dataset())["id"]
    fence = world.claim(JobKind.TRAINING)
    with world.database.transaction() as session:
        for step in range(101):
            values = {"loss": float(step), "grad_norm": 1.0} if step % 2 else {"loss": float(step)}
            ExperimentRepository(session).record_metrics(
                fence, job_id=job, scope="train", step=step, values=values
            )

    def steps(query: str) -> list[int]:
        points = world.get(f"{path}/{job}/metrics?{query}").json()["data"]
        return [point["step"] for point in points]

    assert steps("") == list(range(101))
    assert steps("names=grad_norm") == list(range(1, 101, 2))
    assert steps("after_step=98") == [99, 100]
    assert steps("max_points=5") == [0, 25, 50, 75, 100]
    assert steps("max_points=200&after_step=90") == list(range(91, 101))
    point = world.get(f"{path}/{job}/metrics?names=loss,none&after_step=99").json()["data"]
    assert point[0]["values"] == {"loss": 100.0}
    for query in ("names=", "names=a,,b", "max_points=1", "after_step=-1"):
        check_problem(world.get(f"{path}/{job}/metrics?{query}"), 422, "invalid_input")


# ----------------------------------------------------------- two at a time


def test_of_a_pause_and_an_end_at_once_one_wins(database_url: str, tmp_path: Path) -> None:
    with running_api(database_url, tmp_path) as world:
        dataset = world.dataset()
        for _ in range(5):
            job = world.training_job(dataset)["id"]
            fence = world.claim(JobKind.TRAINING)
            pausing = threading.Thread(target=world.post, args=(f"/v1/jobs/{job}/pause",))
            pausing.start()
            time.sleep(0.01)
            status = give_back(world, fence)
            pausing.join()
            view = world.get(f"/v1/jobs/{job}").json()
            assert status in (JobStatus.PAUSED, JobStatus.QUEUED)
            assert view["status"] == "paused"
