"""A final run of two processes: killed it goes on, cancelled it stops, and no process is left."""

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.service import Service, finished_job, process_table, upload, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(420)]


def ranks(service: Service) -> list[int]:
    """The processes of runs that are not the first."""
    folder = str(service.folder)
    return [
        pid
        for pid, (_, command) in process_table().items()
        if "worker.training.rank_main" in command and folder in command
    ]


def in_training(client: httpx.Client, job_id: str, *, done: int) -> bool:
    job = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    assert job["status"] in ("queued", "running"), job["error"]
    progress = job["progress"] or {}
    is_training = job["phase"] == "training" and progress.get("unit") == "steps"
    return is_training and progress["done"] >= done


def test_killed_it_goes_on_and_cancelled_it_stops(tmp_path: Path, small_dataset: Path) -> None:
    service = Service.embedded(tmp_path, KDPO_TRAINING__NUM_PROCESSES="2")
    with service, service.client() as client:
        dataset = upload(client, small_dataset)
        hyperparameters = {"n_epochs": 4, "batch_size": 8, "max_length": 128}
        body: dict[str, Any] = {
            "model": "tiny-lm",
            "dataset_id": dataset["id"],
            "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        }

        def start() -> str:
            return str(client.post("/v1/fine_tuning/jobs", json=body).json()["id"])

        job_id = start()
        wait_for("a few steps", lambda: in_training(client, job_id, done=2), timeout_s=120)
        assert len(ranks(service)) == 1
        for pid in service.runners():
            os.kill(pid, signal.SIGKILL)
        # Its child ends with it; the next attempt has another one.
        job = finished_job(service, job_id)
        assert job["status"] == "succeeded", job["error"]
        assert job["attempt"] == 2
        assert ranks(service) == []

        job_id = start()
        wait_for("a few steps", lambda: in_training(client, job_id, done=2), timeout_s=120)
        client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert finished_job(service, job_id)["status"] == "cancelled"
        wait_for("no process of a run", lambda: ranks(service) == [], timeout_s=5.0)
