"""A server without keys is for programs of its machine: web pages of others get nothing of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.api_world import World, running_api
from tests.integration.test_api import check_problem


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    api = {"public_url": "https://kdpo.example/base"}
    with running_api(sqlite_url, tmp_path, auth={"required": False}, api=api) as made:
        yield made


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8321", "localhost:8321", "localhost", "[::1]:8321", "LOCALHOST", "kdpo.example"],
)
def test_names_of_this_machine_are_served(world: World, host: str) -> None:
    assert world.client.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8321", "kdpo.examples"],
)
def test_a_name_that_leads_here_is_not_enough(world: World, host: str) -> None:
    """What a page reaches whose own name was made to point at 127.0.0.1."""
    check_problem(world.client.get("/v1/jobs", headers={"Host": host}), 403, "foreign_origin")
    keyed = {"Host": host, "Idempotency-Key": "a-1"}
    made = world.client.post("/v1/fine_tuning/jobs", json={}, headers=keyed)
    check_problem(made, 403, "foreign_origin")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_forms_of_other_pages_do_nothing(world: World, site: str) -> None:
    headers = {"Host": "127.0.0.1:8321", "Sec-Fetch-Site": site}
    form = {"file": ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n')}
    sent = world.client.post("/v1/datasets", files=form, headers=headers)
    check_problem(sent, 403, "foreign_origin")
    for own in ("same-origin", "none"):
        headers["Sec-Fetch-Site"] = own
        assert world.client.get("/v1/jobs", headers=headers).status_code == 200


def test_with_keys_the_name_does_not_matter(sqlite_url: str, tmp_path: Path) -> None:
    with running_api(sqlite_url, tmp_path) as world:
        assert world.get("/v1/jobs", headers={"Host": "kdpo.lan"}).status_code == 200
