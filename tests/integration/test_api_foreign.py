"""Somebody else's ids are ids of nothing: the whole document walked with a foreign key."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.keys import Scope
from tests.integration.api_world import World, running_api
from tests.integration.object_world import HOST, WORDS, make_objects

# Of the whole service, for administrators; a foreign key without that scope gets 403.
SERVICE = frozenset({"key_id", "worker_id", "owner_id"})
# A signed link is its own key; test_api_downloads.py is about those.
LINKS = "/v1/downloads/"
# The same for everybody: error codes, and the names of kernels and divergences.
PUBLIC = frozenset({"code", "name"})


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    hooks = {"hosts": HOST}
    with running_api(sqlite_url, tmp_path, webhooks=hooks) as world:
        yield world


def body_of(document: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any]:
    """Return the first example of the operation's JSON body, as arguments of a request."""
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return {"files": {"data": b"x"}} if content else {}
    schema = content["application/json"]["schema"]
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    examples = schema.get("examples")
    return {"json": examples[0]} if examples else {}


def walk(world: World) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Give method, path and body of every operation that names an object, deletions last."""
    document = world.app.openapi()
    found = [
        (method.upper(), path, body_of(document, operation))
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if "{" in path and not path.startswith(LINKS)
    ]
    return iter(sorted(found, key=lambda one: one[0] == "DELETE"))


def test_somebody_elses_ids_are_ids_of_nothing(world: World) -> None:
    ids = make_objects(world)
    bob = world.headers("bob")  # an administrator of the service, and still not ada
    walked = 0
    for method, path, body in walk(world):
        names = set(re.findall(r"\{(\w+)\}", path))
        if names & (SERVICE | PUBLIC):
            continue
        assert names <= set(ids), f"add an object for {path} to this test"
        url = re.sub(r"\{(\w+)\}", lambda found: ids[found.group(1)], path)
        theirs = world.client.request(method, url, headers=bob, **body)
        assert theirs.status_code == 404, (method, url, theirs.status_code, theirs.text)
        if method != "HEAD":
            assert theirs.json()["code"] in ("not_found", "no_such_trial"), (method, url)
        walked += 1
    assert walked > 40
    # Nothing of it has happened, and the objects were there all the time.
    for kind, name in (
        ("datasets", "dataset_id"), ("jobs", "job_id"), ("studies", "study_id"),
        ("recommendations", "recommendation_id"), ("checkpoints", "checkpoint_id"),
        ("files", "file_id"), ("uploads", "upload_id"), ("webhooks", "webhook_id"),
        ("evaluations", "evaluation_id"),
    ):  # fmt: skip
        assert world.get(f"/v1/{kind}/{ids[name]}").status_code == 200, kind


def test_no_answer_to_a_stranger_names_an_object_of_ours(world: World) -> None:
    ids = [one for name, one in make_objects(world).items() if name not in SERVICE | set(WORDS)]
    assert len(ids) >= 8
    document = world.app.openapi()
    service = {"/v1/api_keys", "/v1/workers", "/v1/audit"}
    lists = [path for path, item in document["paths"].items() if "get" in item and "{" not in path]
    assert len(lists) > 15
    for path in lists:
        if path in service:
            continue
        answer = world.client.get(path, headers=world.headers("bob"))
        assert answer.status_code in (200, 422, 503), path
        assert [one for one in ids if one in answer.text] == [], path


def test_the_service_itself_is_closed_to_keys_without_its_scope(world: World) -> None:
    scopes = tuple(scope for scope in Scope if scope is not Scope.ADMIN)
    bearer = {"Authorization": f"Bearer {world.key('bob', scopes)}"}
    walked = 0
    for method, path, body in walk(world):
        if set(re.findall(r"\{(\w+)\}", path)) & SERVICE:
            url = re.sub(r"\{\w+\}", "own_x", path)
            assert world.client.request(method, url, headers=bearer, **body).status_code == 403
            assert world.client.request(
                method, url, headers=world.headers("bob"), **body
            ).status_code == 404, (method, url)  # fmt: skip
            walked += 1
    assert walked >= 4
