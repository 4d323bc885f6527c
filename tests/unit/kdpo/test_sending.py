"""What is sent again, after which pauses, and what comes out as which error."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from kdpo import errors
from kdpo.errors import ApiError, ConnectionFailed, UnexpectedAnswer, api_error
from kdpo.flows import Request
from kdpo.sending import Policy, asked_pause_s, json_body, opened, parsed, sent
from kdpo.types import Job
from tests.unit.kdpo.script import Body, broke, play, problem, reply

MOST = Policy(max_retries=4, chance=lambda: 1.0)
GET = Request("GET", "/v1/jobs")
CREATE = Request("POST", "/v1/fine_tuning/jobs", json={})
CHANGE = Request("PATCH", "/v1/checkpoints/x", json={})


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_passing_faults_are_tried_again_with_longer_pauses(status: int) -> None:
    played = play(sent(GET, MOST), *[problem(status)] * 4, reply({}))
    assert played.result.status == 200
    assert played.pauses == [0.5, 1.0, 2.0, 4.0]


def test_pauses_have_jitter_and_an_upper_end() -> None:
    assert [Policy(chance=lambda: 0.0).pause_s(tries) for tries in (1, 2, 9)] == [0.25, 0.5, 4.0]
    assert MOST.pause_s(9) == 8.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500, 507])
def test_lasting_faults_are_not(status: int) -> None:
    with pytest.raises(ApiError) as caught:
        play(sent(GET, MOST), problem(status))
    assert caught.value.status == status


def test_the_server_decides_where_it_says_so() -> None:
    play(sent(GET, MOST), problem(409, x_should_retry="true"), reply({}))
    with pytest.raises(errors.RateLimited):
        play(sent(GET, MOST), problem(429, x_should_retry="false"))


def test_tries_have_an_end() -> None:
    with pytest.raises(errors.ServerUnavailable):
        play(sent(GET, Policy(max_retries=2)), *[problem(503)] * 3)
    with pytest.raises(ConnectionFailed):
        play(sent(GET, Policy(max_retries=0)), broke())


def test_retry_after_is_waited_for_unless_it_is_long() -> None:
    assert play(sent(GET, MOST), problem(503, retry_after="7"), reply({})).pauses == [7.0]
    assert play(sent(GET, MOST), problem(503, retry_after="0"), reply({})).pauses == [0.5]
    with pytest.raises(errors.RateLimited):
        play(sent(GET, MOST), problem(429, retry_after="3600"))


def test_retry_after_as_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    found = asked_pause_s({"retry-after": soon})
    assert found is not None
    assert 15 < found <= 20
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=20), usegmt=True)
    assert asked_pause_s({"retry-after": past}) == 0.0
    assert asked_pause_s({"retry-after": "soon"}) is None
    assert asked_pause_s({}) is None


def test_broken_connections() -> None:
    assert play(sent(GET, MOST), broke(), reply({})).pauses == [0.5]


@pytest.mark.parametrize("request_", [CREATE, CHANGE])
def test_what_may_have_been_done_is_asked_for_again_under_its_key(request_: Request) -> None:
    # A proxy's 502 or 504 says as little as a broken connection whether the server has done it.
    faults = broke(sent=True), problem(502), problem(504), problem(503)
    played = play(sent(request_, MOST), *faults, reply({}))
    keys = {request.headers["Idempotency-Key"] for request in played.requests}
    assert len(played.requests) == 5
    assert len(keys) == 1


def test_each_call_has_a_key_of_its_own() -> None:
    keys = {
        play(sent(CREATE, MOST), reply({})).requests[0].headers["Idempotency-Key"] for _ in range(3)
    }
    assert len(keys) == 3
    assert "Idempotency-Key" not in play(sent(GET, MOST), reply({})).requests[0].headers
    own = Request("POST", "/v1/x", headers={"Idempotency-Key": "mine"})
    assert play(sent(own, MOST), reply({})).requests[0].headers["Idempotency-Key"] == "mine"


def test_a_problem_becomes_a_typed_error() -> None:
    body: dict[str, Any] = {
        "code": "dataset_invalid", "detail": "2 of 4 rows cannot become pairs.", "hint": "map them",
        "request_id": "req_9", "retryable": True, "dataset_id": "ds_1",
        "error": {"param": "file"},
        "errors": [{"code": "missing_field", "detail": "required", "pointer": "/a", "line": 7}],
    }  # fmt: skip
    with pytest.raises(errors.InvalidRequest) as caught:
        play(sent(GET, MOST), reply(body, 422))
    error = caught.value
    assert (error.code, error.param, error.retryable) == ("dataset_invalid", "file", True)
    assert (error.errors[0].line, error.body["dataset_id"]) == (7, "ds_1")
    assert str(error).splitlines() == [
        "422 dataset_invalid: 2 of 4 rows cannot become pairs.", "  line 7 /a: required",
        "hint: map them", "request id: req_9",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "BadRequest"), (401, "Unauthenticated"), (403, "PermissionDenied"),
        (404, "NotFound"), (409, "Conflict"), (412, "PreconditionFailed"), (413, "TooLarge"),
        (415, "UnsupportedMedia"), (418, "ApiError"), (422, "InvalidRequest"),
        (429, "RateLimited"), (500, "ServerFault"), (503, "ServerUnavailable"),
        (507, "StorageFull"), (599, "ServerFault"),
    ],
)  # fmt: skip
def test_class_of_each_status(status: int, name: str) -> None:
    assert type(api_error(status, {"code": "x"}, request_id=None)) is getattr(errors, name)


def test_an_answer_of_somebody_else() -> None:
    with pytest.raises(errors.NotFound, match="without saying why: <html>") as caught:
        play(sent(GET, MOST), reply(b"<html>no such page", 404, x_request_id="abc"))
    assert caught.value.request_id == "abc"
    with pytest.raises(UnexpectedAnswer, match="expected a Job"):
        parsed(Job, b'{"hello": 1}')
    with pytest.raises(UnexpectedAnswer, match="expected JSON"):
        json_body(b"<html>")
    assert json_body(b"") is None


def test_more_faults_than_are_shown_are_counted() -> None:
    items = [{"code": "c", "detail": f"fault {number}"} for number in range(9)]
    said = str(api_error(422, {"code": "c", "detail": "no", "errors": items}, request_id=None))
    assert "fault 4" in said
    assert "fault 5" not in said
    assert "and 4 more" in said


def test_a_refused_stream_is_read_and_closed() -> None:
    body = Body([b'{"code": "not', b'_found", "detail": "gone"}'], status=404)
    with pytest.raises(errors.NotFound, match="gone") as caught:
        play(opened(GET), body)
    assert caught.value.played.closed == 1  # type: ignore[attr-defined]
