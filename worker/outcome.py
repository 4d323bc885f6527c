"""What an attempt's process tells its supervisor: one file, written whole, and an exit code."""

import shutil
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from core.errors import FailureCode
from core.lifecycle import Phase
from core.logs import LOG_NAME as LOG_NAME
from core.search_files import TRIALS as TRIALS
from worker.ingest.files import atomic_writer

OUTCOME_NAME = "outcome.json"


class ExitCode(IntEnum):
    """Exit codes of a runner; any other one means that it crashed or was killed."""

    OK = 0
    FAILED = 70
    CANCELLED = 71
    LEASE_LOST = 72
    DISK_FULL = 74
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


class DiskFull(_Part):
    """The disk gave no room; nothing is lost, and a person must make some."""

    status: Literal["disk_full"] = "disk_full"
    error: JobFailure
    folder: str
    free_bytes: int


Outcome = Succeeded | Failed | Cancelled | Preempted | DiskFull

_ADAPTER: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="status")])


def disk_full(
    folder: Path, reason: str, *, job_id: str, attempt: int, phase: Phase | None = None
) -> DiskFull:
    """Say that a job found no room, how much there is now, and what to do."""
    free = shutil.disk_usage(folder).free
    return DiskFull(
        error=JobFailure(
            code=FailureCode.DISK_FULL,
            message=f"the disk is full: {reason}; {free} bytes are free under {folder}",
            hint=f"Free disk space, then resume the job: POST /v1/jobs/{job_id}/resume",
            retryable=True, phase=phase, attempt=attempt, errors=[],
        ),
        folder=str(folder),
        free_bytes=free,
    )  # fmt: skip


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
