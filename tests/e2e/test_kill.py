"""kill -9 of the worker in two trials of a search: the job ends as if nothing happened."""

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.service import Service, finished_job, process_table, upload, wait_for

# Two whole searches on each setup. What `make test` has seen of it: kills of a search's workers
# (test_search_workers), of a final run (test_two_processes), of a worker (test_worker).
pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(420)]

METHOD = {
    "type": "auto",
    "auto": {
        "search": {"max_trials": 4},
        "hyperparameters": {"n_epochs": 2, "batch_size": 8},
    },
}


def adapter_hash(service: Service, job: dict[str, Any]) -> str:
    with service.client() as client:
        checkpoint_id = job["result"]["run"]["checkpoint_id"]
        files = client.get(f"/v1/checkpoints/{checkpoint_id}/files").json()["data"]
    return next(f["sha256"] for f in files if f["path"] == "adapter_model.safetensors")


def outcome(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how often the worker was killed."""
    result = job["result"]
    with service.client() as client:
        url = f"/v1/studies/{result['search']['study_id']}/trials"
        trials = client.get(url).json()["data"]
    return {
        "trials": sorted((t["number"], t["status"], t["log_loss"], t["drift"]) for t in trials),
        "winner": result["search"]["winner_trial"],
        "objective": result["run"]["objective"],
        "evaluation": result["run"]["evaluation"],
        "baseline": result["baseline"]["evaluation"],
        "comparison": result["comparison"],
        "samples": result["samples"],
        "adapter": adapter_hash(service, job),
    }


def _measured(client: httpx.Client, job: dict[str, Any]) -> int:
    """How many trials of the job's search have a log-loss."""
    if job["study_id"] is None:
        return 0
    trials = client.get(f"/v1/studies/{job['study_id']}/trials").json()["data"]
    return sum(trial["log_loss"] is not None for trial in trials)


def kill_worker(service: Service) -> None:
    """Kill the worker (not the job's own process, which must notice by itself)."""
    runners = service.runners()
    workers = service.workers("gpu")
    assert workers
    assert runners
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    wait_for("orphaned job processes to die", lambda: not set(runners) & process_table().keys(),
             timeout_s=5.0)  # fmt: skip
    if not any(p.poll() is None and "serve" in map(str, p.args) for p in service.processes):
        dead = [p for p in service.processes if p.pid in workers]
        for process in dead:
            process.wait()
            service.processes.remove(process)
        service.start(["worker", "--queue", "gpu"])


def test_killed_twice_ends_as_undisturbed(service: Service, small_dataset: Path) -> None:
    with service, service.client() as client:
        dataset = upload(client, small_dataset)
        body = {"model": "tiny-lm", "dataset_id": dataset["id"], "seed": 11, "method": METHOD}

        def start() -> str:
            return str(client.post("/v1/fine_tuning/jobs", json=body).json()["id"])

        calm = finished_job(service, start())
        assert calm["status"] == "succeeded", calm["error"]
        assert calm["attempt"] == 1

        job_id = start()
        for attempt in (1, 2):

            def in_the_middle(attempt: int = attempt) -> bool:
                job = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
                assert job["status"] in ("queued", "running"), job["error"]
                return job["attempt"] == attempt and _measured(client, job) >= attempt

            wait_for(f"a measured trial of attempt {attempt}", in_the_middle, timeout_s=120)
            kill_worker(service)
        disturbed = finished_job(service, job_id)
        assert disturbed["status"] == "succeeded", disturbed["error"]
        assert disturbed["attempt"] == 3
        assert outcome(service, disturbed) == outcome(service, calm)
