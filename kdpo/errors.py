"""Every error that the client raises: one class for each status, and what went wrong around it."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from kdpo.types import ErrorItem, Job

_MAX_ITEMS_SHOWN = 5


class KdpoClientError(Exception):
    """Root of all errors of the client; `hint` says what to do, where the client knows it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidArgument(KdpoClientError):
    """An argument cannot be what was meant; nothing was sent."""


class ApiError(KdpoClientError):
    """The server refused: its code, hint and request id, and each place that is wrong.

    `body` is the whole answer (RFC 9457), with members such as `dataset_id` that only some errors
    have.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        hint: str | None = None,
        request_id: str | None = None,
        param: str | None = None,
        retryable: bool = False,
        errors: Sequence[ErrorItem] = (),
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.request_id = request_id
        self.param = param
        self.retryable = retryable
        self.errors = tuple(errors)
        self.body = dict(body or {})

    def __str__(self) -> str:
        """Say all that helps: status, message, the first places, hint, request id."""
        lines = [f"{self.status} {self.code}: {self.message}"]
        shown = self.errors[:_MAX_ITEMS_SHOWN]
        lines += [f"  {item.place}{item.detail}" for item in shown if item.detail != self.message]
        if len(self.errors) > len(shown):
            lines.append(f"  and {len(self.errors) - len(shown)} more")
        if self.hint is not None:
            lines.append(f"hint: {self.hint}")
        if self.request_id is not None:
            lines.append(f"request id: {self.request_id}")
        return "\n".join(lines)


class BadRequest(ApiError):
    """400: the server cannot read the request."""


class Unauthenticated(ApiError):
    """401: there is no API key, or it is unknown, revoked or expired."""


class PermissionDenied(ApiError):
    """403: the API key lacks a scope, or the server does not do this."""


class NotFound(ApiError):
    """404: no such object, or it is somebody else's."""


class Conflict(ApiError):
    """409: the object is in a state that does not allow this."""


class PreconditionFailed(ApiError):
    """412: the object has changed since it was read."""


class TooLarge(ApiError):
    """413: a body or file passes a limit of the server."""


class UnsupportedMedia(ApiError):
    """415: a file or content type that the server does not read."""


class InvalidRequest(ApiError):
    """422: the request, or the data in it, says something that cannot be done."""


class RateLimited(ApiError):
    """429: too many requests, or a quota is used up."""


class ServerFault(ApiError):
    """500 and above: the server failed; `request_id` finds the reason in its log."""


class ServerUnavailable(ServerFault):
    """503: a part of the server does not answer; trying later may help."""


class StorageFull(ServerFault):
    """507: the server's disk has no room."""


class ConnectionFailed(KdpoClientError):
    """The server cannot be reached, or the connection broke.

    `sent` is False when the server cannot have seen the request.
    """

    def __init__(self, message: str, *, sent: bool, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.sent = sent


class TimedOut(KdpoClientError):
    """What was waited for has not happened in the time that was given."""


class UnexpectedAnswer(KdpoClientError):
    """What came back is not what kdpo answers: another server, or a proxy, listens there."""


class DownloadFailed(KdpoClientError):
    """A downloaded file is not what its manifest says, or its name leads out of the folder."""


class _JobEnded(KdpoClientError):
    def __init__(self, job: Job) -> None:
        error = job.error
        why = "" if error is None else f": {error.message} ({error.code})"
        how = _ENDED.get(job.status, f"is {job.status}")
        hint = None if error is None else error.hint
        super().__init__(f"{job.kind} job {job.id} {how}{why}", hint=hint)
        self.job = job


class JobFailed(_JobEnded):
    """A job that was waited for has failed; `job.error` says why."""


class JobCancelled(_JobEnded):
    """A job that was waited for was cancelled."""


class JobPaused(_JobEnded):
    """A job that was waited for is paused, or a draft, and goes on when somebody resumes it."""


_ENDED: Mapping[str, str] = {"failed": "has failed", "cancelled": "was cancelled"}
_OF_STATUS: Mapping[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    412: PreconditionFailed,
    413: TooLarge,
    415: UnsupportedMedia,
    422: InvalidRequest,
    429: RateLimited,
    503: ServerUnavailable,
    507: StorageFull,
}


def api_error(status: int, body: object, *, request_id: str | None) -> ApiError:
    """Return the error of an answer; a body that is no problem of kdpo's is told as it came."""
    kind = _OF_STATUS.get(status, ServerFault if status >= 500 else ApiError)
    if not isinstance(body, dict) or "code" not in body:
        return kind(
            f"the server answered {status} without saying why: {str(body)[:300]}",
            status=status,
            code="http_error",
            request_id=request_id,
            hint="is this the address of a kdpo server, or of a proxy in front of it?",
        )
    return kind(
        str(body.get("detail") or body.get("title") or body["code"]),
        status=status,
        code=str(body["code"]),
        hint=body.get("hint"),
        request_id=body.get("request_id") or request_id,
        param=(body.get("error") or {}).get("param"),
        retryable=bool(body.get("retryable")),
        errors=_items(body.get("errors")),
        body=body,
    )


def _items(found: object) -> list[ErrorItem]:
    try:
        return [ErrorItem.model_validate(item) for item in found] if isinstance(found, list) else []
    except ValidationError:
        return []
