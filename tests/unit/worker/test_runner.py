"""What a runner leaves behind, and what it makes of errors."""

import ast
import errno
import resource
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from sqlalchemy.exc import OperationalError

from core import errors
from core.errors import (
    CancelRequested,
    Conflict,
    ErrorDetail,
    FailureCode,
    InvalidInput,
    KdpoError,
    LeaseLost,
    NotFound,
    NotPermitted,
    RunAborted,
    StorageFull,
    TooLarge,
    Unavailable,
)
from core.lifecycle import JobKind, Phase
from core.queue import QueueName
from core.settings import Settings
from models.repositories.jobs import Fence, JobRepository
from models.repositories.owners import OwnerRepository
from models.session import Database
from worker import runner
from worker.context import JobContext, Preempted
from worker.outcome import (
    OUTCOME_NAME,
    Cancelled,
    DiskFull,
    ExitCode,
    Failed,
    Succeeded,
    read_outcome,
    write_outcome,
)
from worker.outcome import Preempted as PreemptedOutcome


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url, pool_size=2)
    yield database
    database.dispose()


@pytest.fixture
def fence(database: Database) -> Fence:
    with database.transaction() as session:
        owner = OwnerRepository(session).ensure("owner")
        jobs = JobRepository(session)
        jobs.create(owner_id=owner.id, kind=JobKind.DATASET, spec={})
        claim = jobs.claim(QueueName.CPU, worker_id="w", lease_s=60.0)
    assert claim is not None
    return claim.fence


def run_raising(
    error: BaseException, database: Database, fence: Fence, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ExitCode:  # fmt: skip
    """Run an attempt whose job reaches a phase and raises."""

    def job(context: JobContext) -> dict[str, Any]:
        context.phase(Phase.CONVERTING)
        raise error

    monkeypatch.setattr("worker.jobs.validate_dataset.run", job)
    settings = Settings(data_dir=folder)
    return runner.run_attempt(settings, database, fence, stop=threading.Event())


SQLITE_FULL = sqlite3.OperationalError("database or disk is full")
SQLITE_FULL.sqlite_errorcode = sqlite3.SQLITE_FULL
ROOT = Path(__file__).parents[3]
# What a job's input can be refused for: raised by the models' side and by the ingest.
_INPUT_SOURCES = ("core/hub.py", "core/modelref.py", "worker/ingest/*.py")


def raised_with_code() -> set[tuple[type[KdpoError], str]]:
    """Return every error class and literal code that the sources of input errors make."""
    found = set()
    for file in (file for pattern in _INPUT_SOURCES for file in ROOT.glob(pattern)):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            made = getattr(errors, node.func.id, None)
            if not (isinstance(made, type) and issubclass(made, KdpoError)):
                continue
            for keyword in node.keywords:
                if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                    found.add((made, str(keyword.value.value)))
    return found


def test_no_error_about_input_is_called_internal() -> None:
    made = raised_with_code()
    assert len(made) > 8
    unnamed = {
        code for cls, code in made if runner._code_of(cls("x", code=code)) is FailureCode.INTERNAL
    }
    assert unnamed == set()


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (RunAborted("x", failure=FailureCode.LOSS_NAN), "loss_nan", False),
        (RunAborted("x", failure=FailureCode.TIME_LIMIT, retryable=True), "time_limit", True),
        (InvalidInput("x", code="model_not_found"), "model_not_found", False),
        (InvalidInput("x", errors=[ErrorDetail("c", "d")]), "dataset_invalid", False),
        (InvalidInput("x", code="canonical_damaged"), "dataset_invalid", False),
        (TooLarge("x"), "dataset_invalid", False),
        (InvalidInput("x", code="model_gated"), "model_gated", False),
        (InvalidInput("x", code="model_damaged"), "model_not_found", False),
        (InvalidInput("x", code="model_unreachable", retryable=True), "dependency_error", True),
        (NotPermitted("x", code="model_not_allowed"), "model_not_found", False),
        (NotFound("x"), "internal", False),
        (Conflict("x"), "internal", False),
        (Unavailable("x"), "dependency_error", True),
        (MemoryError(), "out_of_memory", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
         "out_of_memory", False),
        (PermissionError(errno.EACCES, "no"), "internal", False),
        (RuntimeError("a secret detail"), "internal", False),
    ],
)  # fmt: skip
def test_errors_become_failures_with_public_words(
    error: Exception, code: str, retryable: bool, database: Database, fence: Fence,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert run_raising(error, database, fence, tmp_path, monkeypatch) is ExitCode.FAILED
    outcome = read_outcome(tmp_path / "artifacts" / "jobs" / fence.job_id / "a1")
    assert isinstance(outcome, Failed)
    assert (outcome.error.code, outcome.error.retryable) == (code, retryable)
    assert (outcome.error.phase, outcome.error.attempt) == (Phase.CONVERTING, 1)
    assert "secret" not in outcome.error.message
    if isinstance(error, InvalidInput):
        assert [detail["code"] for detail in outcome.error.errors] == [e.code for e in error.errors]


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("a library says it in its own way")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StorageFull("no room left under /data"), "no room left under /data"),
        (OSError(errno.ENOSPC, "No space left"), "No space left on device"),
        (OSError(errno.EDQUOT, "Quota"), "Disk quota exceeded"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large"),
        (OperationalError("INSERT", {}, SQLITE_FULL), "the database found no room"),
        (caused_by(OperationalError("INSERT", {}, SQLITE_FULL)), "the database found no room"),
        (caused_by(OSError(errno.ENOSPC, "No space left")), "No space left on device"),
    ],
)
def test_a_full_disk_is_no_failure_and_says_what_to_do(
    error: Exception, reason: str, database: Database, fence: Fence, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    exit_code = run_raising(error, database, fence, tmp_path, monkeypatch)
    assert exit_code is ExitCode.DISK_FULL
    outcome = read_outcome(tmp_path / "artifacts" / "jobs" / fence.job_id / "a1")
    assert isinstance(outcome, DiskFull)
    assert (outcome.error.code, outcome.error.retryable) == (FailureCode.DISK_FULL, True)
    assert (outcome.error.phase, outcome.error.attempt) == (Phase.CONVERTING, 1)
    assert outcome.error.message == (
        f"the disk is full: {reason}; {outcome.free_bytes} bytes are free under {tmp_path}"
    )
    assert f"/v1/jobs/{fence.job_id}/resume" in str(outcome.error.hint)
    assert outcome.folder == str(tmp_path)


def test_an_outcome_that_finds_no_room_is_told_by_the_exit_code(
    database: Database, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path)
    monkeypatch.setattr("worker.jobs.validate_dataset.run", lambda _: {"n": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        code = runner.run_attempt(settings, database, fence, stop=threading.Event())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code is ExitCode.DISK_FULL
    folder = tmp_path / "artifacts" / "jobs" / fence.job_id / "a1"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "exit_code", "kind"),
    [
        (CancelRequested("x"), ExitCode.CANCELLED, Cancelled),
        (Preempted("x"), ExitCode.PREEMPTED, PreemptedOutcome),
    ],
)
def test_stops_are_no_failures(
    error: Exception, exit_code: ExitCode, kind: type, database: Database, fence: Fence,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert run_raising(error, database, fence, tmp_path, monkeypatch) is exit_code
    assert isinstance(read_outcome(tmp_path / "artifacts" / "jobs" / fence.job_id / "a1"), kind)


def test_lost_lease_leaves_no_outcome(
    database: Database, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LeaseLost):
        run_raising(LeaseLost("x"), database, fence, tmp_path, monkeypatch)
    assert read_outcome(tmp_path / "artifacts" / "jobs" / fence.job_id / "a1") is None


def test_attempt_that_owns_nothing_does_nothing(
    database: Database, fence: Fence, tmp_path: Path
) -> None:
    stale = Fence(fence.job_id, fence.attempt + 1)
    with pytest.raises(LeaseLost):
        runner.run_attempt(Settings(data_dir=tmp_path), database, stale, stop=threading.Event())
    assert list(tmp_path.rglob("a2")) == []


@pytest.mark.parametrize(
    "wrong", [[], ["--spare", "--attempt", "1"], ["--job", "a"], ["--spare", "--job", "a"]]
)
def test_a_runner_has_a_job_or_is_a_spare(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--parent", "1", *wrong])
    assert "--job" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{", '{"status": "succeeded"}', '{"status": "other"}'])
def test_damaged_outcome_is_none(damage: str, tmp_path: Path) -> None:
    write_outcome(tmp_path, Succeeded(result={"n": 1}))
    assert read_outcome(tmp_path) == Succeeded(result={"n": 1})
    (tmp_path / OUTCOME_NAME).write_text(damage)
    assert read_outcome(tmp_path) is None
