"""A report over HTTP with what tiny-lm makes of the data; the validation job is the real one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.lifecycle import JobKind, JobStatus
from core.queue import QUEUE_OF_KIND
from core.settings import Settings
from models.repositories.jobs import JobRepository
from tests.integration.api_world import MODEL, MODEL_DIR, World, pairs, running_api
from worker.context import JobContext
from worker.jobs import validate_dataset
from worker.supervisor import Supervisor

Report = Callable[..., Any]


@pytest.fixture
def reported(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Report]:
    # Limits of a process cannot be taken back, and this one is the test's.
    monkeypatch.setattr(validate_dataset, "apply_process_limits", lambda _limits, **_more: None)
    with running_api(sqlite_url, tmp_path) as world:
        yield lambda **policy: _report(world, policy)


def _report(world: World, policy: dict[str, Any]) -> Any:
    dataset_id = world.upload(pairs(30), policy=json.dumps(policy)).json()["id"]
    fence = world.claim(JobKind.DATASET)
    with world.database.reading() as session:
        job = JobRepository(session).load(fence)
    context = JobContext(settings=world.settings, database=world.database, fence=fence, job=job)
    context.attempt_dir.mkdir(parents=True, exist_ok=True)
    world.finish(fence, JobStatus.SUCCEEDED, result=validate_dataset.run(context))
    return world.get(f"/v1/datasets/{dataset_id}/report").json(), world.get(
        f"/v1/datasets/{dataset_id}"
    ).json()


def test_the_report_says_what_the_model_sees(reported: Report) -> None:
    for dry_run in (False, True):
        report, _ = reported(model=MODEL, max_length=24, dry_run=dry_run)
        assert report["tokens"]["tokenizer"] == MODEL
        assert report["tokens"]["measured_pairs"] == report["tokens"]["pairs"] == 30
        assert report["tokens"]["rule"] == "all pairs"
        checks = {check["check"]: check for check in report["lint"]}
        assert checks.keys() >= {"tie", "duplicate_pair", "label_conflict", "eval_overlap",
                                 "length_bias", "truncation"}  # fmt: skip
        assert (checks["truncation"]["at"], checks["truncation"]["of"]) == (24, 30)
        shown = report["preview"][0]
        assert shown["raw"]["prompt"] in shown["rendered"]["text"]
        assert shown["canonical"]["chosen"][0]["content"] == shown["raw"]["chosen"]


def test_a_model_that_is_not_there_is_said(reported: Report) -> None:
    _, dataset = reported(model="nowhere")
    assert dataset["status"] == "invalid"
    assert dataset["error"]["code"] == "model_not_found"
    assert dataset["error"]["param"] == "policy.model"


def test_a_tokenizer_does_not_take_the_parsers_memory(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less than torch alone has: its CUDA libraries take more than the usual limit.
    monkeypatch.setenv("KDPO_DATA__PARSER_MEMORY_BYTES", str(400 * 1024**2))
    monkeypatch.setenv("KDPO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("KDPO_DB__URL", sqlite_url)
    monkeypatch.setenv("KDPO_MODELS__DIRS", str(MODEL_DIR))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with running_api(sqlite_url, tmp_path) as world:
        url = world.upload(pairs(30), policy=json.dumps({"model": MODEL})).headers["location"]
        supervisor = Supervisor(Settings(), world.database, worker_id="wrk_test")
        supervisor.drain(QUEUE_OF_KIND[JobKind.DATASET])
        dataset = world.get(url).json()
        assert (dataset["error"], dataset["counts"]["pairs"]) == (None, 30)
        assert world.get(dataset["report_url"]).json()["tokens"]["tokenizer"] == MODEL
