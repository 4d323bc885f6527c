"""Every error that kdpo raises on purpose: a category, a stable code, and what to do.

No HTTP number lives here; `app/errors.py` maps a category to a status, `worker/supervisor.py`
maps it to the outcome of an attempt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Category(StrEnum):
    """What kind of fault an error is; each adapter maps the closed set to its own terms."""

    MALFORMED = "malformed"
    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    NOT_PERMITTED = "not_permitted"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    CHANGED = "changed"
    TOO_MANY = "too_many"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA = "unsupported_media"
    UNAVAILABLE = "unavailable"
    STORAGE_FULL = "storage_full"
    RUN_ABORTED = "run_aborted"


class FailureCode(StrEnum):
    """Why a job failed, as the job object's `error.code` says it."""

    DATASET_INVALID = "dataset_invalid"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_GATED = "model_gated"
    OUT_OF_MEMORY = "out_of_memory"
    LOSS_NAN = "loss_nan"
    WORKER_LOST = "worker_lost"
    TIME_LIMIT = "time_limit"
    BUDGET_EXHAUSTED = "budget_exhausted"
    DISK_FULL = "disk_full"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    DEPENDENCY_ERROR = "dependency_error"
    INTERNAL = "internal"


@dataclass(frozen=True)
class ErrorDetail:
    """One place in the input that is wrong: JSON pointer, line where there is one, code, hint."""

    code: str
    detail: str
    pointer: str | None = None
    line: int | None = None
    count: int | None = None
    hint: str | None = None


class KdpoError(Exception):
    """Root of all errors of kdpo.

    `message` says what was received and what was expected, `hint` what to do about it.
    """

    category: ClassVar[Category] = Category.RUN_ABORTED
    default_code: ClassVar[str] = "internal"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        param: str | None = None,
        errors: Sequence[ErrorDetail] = (),
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.param = param
        self.errors = tuple(errors)
        self.retryable = self.default_retryable if retryable is None else retryable


class MalformedRequest(KdpoError):
    """The request cannot be read at all."""

    category = Category.MALFORMED
    default_code = "malformed_request"


class InvalidInput(KdpoError):
    """The request can be read and says something that cannot be done."""

    category = Category.INVALID
    default_code = "invalid_input"


class Unauthenticated(KdpoError):
    """No valid API key came with the request."""

    category = Category.UNAUTHENTICATED
    default_code = "invalid_api_key"


class NotPermitted(KdpoError):
    """The key is valid and lacks the scope."""

    category = Category.NOT_PERMITTED
    default_code = "missing_scope"


class NotFound(KdpoError):
    """There is no such object, or it belongs to somebody else."""

    category = Category.NOT_FOUND
    default_code = "not_found"


class Conflict(KdpoError):
    """The object is in a state that does not allow this."""

    category = Category.CONFLICT
    default_code = "conflict"


class Changed(KdpoError):
    """The object is not in the version that the request was made for."""

    category = Category.CHANGED
    default_code = "precondition_failed"


class TooManyRequests(KdpoError):
    """The caller has as much of something as it may have at once; later there is room again."""

    category = Category.TOO_MANY
    default_code = "too_many_requests"
    default_retryable = True


class QuotaExceeded(TooManyRequests):
    """An owner would pass a limit: which one, how much of it is used, and when there is room."""

    default_code = "quota_exceeded"
    default_retryable = False

    def __init__(
        self,
        quota: str,
        *,
        limit: int,
        used: float,
        frees: str,
        frees_at: float | None = None,
        asked: int = 1,
    ) -> None:
        super().__init__(
            f"quota {quota}: {used:g} of {limit} used, {asked} more asked for; "
            f"there is room {frees}",
            hint="GET /v1/quotas shows all limits; an administrator can raise them",
        )
        self.quota = quota
        self.limit = limit
        self.used = used
        self.frees = frees
        self.frees_at = frees_at


class TooLarge(KdpoError):
    """A body, a line or a decompressed stream passes its limit."""

    category = Category.TOO_LARGE
    default_code = "too_large"


class UnsupportedMedia(KdpoError):
    """A container or content type that kdpo does not read."""

    category = Category.UNSUPPORTED_MEDIA
    default_code = "unsupported_media_type"


class Unavailable(KdpoError):
    """A dependency (database, broker, hub, worker) does not answer; trying again may help."""

    category = Category.UNAVAILABLE
    default_code = "unavailable"
    default_retryable = True


class StorageFull(KdpoError):
    """The disk has no room for what was asked."""

    category = Category.STORAGE_FULL
    default_code = "disk_full"
    default_retryable = True


class RunAborted(KdpoError):
    """A job cannot go on; `failure` is the public reason."""

    category = Category.RUN_ABORTED

    def __init__(
        self,
        message: str,
        *,
        failure: FailureCode,
        hint: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message, code=failure.value, hint=hint, retryable=retryable)
        self.failure = failure


class LeaseLost(KdpoError):
    """The attempt no longer owns its job: another one does, or the job has ended."""

    category = Category.CONFLICT
    default_code = "lease_lost"


class CancelRequested(KdpoError):
    """The user asked for the job to be cancelled; raised at a step boundary."""

    category = Category.CONFLICT
    default_code = "cancel_requested"
