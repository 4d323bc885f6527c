"""One object of every kind that a caller can name, as a running service would have them."""

from typing import Any

from core.lifecycle import JobKind, JobStatus
from core.queue import QueueName
from core.run_spec import SearchSpec
from models.evaluation import AnsweredPrompt
from models.job import Job
from models.repositories.evaluations import AnswerRepository
from models.repositories.jobs import Fence
from models.repositories.owners import OwnerRepository
from models.repositories.steps import StepRepository
from models.repositories.workers import WorkerRepository
from tests.integration.api_world import World, objective, pairs
from tests.integration.study_world import PAIRS, PLAIN_DPO, Made, store_search

HOST = "hooks.example.com"
WORKER = "wrk_live"
# What has a word of its own in a path and is no object of anybody's.
WORDS = {"path": "config.json", "number": "0", "code": "dataset_invalid", "name": "rbf"}


def make_objects(world: World, owner: str = "ada") -> dict[str, str]:
    """Make the owner's objects; return their ids by the names of path parameters.

    A job, a study and a recommendation are there that have ended, and a search that runs. The
    service's own objects are made for `cy`, whoever asks.
    """
    dataset = world.dataset(owner=owner)
    job = world.training_job(dataset, owner=owner)["id"]
    made = world.train(job)
    study = running_search(world, dataset, owner)
    ids = {
        **WORDS,
        "dataset_id": dataset,
        "job_id": job,
        "recommendation_id": made["recommendation"],
        "checkpoint_id": made["checkpoint"],
        "study_id": study,
        "ended_study_id": made["study"],
        "evaluation_id": answered_evaluation(world, made["checkpoint"], owner),
        "worker_id": WORKER,
    }
    with world.database.transaction() as session:
        WorkerRepository(session).beat(
            WORKER, host="here", pid=1, version="0", queues=list(QueueName), draining=False
        )
        ids["owner_id"] = OwnerRepository(session).ensure("cy").id
    return ids | sent_objects(world, owner)


def running_search(world: World, dataset: str, owner: str = "ada") -> str:
    """Return a search with plain DPO, one that is better, one that failed, and one on its way."""
    job = world.training_job(dataset, owner=owner, method={"type": "auto"})["id"]
    fence = world.claim(JobKind.TRAINING)
    assert fence.job_id == job
    trials = [Made(PLAIN_DPO, 0.61), Made(objective("rbf"), 0.55), Made(PAIRS[2], None)]
    with world.database.transaction() as session:
        StepRepository(session).plan(fence, ["recommend", "search", "train"])
        StepRepository(session).start(fence, "search")
        owner_id = session.get_one(Job, job).owner_id
        study = store_search(
            session, fence, owner_id, trials, spec=SearchSpec(max_trials=900), running=True
        )
        return study.id


def new_checkpoint(world: World, dataset: str, owner: str = "ada") -> str:
    """Return a checkpoint that no job works on."""
    world.training_job(dataset, owner=owner)
    fence = world.claim(JobKind.TRAINING)
    checkpoint = world.publish(fence, {"config.json": b"{}"})
    world.finish(fence, JobStatus.FAILED)
    return checkpoint


def answered_evaluation(world: World, checkpoint: str, owner: str = "ada") -> str:
    """Return an evaluation that runs and has answered one prompt."""
    asked = _post(world, owner, "/v1/evaluations", json={"checkpoint_id": checkpoint})
    fence: Fence = world.claim(JobKind.EVALUATION)
    assert fence.job_id == asked["id"]
    answer = AnsweredPrompt(
        job_id=fence.job_id, number=1, pair_id="0" * 32, prompt="p", base="b", aligned="a"
    )
    with world.database.transaction() as session:
        AnswerRepository(session).add(fence, [answer], gpu_seconds=1.0)
    return str(asked["id"])


def sent_objects(world: World, owner: str = "ada") -> dict[str, str]:
    """Make what callers make without workers: files, uploads, webhooks, keys."""
    other = {"purpose": "user_data"}
    file = _post(world, owner, "/v1/files", files={"file": ("p.jsonl", pairs(3))}, data=other)
    upload = new_upload(world, owner)
    hook = _post(world, owner, "/v1/webhooks", json={"url": f"https://{HOST}/hook"})
    tried = _post(world, owner, f"/v1/webhooks/{hook['id']}/test")
    named_key = {"owner": "cy", "name": "notebook", "scopes": ["jobs:read"]}
    key = _post(world, owner, "/v1/api_keys", json=named_key)
    return {
        "file_id": file["id"],
        "upload_id": upload,
        "webhook_id": hook["id"],
        "delivery_id": tried["id"],
        "key_id": key["id"],
    }


def new_upload(world: World, owner: str = "ada", *, size: int = 1000) -> str:
    """Return an upload that waits for its parts."""
    named = {
        "filename": "p.jsonl", "purpose": "user_data", "bytes": size, "mime_type": "text/jsonl"
    }  # fmt: skip
    return str(_post(world, owner, "/v1/uploads", json=named)["id"])


def new_part(world: World, upload: str, data: bytes) -> str:
    """Return a part of an upload."""
    part = _post(world, "ada", f"/v1/uploads/{upload}/parts", files={"data": data})
    return str(part["id"])


def _post(world: World, owner: str, path: str, **more: Any) -> dict[str, Any]:
    answer = world.client.post(path, headers=world.headers(owner), **more)
    assert answer.is_success, answer.text
    body: dict[str, Any] = answer.json()
    return body
