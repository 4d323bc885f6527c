"""The committed document is that of the code; every body has an example; `/docs` needs no net."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.docs_page import SWAGGER_VERSION
from app.openapi_file import document_text
from tests.integration.api_world import World, running_api

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "openapi.json"
VENDORED = ROOT / "app" / "static" / "swagger-ui"
METHODS = frozenset({"get", "head", "post", "put", "patch", "delete"})


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(document_text())
    return read


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as world:
        yield world


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in METHODS & item.keys():
            yield f"{method.upper()} {path}", item[method]


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        if part.get("type") != "null":
            return resolved(document, part)
    return schema


def test_committed_document_is_that_of_the_code() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == document_text(), (
        "the API has changed: run `make openapi` and look at the difference of docs/openapi.json; "
        "taking something away needs a new major version"
    )


def test_operation_ids_are_there_unique_and_verbs_with_nouns(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    assert len(ids) > 60
    assert [one for one in ids if re.fullmatch(r"[a-z]+(_[a-z]+)+", one) is None] == []


def test_every_body_has_an_example(document: dict[str, Any]) -> None:
    without = [
        f"{label} {kind}"
        for label, operation in operations(document)
        for kind, body in operation.get("requestBody", {}).get("content", {}).items()
        if not (
            body.get("example")
            or body.get("examples")
            or "examples" in resolved(document, body["schema"])
        )
    ]
    assert without == []


def test_every_operation_says_what_it_does(document: dict[str, Any]) -> None:
    silent = [
        label for label, operation in operations(document) if not operation.get("description")
    ]
    assert silent == []


def test_vendored_files_are_those_that_were_taken() -> None:
    lines = (VENDORED / "VENDOR.lock").read_text().splitlines()
    assert SWAGGER_VERSION in lines[0]
    taken = dict(reversed(line.split(maxsplit=1)) for line in lines[1:])
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDORED.iterdir()
        if path.name not in ("VENDOR.lock", "start.js")
    }
    assert found == taken


def test_docs_page_asks_no_other_server(world: World) -> None:
    page = world.client.get("/docs")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(addresses) >= 4
    for address in addresses:
        if address.startswith("data:"):
            continue
        assert "://" not in address
        assert not address.startswith("//")
        answer = world.client.get(f"/{address}")
        assert answer.status_code == 200, address
        assert len(answer.content) > 100
        again = world.client.get(f"/{address}", headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
    served = world.client.get(f"/docs/{SWAGGER_VERSION}/swagger-ui-bundle.js")
    assert served.content == (VENDORED / "swagger-ui-bundle.js").read_bytes()
    assert world.client.get("/openapi.json").status_code == 200


@pytest.mark.parametrize("path", ["/docs/0.0.1/start.js", f"/docs/{SWAGGER_VERSION}/LICENSE"])
def test_docs_serves_its_own_files_only(world: World, path: str) -> None:
    assert world.client.get(path).status_code == 404
