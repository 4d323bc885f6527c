"""From a file to a checkpoint with real jobs: both clients, and the command line."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from kdpo import AsyncClient, Client
from tests.e2e.service import EXAMPLES, ROOT, Service, descendants, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
TINY = str(EXAMPLES / "models" / "tiny-lm")
SHORT = {"max_steps": 2, "batch_size": 4}


def check_sums(folder: Path) -> None:
    """Compare the files with the sums that are among them, as `sha256sum -c` does."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert len(lines) > 3
    for line in lines:
        expected, name = line.split("  ", 1)
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert not list(folder.glob(".*"))


def judge(folder: Path) -> Path:
    """Write a random reward model with tiny-lm's tokenizer."""
    config = AutoConfig.from_pretrained(TINY, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def kdpo(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name[:5] != "KDPO_"}
    python_path = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=folder, env={**kept, **python_path, **environment},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_from_a_file_to_a_checkpoint(tmp_path: Path, small_dataset: Path) -> None:
    with Service.embedded(tmp_path) as service:
        url = f"http://127.0.0.1:{service.port}"
        phases: list[str | None] = []
        with Client(url, service.key) as client:
            found = client.recommend(
                small_dataset, model="tiny-lm", on_progress=lambda job: phases.append(job.phase)
            )
            assert found.answer is not None
            assert found.answer.kernel == found.ranking[0].kernel
            assert "computing_metrics" in phases
            job = client.recommendations.accept(found, **SHORT)
            done = client.wait(job)
            check_sums(client.download(done, tmp_path / "blocking"))
            metrics = client.jobs.metrics(done)
            assert [point.step for point in metrics.data] == [1, 2]

        async def use() -> None:
            async with AsyncClient(url, service.key) as client:
                job = await client.fine_tune(
                    found.dataset_id, model="tiny-lm", method="dpo", wait=True, **SHORT
                )
                check_sums(await client.download(job, tmp_path / "awaited"))
                told = [event.type async for event in client.jobs.events(job)]
                assert (told[0], told[-1]) == ("job.status", "done")

        asyncio.run(use())
        named = {"KDPO_BASE_URL": url, "KDPO_API_KEY": service.key}
        tuned = kdpo(
            tmp_path, "tune", found.dataset_id, "-m", "tiny-lm", "--method", "dpo", "--json",
            "--set", "max_steps=2", "--set", "batch_size=4", "-o", "commanded", **named,
        )  # fmt: skip
        assert tuned.returncode == 0, tuned.stderr
        check_sums(tmp_path / "commanded")
        job_id = json.loads(tuned.stdout)["id"]
        evaluated = kdpo(
            tmp_path, "evaluate", job_id, "-r", str(judge(tmp_path / "judge")), "--json",
            "--max-prompts", "3", "--max-new-tokens", "8", **named,
        )  # fmt: skip
        assert evaluated.returncode == 0, evaluated.stderr
        measured = json.loads(evaluated.stdout)
        assert measured["result"]["win_rate"]["prompts"] == 3
        told = kdpo(tmp_path, "evaluate", job_id, **named)
        assert told.returncode == 0, told.stderr
        assert f"{measured['result']['log_loss']['value']:.4f}" in told.stdout
        shown = kdpo(tmp_path, "watch", job_id, **named)
        assert shown.returncode == 0, shown.stderr
        assert "calibrated log-loss" in shown.stdout
        watched = kdpo(tmp_path, "watch", job_id, "--after", "0", "--json", **named)
        assert watched.returncode == 0, watched.stderr
        events = [json.loads(line)["event"] for line in watched.stdout.splitlines()]
        assert [e["type"] for e in events if e][-1] == "done"
        refusals = {"job_nobody": (3, named), "x": (4, {**named, "KDPO_API_KEY": "dk-live-x"})}
        for wanted, (code, environment) in refusals.items():
            refused = kdpo(tmp_path, "jobs", "get", wanted, **environment)
            assert (refused.returncode, refused.stdout) == (code, ""), refused.stderr
            assert "request id: req_" in refused.stderr
        # Who may write the database of the server on this machine needs no key.
        here = {"KDPO_API__PORT": str(service.port), "KDPO_DATA_DIR": str(tmp_path / "data")}
        listed = kdpo(tmp_path, "jobs", "list", "--json", **here)
        assert listed.returncode == 0, listed.stderr
        assert job_id in {job["id"] for job in json.loads(listed.stdout)}


def test_one_command_without_a_server(tmp_path: Path, small_dataset: Path) -> None:
    """Nothing runs and nothing is set: the command brings its server, and takes it away."""
    environment = {"KDPO_API__PORT": "1", "KDPO_TRAINING__NUM_THREADS": "1"}
    done = kdpo(tmp_path, "recommend", small_dataset.name, "--model", TINY, **environment)
    assert done.returncode == 0, done.stderr
    assert "×" in done.stdout
    assert "rank" in done.stdout
    dataset = next(word for word in done.stdout.split() if word.startswith("ds_")).rstrip(";")
    again = kdpo(
        tmp_path, "recommend", dataset, "--model", TINY, "--json", "--local", **environment
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["dataset_id"] == dataset
    listed = kdpo(tmp_path, "jobs", "list", "--kind", "recommendation", "--json", **environment)
    assert [job["status"] for job in json.loads(listed.stdout)] == ["succeeded"] * 2
    keys = kdpo(tmp_path, "keys", "list", "--json", **environment)
    assert json.loads(keys.stdout) == []
    assert "dk-live-" not in (tmp_path / "kdpo-data" / "local-server.log").read_text()


def test_an_interrupted_command_leaves_a_job_that_goes_on(
    tmp_path: Path, small_dataset: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if name[:5] != "KDPO_"}
    environment = {
        "KDPO_API__PORT": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "KDPO_TRAINING__NUM_THREADS": "1",
    }  # fmt: skip
    with (tmp_path / "stderr").open("wb") as log:
        command = subprocess.Popen(
            [
                sys.executable, "-m", "app", "tune", small_dataset.name, "--model", TINY,
                "--method", "dpo", "--set", "max_steps=40", "--set", "batch_size=4",
            ],
            cwd=tmp_path, env={**kept, **environment}, stdout=log, stderr=log,
            # As from a terminal: what a shell runs with `&` begins with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    said = tmp_path / "stderr"
    wait_for("the job to run", lambda: "fine-tuning: running" in said.read_text(), timeout_s=120)
    below = descendants(command.pid)
    assert any("serve" in line for line in below.values())
    command.send_signal(signal.SIGINT)
    assert command.wait(90) == 130, said.read_text()
    wait_for("its processes to end", lambda: not set(below) & set(descendants(os.getpid())))
    job = next(word for word in said.read_text().split() if word.startswith("ftjob-"))
    watched = kdpo(tmp_path, "watch", job, **environment)
    assert watched.returncode == 0, watched.stderr
    assert f"{job} has succeeded" in watched.stdout
