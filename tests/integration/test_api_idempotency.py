"""`Idempotency-Key`, and the retries of clients that send none."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from app.exchange_bodies import BodyHash
from core.errors import Unavailable
from models.maintenance import Maintenance
from models.replay import Replay
from models.repositories.replays import KEPT_S, ReplayRepository
from models.session import Database
from models.types import db_now
from tests.integration.api_world import MODEL, World, pairs, running_api
from tests.integration.test_api import check_problem

URL = "/v1/fine_tuning/jobs"


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def jobs(world: World) -> list[str]:
    return [job["id"] for job in world.get("/v1/fine_tuning/jobs?limit=100").json()["data"]]


def create(world: World, dataset: str, key: str | None = None, **more: Any) -> Any:
    headers = more.pop("headers", {})
    if key is not None:
        headers = {"Idempotency-Key": key, **headers}
    return world.post(URL, json={"model": MODEL, "dataset_id": dataset, **more}, headers=headers)


def test_the_second_request_gets_the_first_answer(database_url: str, tmp_path: Path) -> None:
    with running_api(database_url, tmp_path) as world:
        dataset = world.dataset()
        first = create(world, dataset, "a-1")
        again = create(world, dataset, "a-1")
        assert first.status_code == again.status_code == 200
        assert again.content == first.content
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert create(world, dataset, "a-2").json()["id"] != first.json()["id"]
        assert len(jobs(world)) == 2


def test_another_body_is_refused(world: World) -> None:
    dataset = world.dataset()
    create(world, dataset, "a-1")
    answer = create(world, dataset, "a-1", seed=3)
    problem = check_problem(answer, 422, "idempotency_key_reused")
    assert problem["error"]["param"] == "idempotency-key"
    other = world.post(f"{URL}?", json={"model": MODEL, "dataset_id": dataset})
    assert other.status_code == 200


def test_a_key_is_of_one_caller_method_and_path(world: World) -> None:
    dataset, bobs = world.dataset(), world.dataset("bob")
    mine = create(world, dataset, "a-1").json()["id"]
    body = {"model": MODEL, "dataset_id": bobs}
    key = {"Idempotency-Key": "a-1"}
    theirs = world.client.post(URL, json=body, headers={**world.headers("bob"), **key})
    assert theirs.json()["id"] != mine
    elsewhere = world.post(f"{URL}/{mine}/cancel", headers=key)
    assert elsewhere.json()["status"] == "cancelled"
    unknown = world.client.post(URL, json=body, headers={"Authorization": "Bearer dk-x", **key})
    check_problem(unknown, 401, "invalid_api_key")


def test_an_error_leaves_the_key_free(world: World) -> None:
    dataset = world.dataset()
    check_problem(create(world, dataset, "a-1", model="nothing"), 422, "model_not_found")
    made = create(world, dataset, "a-1")
    assert made.status_code == 200
    assert "idempotency-replayed" not in made.headers
    for key in ("", "two words", "x" * 201, "é"):
        check_problem(create(world, dataset, key.encode()), 400, "malformed_request")  # type: ignore[arg-type]


def test_a_request_that_runs_is_not_begun_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = world.dataset()
    entered, leave = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        entered.set()
        assert leave.wait(20)

    monkeypatch.setattr("app.fine_tuning.relay_now", slow)
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(create(world, dataset, "a-1")))
    first.start()
    assert entered.wait(20)
    meanwhile = create(world, dataset, "a-1")
    check_problem(meanwhile, 409, "request_in_progress")
    assert meanwhile.headers["retry-after"] == "1"
    assert meanwhile.headers["x-should-retry"] == "true"
    leave.set()
    first.join()
    assert create(world, dataset, "a-1").json() == answers[0].json()
    assert len(jobs(world)) == 1


def test_a_job_is_found_though_its_answer_was_never_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between the commit and the answer, as by SIGKILL."""
    dataset = world.dataset()

    def die(*_: object) -> None:
        raise SystemError("the process is gone")

    monkeypatch.setattr("app.fine_tuning.relay_now", die)
    assert create(world, dataset, "a-1").status_code == 500
    monkeypatch.undo()
    found = create(world, dataset, "a-1")
    assert found.status_code == 200
    assert found.headers["idempotency-replayed"] == "true"
    assert [found.json()["id"]] == jobs(world)
    assert found.json()["object"] == "fine_tuning.job"


def test_a_dead_process_holds_a_key_only_as_long_as_its_lease(world: World) -> None:
    dataset = world.dataset()
    create(world, dataset, "a-1")
    died = {"status": None, "body": None, "job_id": None}
    for running_until, expected in ((db_now() + 5, 409), (db_now() - 1, 200)):
        with world.database.transaction() as session:
            session.execute(update(Replay).values(running_until=running_until, **died))
        assert create(world, dataset, "a-1").status_code == expected
    assert len(jobs(world)) == 2


def test_uploads_are_done_once_too(world: World) -> None:
    key = {"Idempotency-Key": "up-1"}

    def send(data: bytes) -> Any:
        return world.post("/v1/datasets", files={"file": ("a.jsonl", data)}, headers={
            **key, "Prefer": "wait=0"
        })  # fmt: skip

    first = send(pairs(30))
    assert first.status_code == 202
    again = send(pairs(30))
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    check_problem(send(pairs(31)), 422, "idempotency_key_reused")
    assert len(world.get("/v1/datasets").json()["data"]) == 1
    files = [path for path in world.settings.upload_dir.iterdir() if path.is_file()]
    assert len(files) == 1


def test_a_body_too_large_says_so(world: World) -> None:
    answer = world.post(
        URL, content=b" " * (world.settings.api.max_body_bytes + 1),
        headers={"Idempotency-Key": "a", "Content-Type": "application/json"},
    )  # fmt: skip
    check_problem(answer, 413, "too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(3):
            yield b" " * world.settings.api.max_body_bytes

    retried = {"x-stainless-retry-count": "1", "Content-Type": "application/json"}
    check_problem(world.post(URL, content=chunks(), headers=retried), 413, "too_large")


def test_what_is_shown_once_is_not_kept(sqlite_url: str, tmp_path: Path) -> None:
    webhooks = {"hosts": ("hooks.example.com",)}
    with running_api(sqlite_url, tmp_path, webhooks=webhooks) as world:
        key = {"name": "k", "owner": "ada", "scopes": ["jobs:read"]}
        hook = world.post("/v1/webhooks", json={"url": "https://hooks.example.com/"}).json()
        rotated = f"/v1/webhooks/{hook['id']}/rotate_secret"
        for path, body in (
            ("/v1/api_keys", key),
            ("/v1/webhooks", {"url": "https://hooks.example.com/a"}),
            (rotated, {}),
        ):
            made = world.post(path, json=body, headers={"Idempotency-Key": "a-1"})
            assert made.headers["cache-control"] == "no-store", path
            with world.database.reading() as session:
                kept = session.execute(select(Replay).where(Replay.path == path)).scalar_one()
            assert kept.body is None
            again = world.post(path, json=body, headers={"Idempotency-Key": "a-1"})
            check_problem(again, 409, "answer_not_kept")
        assert len(world.get("/v1/webhooks").json()["data"]) == 2


def test_a_link_to_a_checkpoint_is_not_kept_either(world: World) -> None:
    job = world.training_job(world.dataset())["id"]
    checkpoint = world.train(job)["checkpoint"]
    for _ in range(2):
        url = f"/v1/checkpoints/{checkpoint}/download_url"
        made = world.post(url, json={}, headers={"Idempotency-Key": "a-1"})
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        assert world.client.get(made.json()["url"]).status_code == 200
    with world.database.reading() as session:
        assert session.execute(select(Replay)).all() == []


def test_repetitions_count_for_the_rate_and_each_request_once(world: World) -> None:
    dataset = world.dataset()
    key = {"name": "k", "owner": "ada", "scopes": ["jobs:write"], "requests_per_minute": 3}
    bearer = {"Authorization": f"Bearer {world.post('/v1/api_keys', json=key).json()['secret']}"}

    def send() -> Any:
        body = {"model": MODEL, "dataset_id": dataset}
        return world.client.post(URL, json=body, headers={**bearer, "Idempotency-Key": "a-1"})

    answers = [send() for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["2", "1", "0", "0", "0"]
    check_problem(answers[-1], 429, "rate_limit_exceeded")
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_a_database_that_is_away_is_no_fault_of_ours(world: World) -> None:
    world.headers()
    there = world.app.state.database
    world.app.state.database = Database("postgresql+psycopg://nobody@127.0.0.1:9/none")
    try:
        answer = create(world, "ds_x", "a-1")
    finally:
        world.app.state.database.dispose()
        world.app.state.database = there
    check_problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "5"


# ----------------------------------------------- retries of OpenAI's clients


def retried(world: World, dataset: str, count: int, **more: Any) -> Any:
    return create(world, dataset, headers={"x-stainless-retry-count": str(count)}, **more)


def test_a_retry_without_a_key_gets_the_first_answer(world: World) -> None:
    dataset = world.dataset()
    first = retried(world, dataset, 0)
    second = retried(world, dataset, 0)
    assert first.json()["id"] != second.json()["id"]
    again = retried(world, dataset, 1)
    assert again.json() == second.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert retried(world, dataset, 1, seed=4).json()["id"] not in (
        first.json()["id"], second.json()["id"]
    )  # fmt: skip
    assert len(jobs(world)) == 3


def test_a_retry_after_ten_minutes_is_a_new_request(world: World) -> None:
    dataset = world.dataset()
    retried(world, dataset, 0)
    with world.database.transaction() as session:
        session.execute(update(Replay).values(created_at=db_now() - 601))
    assert "idempotency-replayed" not in retried(world, dataset, 1).headers
    assert len(jobs(world)) == 2


# ------------------------------------------------------------------ upkeep


class Silent:
    def wake(self, queue: object) -> None:
        raise Unavailable("no broker here")


def test_answers_are_forgotten_after_a_day(world: World) -> None:
    dataset = world.dataset()
    create(world, dataset, "old")
    with world.database.transaction() as session:
        session.execute(update(Replay).values(created_at=db_now() - KEPT_S - 1))
    create(world, dataset, "new")
    assert "idempotency-replayed" not in create(world, dataset, "old").headers
    with world.database.transaction() as session:
        session.execute(
            update(Replay).where(Replay.key == "old").values(created_at=db_now() - KEPT_S - 1)
        )
    Maintenance(world.database, Silent(), world.settings).tick()
    with world.database.transaction() as session:
        assert ReplayRepository(session).sweep(older_than_s=-1.0) == 1


def test_the_boundary_has_no_part_in_the_hash_wherever_chunks_end() -> None:
    def digest(boundary: str, size: int) -> str:
        whole = BodyHash(f'multipart/form-data; boundary="{boundary}"')
        body = b"".join(
            f"--{boundary}\r\nA: b\r\n\r\n{part}\r\n".encode() for part in ("one", "--two", "-")
        )
        body += f"--{boundary}--\r\n".encode()
        for start in range(0, len(body), size):
            whole.feed(body[start : start + size])
        return whole.hexdigest()

    assert len({digest(b, n) for b in ("abc", "a-longer-one") for n in (1, 2, 3, 7, 1000)}) == 1
    plain = BodyHash("application/json")
    plain.feed(b"{}")
    assert plain.hexdigest() == hashlib.sha256(b"{}").hexdigest()
