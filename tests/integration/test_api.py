"""Every route: who may call it, what errors look like, and what the document says."""

import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from app.errors import PROBLEM_TYPE
from app.key_ring import KEPT_S
from app.keys import Scope, hash_key
from app.main import create_app
from core.lifecycle import JobKind
from core.queue import QueueName
from core.settings import Settings
from models.repositories.jobs import JobRepository
from models.repositories.owners import OwnerRepository
from models.repositories.workers import WorkerRepository
from tests.integration.api_world import MODEL, World, pairs, running_api


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared(_sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One API for all tests of this file that change nothing."""
    folder = tmp_path_factory.mktemp("shared")
    file = folder / "kdpo.db"
    file.write_bytes(_sqlite_template.read_bytes())
    with running_api(f"sqlite:///{file}", folder) as made:
        yield made


@pytest.fixture
def no_auth_world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path, auth={"required": False}) as made:
        made.client.headers["Host"] = "127.0.0.1:8321"
        yield made


# A signed link is its own key.
LINKS = "/v1/downloads/"


def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def operations(app: FastAPI) -> list[tuple[str, str]]:
    found = [
        (method.upper(), path)
        for path, methods in document(app)["paths"].items()
        for method in methods
        if path.startswith("/v1")
    ]
    assert len(found) > 25
    return found


def check_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    """Assert the one error body (RFC 9457 with OpenAI's member) and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM_TYPE
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["type"].endswith(f"/problems/{code}")
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["instance"] == f"/requests/{body['request_id']}"
    assert body["title"]
    assert isinstance(body["retryable"], bool)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == body["detail"]
    assert error["code"] == code
    return body


# ------------------------------------------------------------------- callers


def test_every_route_needs_a_key(shared: World) -> None:
    for method, path in operations(shared.app):
        if path.startswith(LINKS):
            continue
        url = re.sub(r"\{\w+\}", "x", path)
        for headers in ({}, {"Authorization": "Bearer dk-live-unknown"}, {"Authorization": "x"}):
            answer = shared.client.request(method, url, headers=headers)
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                check_problem(answer, 401, answer.json()["code"])


def test_every_route_needs_a_scope(shared: World) -> None:
    secret = shared.key("ada", scopes=())
    open_to_all = set()
    for method, path in operations(shared.app):
        if path.startswith(LINKS):
            continue
        url = re.sub(r"\{\w+\}", "x", path)
        answer = shared.client.request(method, url, headers={"Authorization": f"Bearer {secret}"})
        if answer.status_code == 403:
            continue
        assert method == "GET", path
        open_to_all.add(path)
    # What the server can do, and what a caller is and has used.
    catalog = {
        f"/v1/{name}s{rest}" for name in ("kernel", "divergence") for rest in ("", "/{name}")
    }
    own = {"/v1/me", "/v1/usage", "/v1/quotas"}
    assert open_to_all == {"/v1/capabilities", *catalog, *own}


@pytest.mark.parametrize(
    ("scope", "allowed", "refused"),
    [
        (Scope.DATASETS_READ, "/v1/datasets", "/v1/jobs"),
        (Scope.JOBS_READ, "/v1/jobs", "/v1/checkpoints"),
        (Scope.ARTIFACTS_READ, "/v1/checkpoints", "/v1/datasets"),
    ],
)
def test_scopes_open_their_own_routes_only(
    shared: World, scope: Scope, allowed: str, refused: str
) -> None:
    headers = {"Authorization": f"Bearer {shared.key('ada', scopes=(scope,))}"}
    assert shared.client.get(allowed, headers=headers).status_code == 200
    body = check_problem(shared.client.get(refused, headers=headers), 403, "missing_scope")
    assert body["error"]["type"] == "permission_error"


def test_read_scope_does_not_write(shared: World) -> None:
    headers = {"Authorization": f"Bearer {shared.key('ada', scopes=(Scope.DATASETS_READ,))}"}
    answer = shared.client.post("/v1/datasets", headers=headers, files={"file": pairs(3)})
    check_problem(answer, 403, "missing_scope")


def test_revoked_and_expired_keys_are_useless(world: World) -> None:
    secret = world.key("ada")
    headers = {"Authorization": f"Bearer {secret}"}
    assert world.client.get("/v1/jobs", headers=headers).status_code == 200
    with world.database.transaction() as session:
        key = OwnerRepository(session).find_usable_key(hash_key(secret))
        assert key is not None
        assert key.last_used_at is not None
        key.expires_at = 1.0  # as another process does, which is seen within a second
    time.sleep(KEPT_S)
    assert world.client.get("/v1/jobs", headers=headers).status_code == 401


def test_other_owners_ids_in_bodies_and_filters_do_not_exist(world: World) -> None:
    dataset = world.dataset()
    made = world.train(world.training_job(dataset)["id"])
    bob = world.headers("bob")
    for url in ("/v1/fine_tuning/jobs", "/v1/recommendations"):
        answer = world.client.post(url, json={"model": MODEL, "dataset_id": dataset}, headers=bob)
        check_problem(answer, 404, "not_found")
    for url in ("/v1/datasets", "/v1/jobs", "/v1/checkpoints", "/v1/fine_tuning/jobs"):
        assert world.client.get(url, headers=bob).json()["data"] == []
    job = world.get(f"/v1/checkpoints/{made['checkpoint']}").json()["job_id"]
    assert world.client.get(f"/v1/checkpoints?job_id={job}", headers=bob).json()["data"] == []
    assert len(world.get(f"/v1/checkpoints?job_id={job}").json()["data"]) == 1


def test_without_auth_everything_belongs_to_the_default_owner(no_auth_world: World) -> None:
    answer = no_auth_world.client.get("/v1/jobs")
    assert answer.status_code == 200
    assert answer.json()["data"] == []


# -------------------------------------------------------------------- errors


def test_unknown_path_and_method(shared: World) -> None:
    check_problem(shared.client.get("/v1/nothing"), 404, "not_found")
    answer = shared.client.put("/v1/jobs", headers=shared.headers())
    check_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize("path", ["/v1/recommendations", "/v1/fine_tuning/jobs"])
def test_malformed_bodies(shared: World, path: str) -> None:
    json_type = {"content-type": "application/json"}
    check_problem(shared.post(path, content=b"{", headers=json_type), 400, "malformed_request")
    check_problem(shared.post(path, content=b"\xff", headers=json_type), 400, "malformed_request")
    check_problem(shared.post(path, json=[1]), 422, "invalid_input")
    if path == "/v1/recommendations":  # which takes JSON and forms: it must be told
        check_problem(shared.post(path), 415, "unsupported_media_type")
    else:
        check_problem(shared.post(path), 422, "invalid_input")
    plain = shared.post(path, content=b"{}", headers={"content-type": "text/plain"})
    check_problem(plain, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"beat": 1}, "/beat", "not permitted"),
        ({"seed": -1}, "/seed", "greater than or equal"),
        ({"model": ""}, "/model", "at least 1"),
        ({"metadata": {"a": 1}}, "/metadata/a", "string"),
        ({"method": {"type": "ppo"}}, "/method", "'dpo', 'kernel_dpo', 'auto'"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beat": 1}}}},
            "/method/dpo/hyperparameters/beat",
            "not permitted",
        ),
        (
            {
                "method": {
                    "type": "kernel_dpo",
                    "kernel_dpo": {"kernel": "rbf", "hyperparameters": {"gamma": -0.1}},
                }
            },
            "/method/kernel_dpo/hyperparameters/gamma",
            "greater than 0",
        ),
        (
            {"method": {"type": "kernel_dpo", "kernel_dpo": {"kernel": {"type": "rbf", "w": 1}}}},
            "/method/kernel_dpo/kernel/w",
            "not permitted",
        ),
        (
            {"method": {"type": "kernel_dpo", "kernel_dpo": {}}},
            "/method/kernel_dpo",
            "name a kernel",
        ),
        (
            {
                "method": {
                    "type": "kernel_dpo",
                    "kernel_dpo": {"kernel": "rbf", "divergence_mode": "link"},
                }
            },
            "/method/kernel_dpo",
            "acts on a divergence",
        ),
        (
            {
                "method": {
                    "type": "kernel_dpo",
                    "kernel_dpo": {"divergence": "wasserstein", "divergence_mode": "link"},
                }
            },
            "/method/kernel_dpo",
            "no link form",
        ),
    ],
)
def test_invalid_fields_are_named(
    shared: World, body: dict[str, Any], pointer: str, says: str
) -> None:
    answer = shared.post(
        "/v1/fine_tuning/jobs", json={"model": MODEL, "dataset_id": "ds_x", **body}
    )
    problem = check_problem(answer, 422, "invalid_input")
    assert problem["errors"][0]["pointer"] == pointer
    assert says in problem["errors"][0]["detail"]
    assert problem["error"]["type"] == "invalid_request_error"
    assert problem["error"]["param"] == pointer.split("/")[1]


def test_strange_ids_are_refused_and_never_an_error_of_ours(shared: World) -> None:
    for text in ("%00", "a%00b", "%F0%9F%98%80", "x" * 300, "%20", "'--"):
        for method, path in operations(shared.app):
            if "{" in path:
                url = re.sub(r"\{\w+\}", text, path)
                answer = shared.client.request(method, url, headers=shared.headers())
                assert answer.status_code in (404, 422), (method, url)
        for query in ("after", "before", "dataset_id", "model"):
            assert shared.get(f"/v1/jobs?{query}={text}").status_code in (200, 422)
    assert shared.get("/v1/jobs?model=a%00b").status_code == 422


def test_texts_that_no_database_stores(shared: World) -> None:
    body = {"model": MODEL, "dataset_id": "ds_x", "metadata": {"a": "b\0"}}
    problem = check_problem(shared.post("/v1/recommendations", json=body), 422, "invalid_input")
    assert problem["errors"][0]["pointer"] == "/metadata/a"


def test_unknown_query_parameters_are_refused_everywhere(shared: World) -> None:
    for method, path in operations(shared.app):
        url = re.sub(r"\{\w+\}", "x", path)
        answer = shared.client.request(method, f"{url}?beat=1", headers=shared.headers())
        assert answer.status_code == 422, (method, path)
    problem = check_problem(shared.get("/v1/jobs?beat=1"), 422, "unknown_parameter")
    assert problem["error"]["param"] == "beat"


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "kind=x"])
def test_bad_query_values(shared: World, query: str) -> None:
    problem = check_problem(shared.get(f"/v1/jobs?{query}"), 422, "invalid_input")
    assert problem["error"]["param"] == query.partition("=")[0]


def test_large_bodies_are_refused_by_length_and_by_counting(
    sqlite_url: str, tmp_path: Path
) -> None:
    with running_api(sqlite_url, tmp_path, api={"max_body_bytes": 100}) as world:
        told = world.post("/v1/recommendations", json={"model": "x" * 200})
        check_problem(told, 413, "too_large")
        chunked = world.post(
            "/v1/recommendations",
            content=iter([b'{"model": "', b"x" * 200, b'"}']),
            headers={"content-type": "application/json"},
        )
        assert "content-length" not in chunked.request.headers
        check_problem(chunked, 413, "too_large")
        assert world.post("/v1/recommendations", json={}).status_code == 422


def test_unexpected_errors_have_the_same_body(world: World) -> None:
    with world.database.transaction() as session:
        owner = OwnerRepository(session).ensure("ada").id
        broken = JobRepository(session).create(owner_id=owner, kind=JobKind.TRAINING, spec={})
    answer = world.get(f"/v1/fine_tuning/jobs/{broken.id}")
    problem = check_problem(answer, 500, "internal")
    assert problem["error"]["type"] == "server_error"
    assert "method" not in problem["detail"]


def test_dead_database_is_503_with_retry_after(world: World) -> None:
    headers = world.headers()
    world.app.state.database = type(world.database)(
        "postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=1"
    )
    answer = world.client.get("/v1/jobs", headers=headers)
    problem = check_problem(answer, 503, "unavailable")
    assert problem["retryable"] is True
    assert problem["error"]["type"] == "server_error"
    assert answer.headers["retry-after"] == "5"
    world.app.state.database.dispose()


def test_conflict_tells_openai_clients_not_to_retry(world: World) -> None:
    dataset = world.upload().json()["id"]
    answer = world.post("/v1/recommendations", json={"model": MODEL, "dataset_id": dataset})
    check_problem(answer, 409, "dataset_not_ready")
    assert answer.headers["x-should-retry"] == "false"


def test_broken_broker_does_not_fail_requests(world: World) -> None:
    blocked = world.settings.broker_dir
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where the folder should be")
    answer = world.upload()
    assert answer.status_code == 202
    ready = world.client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["broker"]["ok"] is False
    blocked.unlink()


# ------------------------------------------------------------ pages and lists


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_pages_give_every_object_once(world: World, order: str) -> None:
    dataset = world.dataset()
    made = [world.training_job(dataset, seed=n)["id"] for n in range(5)]
    seen: list[str] = []
    url = f"/v1/fine_tuning/jobs?limit=2&order={order}"
    for _ in range(10):
        page = world.get(url).json()
        assert page["object"] == "list"
        assert page["first_id"] == page["data"][0]["id"]
        assert page["last_id"] == page["data"][-1]["id"]
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        url = f"/v1/fine_tuning/jobs?limit=2&order={order}&after={page['last_id']}"
    assert seen == sorted(made, reverse=order == "desc")
    before = world.get(f"/v1/fine_tuning/jobs?limit=2&order={order}&before={seen[3]}").json()
    assert [job["id"] for job in before["data"]] == seen[1:3]


def test_filters(world: World) -> None:
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    assert [j["id"] for j in world.get("/v1/jobs?kind=training").json()["data"]] == [job]
    assert [j["id"] for j in world.get("/v1/jobs?status=queued").json()["data"]] == [job]
    assert len(world.get(f"/v1/jobs?dataset_id={dataset}").json()["data"]) == 2
    assert world.get("/v1/fine_tuning/jobs?model=other").json()["data"] == []
    assert world.get("/v1/jobs?kind=export").json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


# -------------------------------------------------------- health and document


def test_health_needs_no_key(world: World) -> None:
    assert world.client.get("/healthz").json() == {"status": "ok"}
    assert world.client.get("/version").json()["name"] == "kdpo"
    unready = world.client.get("/readyz")
    assert unready.status_code == 503
    assert unready.json()["workers"]["ok"] is False
    with world.database.transaction() as session:
        WorkerRepository(session).beat(
            "wrk_1", host="here", pid=1, version="0", queues=list(QueueName), draining=False
        )
    ready = world.client.get("/readyz")
    assert ready.status_code == 200, ready.text
    assert ready.json()["live_workers"] == 1


def test_upload_wakes_the_queue_through_the_broker(world: World) -> None:
    world.upload()
    messages = [
        json.loads(file.read_bytes()) for file in (world.settings.broker_dir / "messages").iterdir()
    ]
    assert [m["headers"]["task"] for m in messages] == ["kdpo.wake"]
    assert messages[0]["properties"]["delivery_info"]["routing_key"] == QueueName.CPU
    with world.database.transaction():
        assert world.claim(JobKind.DATASET).attempt == 1


def test_access_log_has_the_request_and_no_key(
    shared: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="kdpo.access"):
        answer = shared.get("/v1/jobs?limit=1")
    record = next(r for r in caplog.records if r.name == "kdpo.access")
    fields = vars(record)["kdpo"]
    assert fields["request_id"] == answer.headers["x-request-id"]
    assert fields["path"] == "/v1/jobs"
    assert fields["status"] == 200
    assert shared.keys["ada"] not in str(fields)


def test_document_describes_problems_and_nothing_else(tmp_path: Path) -> None:
    schema = document(create_app(Settings(data_dir=tmp_path / "data")))
    assert "HTTPValidationError" not in json.dumps(schema)
    names = [op["operationId"] for path in schema["paths"].values() for op in path.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", name) for name in names)
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if path.startswith("/v1"):
                content = operation["responses"]["4XX"]["content"][PROBLEM_TYPE]
                assert content["schema"]["$ref"].endswith("/Problem"), (method, path)
                asks = [] if path.startswith(LINKS) else [{"HTTPBearer": []}]
                assert operation.get("security", []) == asks
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(schema)))
    assert references <= set(schema["components"]["schemas"])
    assert not list(tmp_path.iterdir()), "making the application wrote files"


def test_bodies_have_examples_that_are_valid(tmp_path: Path) -> None:
    from app.checkpoints import CreateExport
    from app.fine_tuning import CreateFineTuningJob
    from app.recommendations import AcceptRecommendation, CreateRecommendation

    for model in (
        AcceptRecommendation, CreateExport, CreateFineTuningJob, CreateRecommendation,
    ):  # fmt: skip
        examples = model.model_json_schema()["examples"]
        assert examples
        for example in examples:
            model.model_validate(example)
