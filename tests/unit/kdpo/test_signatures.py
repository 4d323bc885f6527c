"""Both clients have the same calls, and what comes out of each is what type checkers say."""

import asyncio
import inspect
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kdpo import AsyncClient, Client, ConnectionFailed, InvalidArgument, Job
from kdpo.calls import call, listing
from kdpo.flows import Request
from kdpo.transport import address, httpx_request
from kdpo.workflows import as_file, method_of

GROUPS = ("jobs", "datasets", "recommendations", "checkpoints", "evaluations")
LIST = {"data": [{"id": "job_2", "status": "running"}], "has_more": False, "last_id": "job_2"}


def answer(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/jobs":
        return httpx.Response(200, json=LIST)
    return httpx.Response(200, json={"id": "job_1", "status": "succeeded"})


def members(client: object) -> dict[str, Any]:
    owners = [("", client), *((f"{name}.", getattr(client, name)) for name in GROUPS)]
    return {
        f"{prefix}{name}": getattr(owner, name)
        for prefix, owner in owners
        for name, member in inspect.getmembers_static(type(owner))
        if isinstance(member, call | listing)
    }


def test_both_clients_have_the_same_calls() -> None:
    with Client(transport=httpx.MockTransport(answer)) as blocking:
        ours = members(blocking)
        theirs = members(AsyncClient(transport=httpx.MockTransport(answer)))
        assert len(ours) > 25
        assert {n: inspect.signature(f) for n, f in ours.items()} == {
            n: inspect.signature(f) for n, f in theirs.items()
        }
        assert not [name for name, member in ours.items() if not member.__doc__]


def test_results_and_iterators() -> None:
    with Client(transport=httpx.MockTransport(answer)) as client:
        assert isinstance(client.jobs.get("job_1"), Job)
        found = client.jobs.list()
        assert isinstance(found, Iterator)
        assert [job.id for job in found] == ["job_2"]

    async def run() -> list[str]:
        async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
            assert (await client.jobs.get("job_1")).ended
            jobs = client.jobs.list()
            assert isinstance(jobs, AsyncIterator)
            return [job.id async for job in jobs]

    assert asyncio.run(run()) == ["job_2"]


def test_pages_are_fetched_as_one_goes() -> None:
    asked: list[str] = []

    def pages(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url.query, "ascii"))
        start = int(request.url.params.get("after", "job_0").removeprefix("job_"))
        size = int(request.url.params["limit"])
        ids = [f"job_{number}" for number in range(start + 1, start + 1 + size)]
        body = {"data": [{"id": i, "status": "queued"} for i in ids], "last_id": ids[-1]}
        return httpx.Response(200, json={**body, "has_more": True})

    with Client(transport=httpx.MockTransport(pages)) as client:
        jobs = client.jobs.list(status="queued")
        assert asked == []
        assert next(jobs).id == "job_1"
        assert asked == ["status=queued&order=desc&limit=100"]
        found = [job.id for job in client.jobs.list(limit=120)]
        assert (len(found), found[-1]) == (120, "job_120")
        assert asked[-1] == "order=desc&limit=20&after=job_100"


def test_a_client_serves_several_threads() -> None:
    with Client(transport=httpx.MockTransport(answer)) as client:
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.append(client.jobs.get("x").id)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["job_1"] * 8


def test_settings_come_from_arguments_then_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDPO_BASE_URL", "https://named.example/v1/")
    monkeypatch.setenv("KDPO_API_KEY", "dk-test-secret")
    to = address(None, None, timeout_s=5, max_retries=0)
    assert (to.base_url, to.api_key) == ("https://named.example", "dk-test-secret")
    assert "secret" not in repr(to)
    assert address("http://x", "other", timeout_s=5, max_retries=0).api_key == "other"
    monkeypatch.delenv("KDPO_BASE_URL")
    assert address(None, None, timeout_s=5, max_retries=0).base_url == "http://127.0.0.1:8321"
    for url, seconds in (("localhost:8321", 5.0), ("http://x", 0.0)):
        with pytest.raises(InvalidArgument):
            address(url, None, timeout_s=seconds, max_retries=0)


def test_a_proxy_of_the_environment_is_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_answer_once, args=(server,))
        thread.start()
        with Client(f"http://127.0.0.1:{server.getsockname()[1]}", max_retries=0) as client:
            assert client.jobs.get("job_1").ended
        thread.join()
    with Client("http://kdpo.invalid", max_retries=0) as client, pytest.raises(ConnectionFailed):
        client.jobs.get("job_1")


def _answer_once(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        body = b'{"id": "job_1", "status": "succeeded"}'
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def test_queries_leave_out_what_is_not_set() -> None:
    to = address("http://x", None, timeout_s=5, max_retries=0)
    made = httpx_request(to, Request("GET", "/v1/x", query={"a": None, "b": True, "c": 2}), None)
    assert made["params"] == {"b": "true", "c": "2"}


def test_methods_by_name_and_whole() -> None:
    none = {"kernel": None, "divergence": None, "search": None, "hyperparameters": {}}
    assert method_of("auto", **none) == {"type": "auto", "auto": {}}  # type: ignore[arg-type]
    assert method_of(
        "kernel_dpo", kernel="rbf", divergence="kl", search=None, hyperparameters={"beta": 0.2}
    ) == {
        "type": "kernel_dpo",
        "kernel_dpo": {"kernel": "rbf", "divergence": "kl", "hyperparameters": {"beta": 0.2}},
    }
    whole = {"type": "dpo", "dpo": {}}
    assert method_of(whole, **none) == whole  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="would be ignored"):
        method_of(whole, kernel="rbf", divergence=None, search=None, hyperparameters={})


def test_a_file_or_a_dataset(tmp_path: Path) -> None:
    file = tmp_path / "ds_like.jsonl"
    file.touch()
    assert as_file(file) == file
    assert as_file("ds_01jd") is None
    with pytest.raises(InvalidArgument, match=r"nowhere\.jsonl"):
        as_file("nowhere.jsonl")


def test_the_client_loads_nothing_of_the_server(tmp_path: Path) -> None:
    code = "import json, sys, kdpo; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    server = {"app", "core", "models", "worker", "fastapi", "sqlalchemy", "torch", "numpy"}
    assert not server & set(json.loads(done.stdout))
