"""Exit codes of the command `kdpo`, and what an error says on the way out."""

import sys
from enum import IntEnum
from typing import NoReturn

from core.errors import Category, KdpoError
from kdpo.errors import (
    ApiError,
    ConnectionFailed,
    InvalidArgument,
    JobPaused,
    KdpoClientError,
    ServerUnavailable,
    TimedOut,
    UnexpectedAnswer,
)


class Exit(IntEnum):
    """What a script can tell apart; docs/cli.md has the table."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_ALLOWED = 4
    UNREACHABLE = 5
    REFUSED = 6
    CONFLICT = 7
    NOT_FINISHED = 8
    INTERRUPTED = 130


_OF_STATUS = {
    400: Exit.REFUSED,
    401: Exit.NOT_ALLOWED,
    403: Exit.NOT_ALLOWED,
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    413: Exit.REFUSED,
    415: Exit.REFUSED,
    422: Exit.REFUSED,
    429: Exit.REFUSED,
}


def exit_of(error: KdpoClientError) -> Exit:
    """Return the exit code of an error of the client."""
    match error:
        case ConnectionFailed() | ServerUnavailable() | UnexpectedAnswer():
            return Exit.UNREACHABLE
        case ApiError():
            return _OF_STATUS.get(error.status, Exit.FAILED)
        case InvalidArgument():
            return Exit.USAGE
        case JobPaused() | TimedOut():
            return Exit.NOT_FINISHED
        case _:
            return Exit.FAILED


def exit_of_own(error: KdpoError) -> Exit:
    """Return the exit code of an error of the server's commands."""
    return Exit.NOT_FOUND if error.category is Category.NOT_FOUND else Exit.FAILED


def leave(code: Exit, message: str, hint: str | None = None) -> NoReturn:
    """Say what went wrong, in one line and a hint, and end."""
    sys.stderr.write(f"kdpo: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.exit(code)


def leave_with(error: KdpoClientError) -> NoReturn:
    """End with what an error of the client says: the first places, the hint, the request id."""
    if not isinstance(error, ApiError):
        leave(exit_of(error), error.message, error.hint)
    head, *more = str(error).removeprefix(f"{error.status} {error.code}: ").splitlines()
    sys.stderr.write("\n".join([f"kdpo: {head}", *more]) + "\n")
    sys.exit(exit_of(error))
