"""Every operation of the OpenAPI document does what its examples ask for, on objects that exist."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import APIOperation, BaseSchema

from tests.integration.schema_world import Live, live_server, name_of, operations, read_schema

# What no example can ask for here, as status and reason.
REFUSED = {
    ("create_dataset", 1): (403, "the hub is switched off"),
    ("create_evaluation", 1): (422, "the reward model is not on this machine"),
}


@pytest.fixture
def live(sqlite_url: str, tmp_path: Path) -> Iterator[Live]:
    with live_server(sqlite_url, tmp_path) as one:
        yield one


def test_every_operation_does_what_its_example_asks_for(live: Live) -> None:
    wrong: list[str] = []
    refused = set()
    for operation in operations(read_schema(live)):
        for number, (kind, body) in enumerate(_examples(operation)):
            label = f"{operation.label} example {number} {kind or ''}"
            try:
                status = _ask(live, operation, kind, body)
                if operation.path.endswith("/events"):
                    _follow(live, operation)
            except (AssertionError, FailureGroup) as error:
                wrong.append(f"{label}:\n{error}"[:1500])
                continue
            expected = REFUSED.get((name_of(operation), number))
            if expected is not None and status == expected[0]:
                refused.add((name_of(operation), number))
            elif not 200 <= status < 300:
                wrong.append(f"{label}: {status}")
    assert not wrong, f"{len(wrong)} failures\n\n" + "\n\n".join(wrong)
    assert refused == REFUSED.keys()


def _examples(operation: APIOperation) -> Iterator[tuple[str | None, Any]]:
    """Give every example of every kind of body as the document has it; without a body one."""
    content = operation.definition.raw.get("requestBody", {}).get("content", {})
    if not content:
        yield None, None
    for kind, body in content.items():
        named = [one["value"] for one in body.get("examples", {}).values()]
        for example in named or _resolved(operation.schema, body["schema"])["examples"]:
            yield kind, example


def _resolved(schema: BaseSchema, found: dict[str, Any]) -> dict[str, Any]:
    for part in found.get("anyOf", ()):
        if part.get("type") != "null":
            return _resolved(schema, part)
    if "$ref" in found:
        name = found["$ref"].rpartition("/")[2]
        return _resolved(schema, schema.raw_schema["components"]["schemas"][name])
    return found


def _ask(live: Live, operation: APIOperation, kind: str | None, body: Any) -> int:
    """Send one example with ids that exist; check the answer, and what its ETag is good for."""
    ids = live.of(name_of(operation))
    text = json.dumps(body, ensure_ascii=False)
    for said, meant in {
        "ds_01jd": ids["dataset_id"], "ckpt_01jd": ids["checkpoint_id"],
        "file-01jd": ids["file_id"], "part_01jd": ids.get("part_01jd", ""),
        "part_01je": ids.get("part_01je", ""), "Qwen/Qwen2.5-0.5B": "tiny-lm",
        "adapter_model.safetensors": "model.safetensors", "rbf × jensen_shannon": "rbf × kl",
    }.items():  # fmt: skip
        text = text.replace(said, meant)
    names = [one.name for one in operation.path_parameters]
    more: dict[str, Any] = {} if kind is None else {"body": json.loads(text), "media_type": kind}
    case = operation.Case(
        path_parameters={name: ids[name] for name in names},
        query=_query(live, operation),
        **more,
    )
    response = case.call(base_url=live.url, session=live.session)
    case.validate_response(
        response, transport_kwargs={"base_url": live.url, "session": live.session}
    )
    told = "304" in operation.definition.raw["responses"]
    etag = response.headers.get("etag", [None])[0]
    if operation.method in ("get", "head"):
        assert told == (etag is not None), f"{operation.label}: 304 is documented: {told}"
    if told:
        again = live.session.request(
            operation.method, str(response.request.url), headers={"If-None-Match": str(etag)}
        )
        assert (again.status_code, again.content) == (304, b""), operation.label
    return response.status_code


def _follow(live: Live, operation: APIOperation) -> None:
    """Read the stream of a job that has ended, which ends."""
    case = operation.Case(path_parameters={"job_id": live.ids["job_id"]}, query={"stream": "true"})
    response = case.call(base_url=live.url, session=live.session)
    case.validate_response(
        response, transport_kwargs={"base_url": live.url, "session": live.session}
    )
    assert response.headers["content-type"][0].startswith("text/event-stream")
    assert b"event: snapshot" in response.content
    assert b"event: done" in response.content


def _query(live: Live, operation: APIOperation) -> dict[str, str]:
    if operation.path.startswith("/v1/downloads/"):
        return live.links[operation.path.count("/files/")]
    # Of the page in JSON, which has no ETag, are most of the other cases.
    return {"format": "jsonl"} if operation.path.endswith("/rows") else {}
