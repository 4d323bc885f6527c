"""One request with a file: stored, validated and recommended for, or refused as a dataset is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.keys import Scope
from core.lifecycle import EventType, JobKind, JobStatus
from core.profile import Recommendation
from core.queue import QueueName
from models.job import Job
from models.repositories.events import events_after
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.session import Database
from selection.recommender import recommend
from tests.integration.api_world import MODEL, World, pairs, running_api
from tests.integration.test_api import check_problem
from tests.unit.selection.samples import profile

BAD = pairs(20) + b'{"prompt": "p", "chosen": "c"}\nnot json\n' * 3


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path, api={"max_body_bytes": 20_000}) as made:
        yield made


@pytest.fixture(scope="module")
def found() -> Recommendation:
    return recommend(profile(), beta=0.2)


def sent(world: World, data: bytes | None = None, *, prefer: str = "wait=0", **form: str) -> Any:
    return world.post(
        "/v1/recommendations",
        files={"file": ("prefs.jsonl", pairs(30) if data is None else data)},
        data={"model": MODEL} | form,
        headers={"Prefer": prefer} if prefer else {},
    )


def recommend_next(world: World, found: Recommendation) -> None:
    fence = world.claim(JobKind.RECOMMENDATION)
    with world.database.transaction() as session:
        job = session.get_one(Job, fence.job_id)
        ExperimentRepository(session).save_recommendation(
            fence, owner_id=job.owner_id, dataset_id=str(job.dataset_id), model=str(job.model),
            result=found.model_dump(mode="json"),
        )  # fmt: skip
    world.finish(fence, result={"recommendation_id": fence.job_id})


def claimable(database: Database) -> bool:
    with database.reading() as session:
        return QueueName.GPU in JobRepository(session).overdue_queues(older_than_s=-1.0)


def stored(world: World) -> tuple[list[str], list[Any]]:
    """The files of uploads and the datasets."""
    folder = world.settings.upload_dir
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return files, world.get("/v1/datasets").json()["data"]


def test_one_call_gives_the_answer(world: World, found: Recommendation) -> None:
    def work() -> None:
        world.validate()
        recommend_next(world, found)

    worker = world.soon(work, JobKind.DATASET)
    answer = sent(world, prefer="wait=20", seed="7", metadata='{"run": "first"}', name="mine")
    worker.join()
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait=20"
    view = answer.json()
    assert answer.headers["location"] == f"/v1/recommendations/{view['id']}"
    assert (view["object"], view["status"], view["provisional"]) == (
        "recommendation", "succeeded", False,
    )  # fmt: skip
    assert view["recommendation"]["kernel"] == found.kernel
    assert (view["seed"], view["metadata"], view["model"]) == (7, {"run": "first"}, MODEL)
    dataset = world.get(f"/v1/datasets/{view['dataset_id']}").json()
    assert (dataset["name"], dataset["counts"]["pairs"]) == ("mine", 30)
    accepted = world.post(f"/v1/recommendations/{view['id']}/accept")
    assert accepted.status_code == 201
    assert accepted.json()["dataset_id"] == view["dataset_id"]


def test_bad_data_are_refused_as_a_dataset_is(world: World) -> None:
    worker = world.soon(world.validate, JobKind.DATASET)
    as_dataset = world.post("/v1/datasets", files={"file": BAD}, headers={"Prefer": "wait=20"})
    worker.join()
    worker = world.soon(world.validate, JobKind.DATASET)
    answer = sent(world, BAD, prefer="wait=20")
    worker.join()
    expected = check_problem(as_dataset, 422, "dataset_invalid")
    problem = check_problem(answer, 422, "dataset_invalid")
    for name in ("detail", "hint", "errors", "error"):
        assert problem[name] == expected[name], name
    report = world.get(problem["report_url"]).json()
    assert (report["dataset_id"], report["counts"]["rejected"]) == (problem["dataset_id"], 6)
    view = world.get(f"/v1/recommendations/{problem['recommendation_id']}").json()
    assert (view["status"], view["dataset_id"]) == ("failed", problem["dataset_id"])
    assert view["error"]["code"] == "dataset_invalid"
    assert view["error"]["message"] == problem["detail"]
    assert len(view["error"]["errors"]) == len(problem["errors"])
    with world.database.reading() as session:
        events = events_after(session, view["id"], 0, 100)
    assert [event.type for event in events] == [
        EventType.JOB_STATUS, EventType.JOB_STATUS, EventType.DONE,
    ]  # fmt: skip


def test_without_a_preference_bad_data_are_refused_and_good_ones_accepted(
    world: World, found: Recommendation
) -> None:
    worker = world.soon(world.validate, JobKind.DATASET)
    check_problem(sent(world, BAD, prefer=""), 422, "dataset_invalid")
    worker.join()
    worker = world.soon(world.validate, JobKind.DATASET)
    answer = sent(world, prefer="")
    worker.join()
    assert answer.status_code == 202, answer.text
    assert "preference-applied" not in answer.headers
    recommend_next(world, found)
    assert world.get(answer.headers["location"]).json()["status"] == "succeeded"


@pytest.mark.parametrize("backend", ["sqlite_url", "postgres_url"])
def test_the_recommendation_waits_for_its_data(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest, found: Recommendation
) -> None:
    with running_api(request.getfixturevalue(backend), tmp_path) as world:
        answer = sent(world)
        assert answer.status_code == 202
        view = answer.json()
        assert (view["status"], view["recommendation"]) == ("validating_files", None)
        assert not claimable(world.database), "no worker may take it yet"
        url = f"/v1/datasets/{view['dataset_id']}"
        in_use = world.client.delete(url, headers=world.headers())
        check_problem(in_use, 409, "dataset_in_use")
        world.validate()
        view = world.get(answer.headers["location"]).json()
        assert (view["status"], view["queue"]["position"]) == ("queued", 1)
        recommend_next(world, found)
        assert world.get(answer.headers["location"]).json()["status"] == "succeeded"


def test_cancelling_either_job(world: World, found: Recommendation) -> None:
    first = sent(world).json()
    cancelled = world.post(f"/v1/recommendations/{first['id']}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    world.validate()
    assert not claimable(world.database)
    assert world.get(f"/v1/datasets/{first['dataset_id']}").json()["counts"]["pairs"] == 30
    second = sent(world).json()
    validation = world.get(f"/v1/datasets/{second['dataset_id']}").json()["job_id"]
    world.post(f"/v1/jobs/{validation}/cancel")
    view = world.get(f"/v1/recommendations/{second['id']}").json()
    assert (view["status"], view["error"]["code"]) == ("failed", "cancelled")
    assert view["error"]["retryable"] is False


def test_a_validation_that_pauses_does_not_end_the_recommendation(world: World) -> None:
    def pause() -> None:
        fence = world.claim(JobKind.DATASET)
        error = {"code": "disk_full", "message": "the disk is full", "hint": "Free some"}
        with world.database.transaction() as session:
            JobRepository(session).pause(fence, error, data={})

    worker = world.soon(pause, JobKind.DATASET)
    answer = sent(world, prefer="wait=20")
    worker.join()
    assert (answer.status_code, answer.json()["status"]) == (202, "validating_files")
    dataset = world.get(f"/v1/datasets/{answer.json()['dataset_id']}").json()
    world.post(f"/v1/jobs/{dataset['job_id']}/resume")
    world.validate()
    assert world.get(answer.headers["location"]).json()["status"] == "queued"


def test_a_validation_that_dies_is_told(world: World) -> None:
    def die() -> None:
        error = {"code": "internal", "message": "the parser died", "retryable": False}
        world.finish(world.claim(JobKind.DATASET), JobStatus.FAILED, error=error)

    worker = world.soon(die, JobKind.DATASET)
    answer = sent(world, prefer="wait=20")
    worker.join()
    problem = check_problem(answer, 500, "internal")
    view = world.get(f"/v1/recommendations/{problem['recommendation_id']}").json()
    assert (view["status"], view["error"]["message"]) == ("failed", "the parser died")


@pytest.mark.parametrize(
    ("form", "status", "code", "param"),
    [
        ({"kernel": "rbf"}, 422, "unknown_parameter", "kernel"),
        ({"dataset_id": "ds_1"}, 422, "unknown_parameter", "dataset_id"),
        ({"model": "no-such-model"}, 422, "model_not_found", "model"),
        ({"model": ""}, 422, "invalid_input", "model"),
        ({"seed": "-1"}, 422, "invalid_input", "seed"),
        ({"seed": "many"}, 422, "invalid_input", "seed"),
        ({"metadata": "{"}, 422, "invalid_input", "metadata"),
        ({"metadata": '{"a": 1}'}, 422, "invalid_input", "metadata"),
        ({"policy": '{"beat": 1}'}, 422, "invalid_input", "policy"),
        ({"policy": '{"dry_run": true}'}, 422, "invalid_input", "policy"),
        ({"name": "a\nb"}, 422, "invalid_input", "name"),
    ],
)
def test_a_form_with_a_fault_leaves_nothing(
    world: World, form: dict[str, str], status: int, code: str, param: str
) -> None:
    problem = check_problem(sent(world, **form), status, code)
    assert problem["error"]["param"] == param
    assert stored(world) == ([], [])
    assert world.get("/v1/recommendations").json()["data"] == []


def test_a_form_needs_file_and_model(world: World) -> None:
    url = "/v1/recommendations"
    check_problem(world.post(url, files={"model": (None, MODEL)}), 422, "missing_file")
    problem = check_problem(world.post(url, files={"file": pairs(20)}), 422, "invalid_input")
    assert problem["errors"][0]["pointer"] == "/model"
    check_problem(sent(world, b"BZh9" + b"x" * 100), 415, "unsupported_media_type")
    check_problem(sent(world, b""), 422, "empty_file")
    other = world.post(url, content=b"a=1", headers={"Content-Type": "text/plain"})
    check_problem(other, 415, "unsupported_media_type")
    assert stored(world) == ([], [])


def test_a_form_needs_the_scopes_of_both(world: World) -> None:
    for scopes, status in (
        ((Scope.JOBS_WRITE,), 403),
        ((Scope.DATASETS_WRITE,), 403),
        ((Scope.JOBS_WRITE, Scope.DATASETS_WRITE), 202),
    ):
        answer = world.client.post(
            "/v1/recommendations", files={"file": pairs(20)}, data={"model": MODEL},
            headers={"Authorization": f"Bearer {world.key('ada', scopes)}", "Prefer": "wait=0"},
        )  # fmt: skip
        assert answer.status_code == status, answer.text


def test_json_is_as_strict_as_before(world: World) -> None:
    url, dataset = "/v1/recommendations", world.dataset()
    body = {"dataset_id": dataset, "model": MODEL}
    assert world.post(url, json=body).status_code == 202
    broken = world.post(url, content=b'{"model":', headers={"Content-Type": "application/json"})
    check_problem(broken, 400, "malformed_request")
    for more, pointer in (
        ({"beat": 1}, "/beat"),
        ({"seed": -1}, "/seed"),
        ({"model": 3}, "/model"),
    ):
        problem = check_problem(world.post(url, json=body | more), 422, "invalid_input")
        assert problem["errors"][0]["pointer"] == pointer
    large = world.post(url, json=body | {"metadata": {"a": "x" * 30_000}})
    check_problem(large, 413, "too_large")
    assert sent(world, pairs(1000)).status_code == 202, "a file may be larger than a body"
