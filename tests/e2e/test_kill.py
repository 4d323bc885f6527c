"""kill -9 of the worker, in a trial and in the final run: the job ends as if nothing happened."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.service import Service, finished_job, process_table, upload, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

METHOD = {
    "type": "auto",
    "auto": {
        "search": {"max_trials": 3},
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
        for phase, done in (("searching", 1), ("training", 2)):

            def in_the_middle(phase: str = phase, done: int = done) -> bool:
                job = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
                assert job["status"] in ("queued", "running"), job["error"]
                progress = job["progress"] or {}
                return job["phase"] == phase and progress.get("done", 0) >= done

            wait_for(f"the middle of {phase}", in_the_middle, timeout_s=120)
            kill_worker(service)
        disturbed = finished_job(service, job_id)
        assert disturbed["status"] == "succeeded", disturbed["error"]
        assert disturbed["attempt"] == 3
        assert outcome(service, disturbed) == outcome(service, calm)
