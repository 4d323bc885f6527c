"""Evaluations over HTTP: what is refused, what the job is told, what its result looks like."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from app.main import create_app
from core.evaluations import EvaluationResult, WinRate
from core.lifecycle import JobKind, JobStatus
from core.profile import Estimate
from core.results import Evaluation
from core.settings import Settings
from models.evaluation import AnsweredPrompt
from models.job import Job
from models.repositories.evaluations import AnswerRepository
from models.session import Database
from tests.integration.api_world import MODEL, MODEL_DIR, World, running_api
from tests.integration.test_api import check_problem

JUDGE = "judge"
ESTIMATE = Estimate(value=0.6, low=0.5, high=0.7)
RESULT = EvaluationResult(
    measured=Evaluation(
        log_loss=0.6, temperature=1.0, accuracy=0.6, accuracy_length_normalized=0.6,
        calibration_error=0.1, drift=0.6, chosen_displacement=0.0, pairs=30, prompts=25,
    ),
    accuracy=ESTIMATE,
    log_loss=ESTIMATE,
    drift=ESTIMATE,
    win_rate=WinRate(
        reward_model=JUDGE, prompts=25, wins=10, ties=10, losses=5, rate=ESTIMATE,
        difference=ESTIMATE, verdict="better", sentence="It wins.",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny reward model, and with one that has two outputs."""
    root = tmp_path_factory.mktemp("judges")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR / MODEL, local_files_only=True)
    torch.manual_seed(0)
    for name, outputs in ((JUDGE, 1), ("classes", 2)):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_labels=outputs,
        )  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def world(database_url: str, tmp_path: Path, judges: Path) -> Iterator[World]:
    shutil.copytree(judges, tmp_path / "data" / "models")
    with running_api(database_url, tmp_path) as made:
        yield made


def checkpoint(world: World, *, kind: str = "adapter") -> tuple[str, str]:
    """Return a checkpoint of a job that has ended, and its dataset."""
    dataset = world.dataset()
    world.training_job(dataset, method={"type": "dpo"})
    fence = world.claim(JobKind.TRAINING)
    made = world.publish(fence, {"config.json": b"{}"}, kind=kind)
    world.finish(fence, JobStatus.FAILED)
    return made, dataset


def ask(world: World, checkpoint_id: str, **more: Any) -> dict[str, Any]:
    answer = world.post("/v1/evaluations", json={"checkpoint_id": checkpoint_id, **more})
    assert answer.status_code == 202, answer.text
    made: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/evaluations/{made['id']}"
    return made


def test_an_evaluation_is_a_job_with_everything_pinned(world: World) -> None:
    made, dataset = checkpoint(world)
    first = ask(world, made, reward_model=JUDGE, seed=3, metadata={"why": "release"})
    assert first["id"].startswith("eval_")
    assert (first["object"], first["status"]) == ("evaluation", "queued")
    assert (first["checkpoint_id"], first["dataset_id"]) == (made, dataset)
    assert (first["split"], first["reward_model"], first["seed"]) == ("test", JUDGE, 3)
    assert (first["result"], first["metadata"]) == (None, {"why": "release"})
    with world.database.reading() as session:
        job = session.get_one(Job, first["id"])
    assert job.kind is JobKind.EVALUATION
    assert job.spec["method"] == {"type": "dpo", "dpo": job.spec["method"]["dpo"]}
    assert (job.spec["model"]["name"], job.spec["reward_model"]["name"]) == (MODEL, JUDGE)
    assert (job.spec["max_prompts"], job.spec["max_new_tokens"]) == (100, 256)
    answer = world.get(f"/v1/evaluations/{first['id']}")
    assert answer.json() == first
    same = {"If-None-Match": answer.headers["etag"]}
    assert world.get(f"/v1/evaluations/{first['id']}", headers=same).status_code == 304
    in_use = world.client.delete(f"/v1/checkpoints/{made}", headers=world.headers())
    check_problem(in_use, 409, "checkpoint_in_use")
    in_use = world.client.delete(f"/v1/datasets/{dataset}", headers=world.headers())
    check_problem(in_use, 409, "dataset_in_use")
    assert world.get(f"/v1/jobs/{first['id']}").json()["kind"] == "evaluation"
    jobs = world.get("/v1/jobs?kind=evaluation").json()["data"]
    assert [job["id"] for job in jobs] == [first["id"]]


def test_evaluations_are_filtered(world: World) -> None:
    one, dataset = checkpoint(world)
    other, _ = checkpoint(world)
    first = ask(world, one, metadata={"team": "a"})["id"]
    second = ask(world, other, dataset_id=dataset)["id"]
    for query, expected in (
        ("", [second, first]),
        (f"?checkpoint_id={one}", [first]),
        ("?metadata[team]=a", [first]),
        (f"?dataset_id={dataset}", [second, first]),
        ("?status=succeeded", []),
    ):
        found = world.get(f"/v1/evaluations{query}").json()["data"]
        assert [evaluation["id"] for evaluation in found] == expected, query
    assert world.client.get("/v1/evaluations", headers=world.headers("eve")).json()["data"] == []


def test_the_result_and_the_answers(world: World) -> None:
    made, _ = checkpoint(world)
    first = ask(world, made, reward_model=JUDGE)
    url = f"/v1/evaluations/{first['id']}"
    assert world.get(first["samples_url"]).json()["data"] == []
    fence = world.claim(JobKind.EVALUATION)
    answers = [
        AnsweredPrompt(
            job_id=fence.job_id, number=n, pair_id="0" * 32, prompt=f"p{n}", base="b", aligned="a"
        )
        for n in range(1, 26)
    ]
    with world.database.transaction() as session:
        AnswerRepository(session).add(fence, answers, gpu_seconds=2.0)
    with world.database.transaction() as session:
        AnswerRepository(session).score(fence, [(1, 0.25, -1.0)], gpu_seconds=1.0)
    page = world.get(f"{url}/samples").json()
    assert [sample["prompt"] for sample in page["data"]] == [f"p{n}" for n in range(1, 21)]
    assert [sample["base_reward"] for sample in page["data"][:2]] == [0.25, None]
    assert (page["has_more"], page["last_id"]) == (True, "20")
    rest = world.get(f"{url}/samples?after={page['last_id']}").json()
    assert [sample["number"] for sample in rest["data"]] == [21, 22, 23, 24, 25]
    assert rest["has_more"] is False
    world.finish(fence, result=RESULT.model_dump(mode="json"))
    done = world.get(url).json()
    assert done["status"] == "succeeded"
    assert done["result"]["win_rate"]["sentence"] == "It wins."
    assert world.get(f"/v1/jobs/{fence.job_id}").json()["usage"]["gpu_seconds"] == 3.0
    assert world.get("/v1/usage").json()["gpu_seconds"] == 3.0


def test_a_file_and_another_dataset_can_be_named(world: World) -> None:
    made, _ = checkpoint(world)
    file = world.post(
        "/v1/files", files={"file": ("p.jsonl", b'{"prompt": "p"}')}, data={"purpose": "fine-tune"}
    ).json()
    waiting = ask(world, made, dataset_id=file["id"], split="validation")
    assert (waiting["status"], waiting["dataset_id"]) == ("validating_files", file["dataset_id"])
    other = world.dataset(owner="eve")
    body = {"checkpoint_id": made, "dataset_id": other}
    check_problem(world.post("/v1/evaluations", json=body), 404, "not_found")


def test_data_that_are_gone_are_named_anew(world: World) -> None:
    made, dataset = checkpoint(world)
    gone = world.client.delete(f"/v1/datasets/{dataset}", headers=world.headers())
    assert gone.status_code == 204
    problem = check_problem(
        world.post("/v1/evaluations", json={"checkpoint_id": made}), 404, "not_found"
    )
    assert problem["error"]["param"] == "dataset_id"
    assert dataset in problem["detail"]
    assert "trained on are deleted" in problem["hint"]
    assert ask(world, made, dataset_id=world.dataset())["status"] == "queued"


def test_a_repeated_request_makes_one_evaluation(world: World) -> None:
    made, _ = checkpoint(world)
    key = {"Idempotency-Key": "once"}
    body = {"checkpoint_id": made}
    first, second = (world.post("/v1/evaluations", json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert len(world.get("/v1/evaluations").json()["data"]) == 1


def test_what_cannot_be_evaluated(world: World) -> None:
    made, _ = checkpoint(world, kind="merged")
    check_problem(
        world.post("/v1/evaluations", json={"checkpoint_id": made}), 409, "checkpoint_not_adapter"
    )
    for body, status, code, param in (
        ({"checkpoint_id": "ckpt_none"}, 404, "not_found", None),
        ({"reward_model": "none"}, 422, "model_not_found", "reward_model"),
        ({"reward_model": "some/judge"}, 422, "model_unreachable", "reward_model"),
        ({"reward_model": MODEL}, 422, "model_not_reward_model", "reward_model"),
        ({"reward_model": "classes"}, 422, "model_not_reward_model", "reward_model"),
        ({"split": "train"}, 422, "invalid_input", "split"),
        ({"max_prompts": 0}, 422, "invalid_input", "max_prompts"),
        ({"judge": "x"}, 422, "invalid_input", "judge"),
    ):
        answer = world.post("/v1/evaluations", json={"checkpoint_id": made, **body})
        assert check_problem(answer, status, code)["error"]["param"] == param
    eve = world.headers("eve")
    stranger = world.client.post("/v1/evaluations", json={"checkpoint_id": made}, headers=eve)
    check_problem(stranger, 404, "not_found")


def test_a_reward_model_is_one_that_the_server_may_take_from_the_hub(
    sqlite_url: str, tmp_path: Path
) -> None:
    models = {"dirs": (MODEL_DIR,), "hub_allow": ("Skywork/*",)}
    settings = Settings(data_dir=tmp_path / "data", db={"url": sqlite_url}, models=models)
    with TestClient(create_app(settings)) as client:
        world = World(client.app, client, Database(sqlite_url), settings)
        made, _ = checkpoint(world)
        body = {"checkpoint_id": made, "reward_model": "other/judge"}
        problem = check_problem(world.post("/v1/evaluations", json=body), 403, "model_not_allowed")
        assert problem["error"]["param"] == "reward_model"
        world.database.dispose()
