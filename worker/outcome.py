"""What an attempt's process tells its supervisor: one file, written whole, and an exit code."""

from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from core.errors import FailureCode
from core.lifecycle import Phase
from worker.ingest.files import atomic_writer

OUTCOME_NAME = "outcome.json"
LOG_NAME = "log.txt"


class ExitCode(IntEnum):
    """Exit codes of a runner; any other one means that it crashed or was killed."""

    OK = 0
    FAILED = 70
    CANCELLED = 71
    LEASE_LOST = 72
    PREEMPTED = 75


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobFailure(_Part):
    """Why an attempt failed, as the job's `error` shows it."""

    code: FailureCode
    message: str
    hint: str | None
    retryable: bool
    phase: Phase | None
    attempt: int
    errors: list[dict[str, Any]]
    log_tail: list[str] = []


class Succeeded(_Part):
    status: Literal["succeeded"] = "succeeded"
    result: dict[str, Any]


class Failed(_Part):
    status: Literal["failed"] = "failed"
    error: JobFailure


class Cancelled(_Part):
    status: Literal["cancelled"] = "cancelled"


class Preempted(_Part):
    status: Literal["preempted"] = "preempted"


Outcome = Succeeded | Failed | Cancelled | Preempted

_ADAPTER: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="status")])


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write the outcome; after this the attempt's process may die in any way."""
    with atomic_writer(folder / OUTCOME_NAME) as file:
        file.write(_ADAPTER.dump_json(outcome))


def read_outcome(folder: Path) -> Outcome | None:
    """Return the outcome that an attempt left; None when it left none that can be read."""
    try:
        return _ADAPTER.validate_json((folder / OUTCOME_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
