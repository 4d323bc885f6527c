"""Bad input: a 4xx with a clear problem, nothing else is lost, and the service goes on."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.service import EXAMPLES, Service, upload

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service.embedded(tmp_path_factory.mktemp("bad")) as service:
        yield service


@pytest.fixture(scope="module")
def dataset_id(running: Service) -> str:
    with running.client() as client:
        return str(upload(client, EXAMPLES / "data/hh-harmless-raw-50.jsonl")["id"])


def pairs(count: int) -> bytes:
    return b"".join(
        json.dumps({**GOOD, "prompt": f"Why {i}?"}).encode() + b"\n" for i in range(count)
    )


def assert_problem(answer: httpx.Response) -> dict[str, Any]:
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == answer.status_code
    assert body["detail"]
    assert body["code"]
    assert body["request_id"].startswith("req_")
    assert body["error"]["message"]
    assert body["error"]["code"] == body["code"]
    return body


FILES = {
    "not_json": b"this is not json\n" * 20,
    "wrong_fields": b'{"question": "a", "answer": "b"}\n' * 20,
    "empty": b"",
    "one_pair": pairs(1),
    "line_of_10_mb": b'{"prompt": "' + b"x" * 10_000_000 + b'"}\n',
    "invalid_utf8": b'{"prompt": "\xff\xfe\xfa", "chosen": "a", "rejected": "b"}\n' * 20,
    "gzip_bomb": gzip.compress(b"\0" * 300_000_000, 9),
    "truncated_gzip": gzip.compress(pairs(500))[:-40],
    "utf16": pairs(20).decode().encode("utf-16"),
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "json_array": json.dumps([GOOD] * 20).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_refused_with_reasons(running: Service, name: str) -> None:
    with running.client() as client:
        answer = client.post(
            "/v1/datasets",
            files={"file": (f"{name}.jsonl", FILES[name])},
            headers={"Prefer": "wait=60"},
        )
        body = assert_problem(answer)
        assert body["hint"] or body["errors"]


def test_one_bad_line_is_rejected_and_the_rest_kept(running: Service) -> None:
    content = pairs(200) + b'{"prompt": "' + b"y" * 10_000_000 + b'"}\n' + pairs(0)
    with running.client() as client:
        answer = client.post(
            "/v1/datasets", files={"file": ("a.jsonl", content)}, headers={"Prefer": "wait=60"}
        )
        assert answer.status_code == 200, answer.text
        report = client.get(f"/v1/datasets/{answer.json()['id']}/report").json()
        assert report["counts"]["pairs"] == 200
        error = next(e for e in report["errors"] if e["code"] == "line_too_long")
        assert error["count"] == 1
        assert error["examples"][0]["line"] == 201


def pickle_model(folder: Path) -> str:
    shutil.copytree(EXAMPLES / "models/tiny-lm", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return str(folder)


def test_bad_models(running: Service, dataset_id: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(EXAMPLES / "models/tiny-lm", broken)
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    models = {
        "no-such-model": "model_not_found",
        pickle_model(tmp_path / "pickle"): "model_not_safetensors",
        str(broken): "model_damaged",
        "some-org/some-model": "model_unreachable",
        "../../etc/passwd": "model_not_found",
    }
    with running.client() as client:
        for model, code in models.items():
            for path in ("/v1/recommendations", "/v1/fine_tuning/jobs"):
                answer = client.post(path, json={"dataset_id": dataset_id, "model": model})
                assert assert_problem(answer)["code"] == code, model


BAD_METHODS = [
    {"type": "ppo"},
    {"type": "dpo", "dpo": {"hyperparameters": {"beat": 0.1}}},
    {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}},
    {
        "type": "kernel_dpo",
        "kernel_dpo": {"kernel": "rbf", "hyperparameters": {"gamma": -0.1}},
    },
    {
        "type": "kernel_dpo",
        "kernel_dpo": {"divergence": "kl", "hyperparameters": {"gamma": 0.1}},
    },
    {
        "type": "kernel_dpo",
        "kernel_dpo": {"divergence": "wasserstein", "divergence_mode": "link"},
    },
    {"type": "kernel_dpo", "kernel_dpo": {"kernel": "laplace"}},
    {"type": "auto", "auto": {"search": {"max_trials": 0}}},
]


@pytest.mark.parametrize("method", BAD_METHODS, ids=str)
def test_bad_method(running: Service, dataset_id: str, method: dict[str, Any]) -> None:
    with running.client() as client:
        answer = client.post(
            "/v1/fine_tuning/jobs",
            json={"dataset_id": dataset_id, "model": "tiny-lm", "method": method},
        )
        body = assert_problem(answer)
        assert any(e["pointer"].startswith("/method") for e in body["errors"])


def test_the_service_goes_on(running: Service) -> None:
    with running.client() as client:
        assert client.get("/readyz").status_code == 200
        listed = client.get("/v1/datasets?limit=100").json()["data"]
        upload(client, EXAMPLES / "data/hh-harmless-raw-50.jsonl")
        assert len(client.get("/v1/datasets?limit=100").json()["data"]) == len(listed) + 1
