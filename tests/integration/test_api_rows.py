"""The canonical rows as files: JSON Lines and Parquet, whole, in part, and uploaded again."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from tests.integration.api_world import World, running_api
from tests.integration.test_api import check_problem

TYPES = {"jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def turns(*texts: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in texts]


def conversations(count: int) -> bytes:
    rows = (
        {
            "prompt": turns(
                ("system", "Be brief — “please”."), ("user", f"Hi {n}"), ("assistant", "Yes?"),
                ("user", f"Was ist {n}²?\n"),
            ),
            "chosen": turns(("assistant", f"{n * n} ✓")),
            "rejected": turns(("assistant", f"{n}, I think")),
            "margin": None if n % 3 else n / 2,
            "tag": {"n": n},
        }
        for n in range(count)
    )  # fmt: skip
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def dataset(world: World, data: bytes, **form: str) -> str:
    made = world.upload(data, **form).json()["id"]
    world.validate()
    view = world.get(f"/v1/datasets/{made}").json()
    assert view["status"] in ("ready", "ready_with_warnings"), view
    return str(made)


def rows_of(world: World, made: str) -> list[dict[str, Any]]:
    text = world.get(f"/v1/datasets/{made}/rows?format=jsonl").text
    return [json.loads(line) for line in text.splitlines()]


def table(content: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(content))


@pytest.mark.parametrize("form", TYPES)
def test_a_file_has_its_hash_and_may_be_read_in_parts(world: World, form: str) -> None:
    made = dataset(world, conversations(40))
    file = next(
        file
        for file in world.get(f"/v1/datasets/{made}").json()["files"]
        if file["path"] == f"canonical.{form}"
    )
    whole = world.get(file["url"])
    assert whole.status_code == 200
    assert hashlib.sha256(whole.content).hexdigest() == file["sha256"]
    assert len(whole.content) == file["bytes"]
    assert whole.headers["content-type"] == TYPES[form]
    assert f"canonical.{form}" in whole.headers["content-disposition"]
    assert whole.headers["content-length"] == str(file["bytes"])
    etag = whole.headers["etag"]
    assert etag == f'"sha256:{file["sha256"]}"'
    head = world.client.head(file["url"], headers=world.headers())
    assert (head.content, head.headers["etag"]) == (b"", etag)
    assert head.headers["content-length"] == str(file["bytes"])
    same = world.get(file["url"], headers={"If-None-Match": etag})
    assert (same.status_code, same.content) == (304, b"")
    part = world.get(file["url"], headers={"Range": "bytes=10-59", "If-Range": etag})
    assert (part.status_code, part.content) == (206, whole.content[10:60])
    assert part.headers["content-range"] == f"bytes 10-59/{file['bytes']}"
    stale = world.get(file["url"], headers={"Range": "bytes=10-59", "If-Range": '"old"'})
    assert (stale.status_code, stale.content) == (200, whole.content)
    beyond = world.get(file["url"], headers={"Range": f"bytes={file['bytes']}-"})
    check_problem(beyond, 416, "range_not_satisfiable")


def test_the_table_has_the_rows_of_the_lines(world: World) -> None:
    made = dataset(world, conversations(40))
    found = table(world.get(f"/v1/datasets/{made}/rows?format=parquet").content)
    assert found.schema.metadata[b"kdpo.schema_version"] == b"1"
    rows = rows_of(world, made)
    assert found.column_names == list(rows[0])
    assert [{**row, "meta": json.loads(row["meta"])} for row in found.to_pylist()] == rows
    assert {row["margin"] for row in rows} > {None, 3.0}
    assert {row["prompt"][0]["role"] for row in rows} == {"system"}
    again = dataset(world, conversations(40))
    assert [
        world.get(f"/v1/datasets/{one}").json()["files"][1]["sha256"] for one in (made, again)
    ] == 2 * [hashlib.sha256(world.get(f"/v1/datasets/{made}/rows?format=parquet").content)
              .hexdigest()]  # fmt: skip


@pytest.mark.parametrize("form", TYPES)
def test_a_file_that_is_uploaded_again_has_the_same_pairs(world: World, form: str) -> None:
    made = dataset(world, conversations(40))
    content = world.get(f"/v1/datasets/{made}/rows?format={form}").content
    again = dataset(world, content)
    before, after = rows_of(world, made), rows_of(world, again)
    for name in ("id", "group_id", "prompt", "chosen", "rejected", "margin", "split"):
        assert [row[name] for row in after] == [row[name] for row in before], name
    assert len({row["id"] for row in after}) == 40
    report = world.get(f"/v1/datasets/{again}/report").json()
    assert report["detected"]["layout"] == "trl_conversational"


def test_large_rows_are_many_row_groups(world: World) -> None:
    long = "x" * 400_000
    data = b"".join(
        json.dumps({"prompt": f"{n}?", "chosen": f"{n}{long}", "rejected": "no"}).encode() + b"\n"
        for n in range(24)
    )
    made = dataset(world, data)
    content = world.get(f"/v1/datasets/{made}/rows?format=parquet").content
    assert pq.ParquetFile(io.BytesIO(content)).num_row_groups > 1
    assert table(content).column("id").to_pylist() == [row["id"] for row in rows_of(world, made)]


def test_rejected_rows_are_lines_only(world: World) -> None:
    made = dataset(world, conversations(40) + b"no json\n", policy='{"max_invalid_fraction": 0.1}')
    url = f"/v1/datasets/{made}/rows?view=rejected"
    lines = world.get(f"{url}&format=jsonl")
    assert [json.loads(line)["line"] for line in lines.text.splitlines()] == [41]
    assert lines.headers["etag"].startswith('"sha256:')
    problem = check_problem(world.get(f"{url}&format=parquet"), 422, "invalid_input")
    assert problem["error"]["param"] == "format"


@pytest.mark.parametrize("query", ["limit=5", "after=0"])
def test_pages_are_of_json_only(world: World, query: str) -> None:
    made = dataset(world, conversations(20))
    for form in TYPES:
        answer = world.get(f"/v1/datasets/{made}/rows?format={form}&{query}")
        problem = check_problem(answer, 422, "invalid_input")
        assert problem["error"]["param"] == query.partition("=")[0]
    assert world.get(f"/v1/datasets/{made}/rows?{query}").status_code == 200


def test_a_page_far_behind_the_last_row_is_empty(world: World) -> None:
    url = f"/v1/datasets/{dataset(world, conversations(20))}/rows?after="
    assert world.get(f"{url}{2**53 - 1}").json()["data"] == []
    check_problem(world.get(f"{url}{2**66}"), 422, "invalid_input")


def test_rows_are_the_owners_and_there_when_they_are(world: World) -> None:
    made = world.upload(conversations(20)).json()["id"]
    for form in ("json", *TYPES):
        url = f"/v1/datasets/{made}/rows?format={form}"
        assert check_problem(world.get(url), 409, "dataset_not_ready")["retryable"]
    world.validate()
    for form in ("json", *TYPES):
        url = f"/v1/datasets/{made}/rows?format={form}"
        check_problem(world.client.get(url, headers=world.headers("eve")), 404, "not_found")
    folder = world.settings.artifact_dir / "datasets" / made
    (folder / "canonical.parquet").write_bytes(b"changed")
    check_problem(world.get(f"/v1/datasets/{made}/rows?format=parquet"), 500, "checkpoint_corrupt")
    (folder / "canonical.jsonl").unlink()
    check_problem(world.get(f"/v1/datasets/{made}/rows"), 404, "not_found")
