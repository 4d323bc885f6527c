"""Versions of a dataset over HTTP: one upload read under several policies, and forgotten."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, select

from core.lifecycle import JobKind, JobStatus
from models.dataset import Dataset
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import JobRepository
from models.repositories.paging import PageQuery
from tests.integration.api_world import MODEL, World, pairs, running_api
from tests.integration.test_api import check_problem
from worker.cleanup import Cleanup
from worker.context import JobContext
from worker.jobs import validate_dataset

MAPPING = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def foreign(count: int) -> bytes:
    """Pairs whose columns no layout has."""
    rows = ({"q": f"Why {n}?", "good": f"Because {n}.", "bad": "No."} for n in range(count))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def version(world: World, dataset: str, policy: dict[str, Any], **more: Any) -> Any:
    return world.post(
        f"/v1/datasets/{dataset}/versions", json={"policy": policy, **more},
        headers={"Prefer": "wait=0"},
    )  # fmt: skip


def made_version(world: World, dataset: str, policy: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = version(world, dataset, policy, **more)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/datasets/{answer.json()['id']}"
    world.validate()
    found: dict[str, Any] = world.get(answer.headers["location"]).json()
    return found


def listed(world: World, dataset: str, **query: str) -> list[tuple[int, str]]:
    answer = world.get(f"/v1/datasets/{dataset}/versions", params=query)
    assert answer.status_code == 200, answer.text
    return [(view["version"], view["id"]) for view in answer.json()["data"]]


def test_another_mapping_reads_the_same_upload(world: World) -> None:
    first = world.upload(foreign(30), name="mine").json()
    assert (first["version"], first["parent"]) == (1, None)
    world.validate()
    before = world.get(f"/v1/datasets/{first['id']}").json()
    assert before["status"] == "invalid"
    second = made_version(world, first["id"], {"column_mapping": MAPPING})
    assert second["status"] in ("ready", "ready_with_warnings")
    assert second["counts"]["pairs"] == 30
    assert (second["version"], second["parent"]) == (2, first["id"])
    assert (second["name"], second["sha256"]) == ("mine", first["sha256"])
    assert second["policy"]["column_mapping"] == MAPPING
    assert [path.name for path in world.settings.upload_dir.iterdir()] == [first["id"]]
    assert world.get(f"/v1/datasets/{first['id']}").json() == before
    third = made_version(
        world, second["id"], {"column_mapping": MAPPING, "split": {"seed": 1}}, name="other"
    )
    assert (third["version"], third["parent"], third["name"]) == (3, second["id"], "other")
    newest_first = [(3, third["id"]), (2, second["id"]), (1, first["id"])]
    for one in (first, second, third):
        assert listed(world, one["id"]) == newest_first
    assert listed(world, first["id"], order="asc", limit="1") == newest_first[-1:]
    rows = [world.get(f"/v1/datasets/{one['id']}/rows").json()["data"] for one in (second, third)]
    ids = [{row["row"]["id"] for row in page} for page in rows]
    assert ids[0] == ids[1]


def test_a_known_policy_gives_the_version_that_there_is(world: World) -> None:
    first = world.dataset()
    usual = version(world, first, {})
    assert (usual.status_code, usual.json()["id"]) == (200, first)
    second = made_version(world, first, {"split": {"seed": 3}})
    again = version(world, second["id"], {"on_invalid": "skip", "split": {"seed": 3, "test": 0.15}})
    assert (again.status_code, again.json()) == (200, second)
    assert version(world, second["id"], {}).json()["id"] == first
    refused = made_version(world, first, {"layout": "openai"})
    assert refused["status"] == "invalid"
    same = check_problem(version(world, first, {"layout": "openai"}), 422, refused["error"]["code"])
    assert same["dataset_id"] == refused["id"], "the same bytes are refused again"
    assert len(listed(world, first)) == 3


def test_a_reading_that_was_not_finished_is_no_version_to_give_back(world: World) -> None:
    first = world.dataset()
    policy = {"split": {"seed": 4}}
    stopped = version(world, first, policy).json()
    assert version(world, first, policy).json()["id"] == stopped["id"], "it is being read"
    world.post(f"/v1/jobs/{stopped['job_id']}/cancel")
    made = made_version(world, first, policy)
    assert made["version"] == 3
    assert made["status"].startswith("ready")
    assert version(world, first, policy).json()["id"] == made["id"]


def test_a_model_that_is_not_there_is_asked_for_again(world: World) -> None:
    first = world.dataset()
    for number in (2, 3):
        made = version(world, first, {"model": "not-here-yet"})
        assert (made.status_code, made.json()["version"]) == (202, number)
        fence = world.claim(JobKind.DATASET)
        with world.database.reading() as session:
            job = JobRepository(session).load(fence)
        context = JobContext(world.settings, world.database, fence, job)
        world.finish(fence, result=validate_dataset.run(context))
        found = world.get(made.headers["location"]).json()
        assert (found["status"], found["error"]["code"]) == ("invalid", "model_not_found")


def test_lists_leave_reports_in_the_database(world: World) -> None:
    world.dataset()
    with world.database.reading() as session:
        owner_id = session.execute(select(Dataset.owner_id)).scalar_one()
        page = DatasetRepository(session).page(owner_id, PageQuery())
        assert ["report" in inspect(row).unloaded for row in page.rows] == [True]


def test_a_dry_run_becomes_a_dataset_without_another_upload(world: World) -> None:
    made = world.upload(policy='{"dry_run": true}').json()["id"]
    world.validate()
    assert world.get(f"/v1/datasets/{made}").json()["files"][0]["path"] == "rejected.jsonl"
    ready = made_version(world, made, {})
    assert ready["counts"]["pairs"] == 30
    world.training_job(ready["id"])


def test_callers_at_the_same_moment_share_one_version(database_url: str, tmp_path: Path) -> None:
    with running_api(database_url, tmp_path) as world:
        first, count = world.dataset(), 4
        start = threading.Barrier(count)
        answers: list[tuple[str, int]] = []

        def ask(number: int) -> None:
            start.wait()
            made = version(world, first, {"split": {"seed": number // 2}, "on_invalid": "fail"})
            answers.append((made.json()["id"], made.json()["version"]))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(number for _, number in set(answers)) == [2, 3]
        assert sorted(answers) == sorted(2 * sorted(set(answers)))


def test_deleting_one_version_leaves_the_other_and_the_bytes(world: World) -> None:
    first = world.dataset()
    second = made_version(world, first, {"split": {"seed": 5}})["id"]
    clean = Cleanup(world.settings, world.database)
    rows = world.settings.artifact_dir / "datasets"
    upload = world.settings.upload_dir / first
    job = world.training_job(first)["id"]
    problem = check_problem(world.client.delete(f"/v1/datasets/{first}", headers=world.headers()),
                            409, "dataset_in_use")  # fmt: skip
    assert job in problem["detail"]
    world.train(job)
    answer = world.client.delete(f"/v1/datasets/{first}", headers=world.headers())
    assert (answer.status_code, answer.content) == (204, b"")
    for path in ("", "/report", "/rows", "/versions"):
        check_problem(world.get(f"/v1/datasets/{first}{path}"), 404, "not_found")
    assert [view["id"] for view in world.get("/v1/datasets").json()["data"]] == [second]
    assert listed(world, second) == [(2, second)]
    check_problem(version(world, first, {}), 404, "not_found")
    body = {"model": MODEL, "dataset_id": first}
    for url in ("/v1/recommendations", "/v1/fine_tuning/jobs"):
        check_problem(world.post(url, json=body), 404, "not_found")
    assert world.get(f"/v1/fine_tuning/jobs/{job}").json()["dataset_id"] == first
    clean.run()
    assert [path.name for path in rows.iterdir()] == [second]
    assert upload.is_file(), "version 2 may be read again"
    third = made_version(world, second, {})["id"]
    assert world.get(f"/v1/datasets/{third}").json()["version"] == 3
    for one in (second, third):
        assert world.client.delete(f"/v1/datasets/{one}", headers=world.headers()).is_success
    clean.run()
    assert (list(rows.iterdir()), upload.exists()) == ([], False)


def test_an_old_version_stays_with_the_jobs_that_named_it(world: World) -> None:
    first = world.dataset()
    rows = world.settings.artifact_dir / "datasets" / first / "canonical.jsonl"
    before = rows.read_bytes()
    job = world.training_job(first)["id"]
    made_version(world, first, {"split": {"seed": 6}})
    assert rows.read_bytes() == before
    assert world.get(f"/v1/fine_tuning/jobs/{job}").json()["dataset_id"] == first
    world.train(job)
    assert world.get(f"/v1/fine_tuning/jobs/{job}").json()["status"] == "succeeded"


def test_a_validation_that_runs_keeps_its_dataset(world: World) -> None:
    made = world.upload().json()
    url = f"/v1/datasets/{made['id']}"
    check_problem(world.client.delete(url, headers=world.headers()), 409, "dataset_in_use")
    fence = world.claim(JobKind.DATASET)
    check_problem(world.client.delete(url, headers=world.headers()), 409, "dataset_in_use")
    with world.database.transaction() as session:
        JobRepository(session).finish(fence, JobStatus.FAILED, error=None, message="died")
    assert world.client.delete(url, headers=world.headers()).status_code == 204


def test_what_is_refused(world: World) -> None:
    first = world.dataset()
    url = f"/v1/datasets/{first}/versions"
    check_problem(world.post(url, json={}), 422, "invalid_input")
    check_problem(world.post(url, json={"policy": {}, "file": "x"}), 422, "invalid_input")
    problem = check_problem(
        world.post(url, json={"policy": {"pairing": "worst"}}), 422, "invalid_input"
    )
    assert problem["errors"][0]["pointer"] == "/policy/pairing"
    check_problem(world.post(url, json={"policy": {}, "name": "a\nb"}), 422, "invalid_input")
    for headers, status in ((world.headers("eve"), 404), ({}, 401)):
        answers = (
            world.client.post(url, json={"policy": {}}, headers=headers),
            world.client.get(url, headers=headers),
            world.client.delete(f"/v1/datasets/{first}", headers=headers),
        )
        assert [answer.status_code for answer in answers] == [status] * 3
    assert listed(world, first) == [(1, first)]


def test_an_upload_that_is_gone_is_said(world: World) -> None:
    first = world.upload(pairs(30)).json()["id"]
    world.validate()
    (world.settings.upload_dir / first).unlink()
    made = version(world, first, {"split": {"seed": 7}})
    problem = check_problem(made, 409, "upload_gone")
    assert "POST /v1/datasets" in problem["hint"]
    assert listed(world, first) == [(1, first)]
