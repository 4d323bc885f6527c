"""A file in, a recommendation out: one request to a service with real workers."""

import hashlib
from pathlib import Path

import pytest

from tests.e2e.service import Service

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_one_request_from_a_file_to_a_recommendation(tmp_path: Path, small_dataset: Path) -> None:
    data = small_dataset.read_bytes()
    with Service.embedded(tmp_path) as service, service.client() as client:
        answer = client.post(
            "/v1/recommendations",
            files={"file": ("prefs.jsonl", data)},
            data={"model": "tiny-lm", "seed": "3"},
            headers={"Prefer": "wait=100"},
        )
        assert answer.status_code == 200, answer.text
        view = answer.json()
        assert (view["status"], view["provisional"]) == ("succeeded", False)
        assert view["recommendation"]["kernel"] == view["ranking"][0]["kernel"]
        dataset = client.get(f"/v1/datasets/{view['dataset_id']}").json()
        assert dataset["sha256"] == hashlib.sha256(data).hexdigest()
        table = client.get(f"/v1/datasets/{dataset['id']}/rows?format=parquet")
        again = client.post(
            "/v1/datasets", files={"file": table.content}, headers={"Prefer": "wait=60"}
        )
        assert again.status_code == 200, again.text
        both = [
            client.get(f"/v1/datasets/{one}/rows", params={"limit": 100}).json()["data"]
            for one in (dataset["id"], again.json()["id"])
        ]
        assert [row["row"]["id"] for row in both[0]] == [row["row"]["id"] for row in both[1]]
        refused = client.post(
            "/v1/recommendations",
            files={"file": ("bad.jsonl", b"not json\n" * 20)},
            data={"model": "tiny-lm"},
            headers={"Prefer": "wait=60"},
        )
        assert (refused.status_code, refused.json()["code"]) == (422, "dataset_invalid")
