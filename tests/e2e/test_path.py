"""From a file to an aligned checkpoint over HTTP, on both setups."""

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.service import EXAMPLES, Service, finished_job, upload, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

AUTO = {
    "type": "auto",
    "auto": {
        "search": {"max_trials": 3},
        "hyperparameters": {"n_epochs": 1, "batch_size": 16},
    },
}


def create(client: httpx.Client, dataset_id: str, method: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(
        "/v1/fine_tuning/jobs",
        json={"model": "tiny-lm", "dataset_id": dataset_id, "seed": 5, "method": method},
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def download(client: httpx.Client, checkpoint_id: str, target: Path) -> dict[str, str]:
    """Download all files of a checkpoint, verified, and return path -> sha256."""
    hashes = {}
    for entry in client.get(f"/v1/checkpoints/{checkpoint_id}/files").json()["data"]:
        url = f"/v1/checkpoints/{checkpoint_id}/files/{entry['path']}"
        first = client.get(url, headers={"Range": "bytes=0-99"})
        rest = client.get(url, headers={"Range": "bytes=100-"}) if entry["bytes"] > 100 else None
        assert first.status_code == 206
        content = first.content + (rest.content if rest is not None else b"")
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert first.headers["etag"] == f'"sha256:{entry["sha256"]}"'
        path = target / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        hashes[entry["path"]] = entry["sha256"]
    return hashes


def answer_of(model: torch.nn.Module, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def check_search(client: httpx.Client, result: dict[str, Any], file: Path) -> None:
    """The search's own pages agree with the result of its job."""
    found = result["search"]
    url = f"/v1/studies/{found['study_id']}"
    best = client.get(f"{url}/best").json()
    assert (best["provisional"], best["sentence"]) == (False, found["sentence"])
    assert best["best"]["number"] == found["winner_trial"]
    assert [trial["number"] for trial in best["tied"]] == found["tied_trials"]
    assert best["baseline"]["label"] == "dpo"
    assert best["final"] == result["comparison"]
    winner = client.get(f"{url}/trials/{found['winner_trial']}").json()
    assert len(client.get(winner["metrics_url"]).json()["data"]) == winner["metrics"]["steps"]
    pareto = client.get(f"{url}/pareto").json()
    assert {best["best"]["number"]} | set(pareto["front"]) <= {p["number"] for p in pareto["data"]}
    importance = client.get(f"{url}/importance").json()
    assert (importance["data"], importance["trials"]) == ([], found["trials"])
    assert len(client.get(f"{url}/export").text.splitlines()) == 1 + found["trials"]
    file.write_bytes(client.get(f"{url}/export?format=optuna").content)
    storage = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.load_study(study_name=found["study_id"], storage=storage)
    assert study.best_value == min(t["log_loss"] for t in pareto["data"] if t["feasible"])


def check_files(folder: Path, hashes: dict[str, str]) -> None:
    """A downloaded checkpoint is what its manifest says, and nothing in it is a pickle."""
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {f["path"]: f["sha256"] for f in manifest["files"]}
    assert listed.items() <= hashes.items()
    assert not [p for p in hashes if p.endswith((".bin", ".pt", ".pkl"))]


def test_from_file_to_checkpoint(service: Service, small_dataset: Path, tmp_path: Path) -> None:
    with service, service.client() as client:
        dataset = upload(client, small_dataset)
        report = client.get(f"/v1/datasets/{dataset['id']}/report").json()
        assert report["counts"]["pairs"] == 100

        recommended = client.post(
            "/v1/recommendations",
            json={"dataset_id": dataset["id"], "model": "tiny-lm"},
            headers={"Prefer": "wait=100"},
        )
        assert recommended.status_code == 200, recommended.text
        ranking = recommended.json()["ranking"]
        pairs = {(row["kernel"], row["divergence"]) for row in ranking}
        assert len(pairs) == len(ranking) == 35  # 28 pairs and HMK with every divergence
        for row in ranking:
            assert row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"]
            assert row["reason"]

        job = finished_job(service, create(client, dataset["id"], AUTO)["id"])
        assert job["status"] == "succeeded", job["error"]
        assert [s["status"] for s in job["steps"]] == ["succeeded"] * len(job["steps"])

        events = client.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100&order=asc").json()[
            "data"
        ]
        assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
        assert events[-1]["type"] == "done"

        result = job["result"]
        trials = client.get(f"/v1/studies/{result['search']['study_id']}/trials").json()["data"]
        first = next(t for t in trials if t["number"] == 0)
        assert first["candidate"]["objective"]["kernel_term"] is None  # plain DPO is trial 0
        assert first["origin"] == "baseline"
        check_search(client, result, tmp_path / "study.log")
        difference = result["comparison"]["log_loss"]
        if difference["low"] <= 0 <= difference["high"]:
            assert result["comparison"]["verdict"] in (
                "no significant difference",
                "same objective",
            )

        checkpoints = client.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints").json()["data"]
        own_baseline = result["comparison"]["verdict"] != "same objective"
        labels = {"final", "baseline"} if own_baseline else {"final"}
        assert {c["label"] for c in checkpoints} == labels
        final = next(c for c in checkpoints if c["label"] == "final")
        check_files(tmp_path / "adapter", download(client, final["id"], tmp_path / "adapter"))

        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(
            EXAMPLES / "models/tiny-lm", dtype=torch.float32
        )
        aligned = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        sample = result["samples"][0]
        assert answer_of(aligned, tokenizer, sample["prompt"]) == sample["aligned"]

        export = client.post(f"/v1/checkpoints/{final['id']}/export", json={"merge": True})
        assert export.status_code == 202, export.text

        def merged() -> dict[str, Any] | None:
            rows = client.get(f"/v1/checkpoints?job_id={export.json()['id']}").json()["data"]
            return rows[0] if rows else None

        download(client, wait_for("the merged model", merged)["id"], tmp_path / "merged")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert answer_of(whole.eval(), tokenizer, sample["prompt"]) == sample["aligned"]


def test_named_pair_and_plain_dpo(small_dataset: Path, tmp_path: Path) -> None:
    with Service.embedded(tmp_path) as service, service.client() as client:
        dataset = upload(client, small_dataset)
        short = {"max_steps": 2, "batch_size": 4}
        named = {"kernel": "hmk", "divergence": "jensen_shannon", "hyperparameters": short}
        pair = create(client, dataset["id"], {"type": "kernel_dpo", "kernel_dpo": named})
        plain = create(client, dataset["id"], {"type": "dpo", "dpo": {"hyperparameters": short}})
        done = finished_job(service, pair["id"])
        assert done["status"] == "succeeded", done["error"]
        weights = done["result"]["run"]["mixture_weights"]
        assert weights is not None
        assert all(0.0 < value < 1.0 for value in weights.values())
        done = finished_job(service, plain["id"])
        assert done["status"] == "succeeded", done["error"]
        assert done["result"]["comparison"]["verdict"] == "same objective"
