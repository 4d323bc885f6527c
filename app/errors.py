"""Every error as one body: RFC 9457 problem JSON that carries OpenAI's `error` object too."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from core.errors import Category, ErrorDetail, KdpoError

PROBLEM_TYPE = "application/problem+json"
REQUEST_ID = "kdpo.request_id"
RETRY_AFTER_S = 5

_log = logging.getLogger("kdpo.errors")

_CODE_OF_STATUS = {
    400: "malformed_request",
    401: "invalid_api_key",
    403: "missing_scope",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
}


class ProblemDetail(BaseModel):
    """One place that is wrong."""

    code: str
    detail: str
    pointer: str | None = None
    line: int | None = None
    count: int | None = None
    hint: str | None = None


class OpenAIError(BaseModel):
    """What OpenAI's clients read."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(BaseModel):
    """RFC 9457 problem details with kdpo's members."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "https://kdpo.example/problems/dataset_invalid",
                    "title": "Dataset invalid",
                    "status": 422,
                    "detail": "201 of 400 rows cannot become pairs.",
                    "instance": "/requests/req_01jd",
                    "code": "dataset_invalid",
                    "request_id": "req_01jd",
                    "retryable": False,
                    "hint": "add the field, drop these rows, or set on_invalid=skip",
                    "errors": [
                        {
                            "code": "missing_field",
                            "detail": "field required",
                            "pointer": "/rejected",
                            "line": 7,
                        }
                    ],
                    "error": {
                        "message": "201 of 400 rows cannot become pairs.",
                        "type": "invalid_request_error",
                        "param": "file",
                        "code": "dataset_invalid",
                    },
                }
            ]
        },
    )

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    retryable: bool
    hint: str | None = None
    errors: list[ProblemDetail] = []
    error: OpenAIError


def status_of(category: Category) -> int:  # noqa: C901 - one arm for each of a closed set
    """Return the HTTP status of a category; the only place that knows."""
    match category:
        case Category.MALFORMED:
            return 400
        case Category.INVALID:
            return 422
        case Category.UNAUTHENTICATED:
            return 401
        case Category.NOT_PERMITTED:
            return 403
        case Category.NOT_FOUND:
            return 404
        case Category.CONFLICT:
            return 409
        case Category.CHANGED:
            return 412
        case Category.TOO_MANY:
            return 429
        case Category.TOO_LARGE:
            return 413
        case Category.UNSUPPORTED_MEDIA:
            return 415
        case Category.UNAVAILABLE:
            return 503
        case Category.STORAGE_FULL:
            return 507
        case Category.RUN_ABORTED:
            return 500
        case _:
            assert_never(category)


def problem_response(
    request: Request,
    *,
    status: int,
    code: str,
    detail: str,
    hint: str | None = None,
    param: str | None = None,
    errors: Sequence[ErrorDetail] = (),
    retryable: bool = False,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Response:
    """Return the one error body of kdpo."""
    request_id = str(request.scope.get(REQUEST_ID, "req_unknown"))
    body = {
        "type": f"{public_url(request)}/problems/{code}",
        "title": title_of(code),
        "status": status,
        "detail": detail,
        "instance": f"/requests/{request_id}",
        "code": code,
        "request_id": request_id,
        "retryable": retryable,
        "hint": hint,
        "errors": [
            {
                name: value
                for name, value in (
                    ("code", e.code),
                    ("detail", e.detail),
                    ("pointer", e.pointer),
                    ("line", e.line),
                    ("count", e.count),
                    ("hint", e.hint),
                )
                if value is not None
            }
            for e in errors
        ],
        "error": {"message": detail, "type": _openai_type(status), "param": param, "code": code},
        **(extra or {}),
    }
    return Response(
        content=json.dumps(body, ensure_ascii=False),
        status_code=status,
        media_type=PROBLEM_TYPE,
        headers={"x-request-id": request_id, **_standing_headers(status), **(headers or {})},
    )


def title_of(code: str) -> str:
    """Return the title of an error code, the same wherever it comes up (RFC 9457, 3.1.3)."""
    return code.replace("_", " ").capitalize()


def kdpo_problem(
    request: Request, error: KdpoError, *, extra: Mapping[str, Any] | None = None
) -> Response:
    """Return the response to an error of ours."""
    return problem_response(
        request,
        status=status_of(error.category),
        code=error.code,
        detail=error.message,
        hint=error.hint,
        param=error.param,
        errors=error.errors,
        retryable=error.retryable,
        extra=extra,
    )


def install(app: FastAPI) -> None:
    """Handle every error, so that no other shape leaves the service."""
    app.add_exception_handler(KdpoError, _on_kdpo_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_kdpo_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, KdpoError):
        raise error
    if status_of(error.category) >= 500:
        _log.warning("request failed: %s", error.message, exc_info=error)
    return kdpo_problem(request, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    found = error.errors()
    broken = next((item for item in found if item["type"] == "json_invalid"), None)
    if broken is not None:
        reason = broken.get("ctx", {}).get("error", "JSON decode error")
        return problem_response(
            request,
            status=400,
            code="malformed_request",
            detail=f"the body is not valid JSON at character {broken['loc'][-1]}: {reason}",
            hint="send one JSON object, UTF-8",
        )
    details = [validation_detail(item, error.body) for item in found]
    first = details[0]
    where = first.pointer or "the request"
    return problem_response(
        request,
        status=422,
        code="invalid_input",
        detail=f"{where}: {first.detail}",
        hint="GET /openapi.json describes what this endpoint takes",
        param=_param(found[0]["loc"]),
        errors=details,
    )


def validation_detail(item: Mapping[str, Any], body: object) -> ErrorDetail:
    """Return one error of pydantic with a JSON pointer into what was sent."""
    location = tuple(item["loc"])
    if location[:1] == ("body",):
        keeps_last = item["type"] in ("missing", "extra_forbidden")
        pointer = json_pointer(location[1:], body, keeps_last=keeps_last)
    else:
        pointer = "/".join(str(part) for part in location)
    return ErrorDetail(
        code=str(item["type"]),
        detail=str(item["msg"]).removeprefix("Value error, "),
        pointer=pointer,
    )


def json_pointer(location: Sequence[str | int], body: object, *, keeps_last: bool) -> str:
    """Return the RFC 6901 pointer of a pydantic location.

    Pydantic puts the names of union members among the keys; a part that does not exist in the
    body is such a name, unless it is the last one and names what is missing or too much.
    """
    pointer = ""
    value: Any = body
    for position, part in enumerate(location):
        exists = _has(value, part)
        if exists or (keeps_last and position == len(location) - 1):
            pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
        if exists:
            value = value[part]
    return pointer


def _has(value: object, part: str | int) -> bool:
    match value:
        case dict():
            return part in value
        case list():
            return isinstance(part, int) and part < len(value)
        case _:
            return False


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    hint: str | None = None
    match error.status_code:
        case 404:
            detail, hint = f"no such path: {request.url.path}", "GET /openapi.json lists all paths"
        case 405:
            detail = f"{request.method} is not allowed on {request.url.path}"
            hint = "the Allow header names the methods"
        case _:
            detail = str(error.detail)
    return problem_response(
        request,
        status=error.status_code,
        code=_CODE_OF_STATUS.get(error.status_code, "http_error"),
        detail=detail,
        hint=hint,
        headers=error.headers,
    )


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return problem_response(
        request,
        status=500,
        code="internal",
        detail="kdpo failed in a way that it should not; the server's log has the reason",
        hint="quote the request id when you report this",
        extra={"exception": type(error).__name__},
    )


def _standing_headers(status: int) -> dict[str, str]:
    match status:
        case 401:
            return {"WWW-Authenticate": "Bearer"}
        case 409:
            # OpenAI's client would send the same request three times.
            return {"x-should-retry": "false"}
        case 429 | 503:
            return {"Retry-After": str(RETRY_AFTER_S)}
        case _:
            return {}


def _openai_type(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case _ if status >= 500:
            return "server_error"
        case _:
            return "invalid_request_error"


def _param(location: Sequence[str | int]) -> str | None:
    names = [str(part) for part in location[1:] if isinstance(part, str)]
    return names[0] if names else None


def public_url(request: Request) -> str:
    """Return where clients reach this service, without a slash at its end."""
    url: str | None = request.app.state.settings.api.public_url
    return (url or str(request.base_url)).rstrip("/")
