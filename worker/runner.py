"""`python -m worker.runner --job … --attempt …`: the process of one attempt.

With `--spare` it imports what jobs of models need, and then waits until it is told its job. It dies
with its supervisor, works, and leaves `outcome.json`; the supervisor writes the state.
"""

import argparse
import gc
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, assert_never

from sqlalchemy.exc import DBAPIError

from core.errors import CancelRequested, Category, FailureCode, KdpoError, LeaseLost, RunAborted
from core.lifecycle import JobKind
from core.logs import configure_logging
from core.settings import Settings
from models.repositories.jobs import Fence, JobRepository
from models.session import Database, is_disk_full
from worker.context import JobContext, Preempted
from worker.ingest.files import full_disk_reason
from worker.jobs import validate_dataset
from worker.outcome import (
    Cancelled,
    DiskFull,
    ExitCode,
    Failed,
    JobFailure,
    Outcome,
    Succeeded,
    disk_full,
    write_outcome,
)
from worker.outcome import Preempted as PreemptedOutcome
from worker.parent import Parent

_log = logging.getLogger("kdpo.runner")

_POOL_SIZE = 2


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Run one attempt and return how the process should exit."""
    arguments = _parse(argv)
    stop = threading.Event()
    # The job's thread only asks `stop.is_set()`, which takes no lock that the handler could want.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # Ctrl+C reaches the worker, which decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = Parent(arguments.parent, stop)
    parent.follow(gives_a_job=arguments.spare)
    _offer_to_the_oom_killer()
    if arguments.spare:
        _import_models()
        fence = parent.fence()
    else:
        fence = Fence(arguments.job, arguments.attempt)
    settings = Settings()
    configure_logging(settings.log_level)
    database = Database(settings.database_url, pool_size=_POOL_SIZE)
    try:
        return run_attempt(settings, database, fence, stop=stop)
    except LeaseLost as error:
        _log.warning("%s; nothing is written", error.message)
        return ExitCode.LEASE_LOST
    finally:
        database.dispose()


def run_attempt(
    settings: Settings, database: Database, fence: Fence, *, stop: threading.Event
) -> ExitCode:
    """Do the job and leave its outcome.

    Raises:
        LeaseLost: the attempt does not own the job (any more).
    """
    with database.reading() as session:
        job = JobRepository(session).load(fence)
    context = JobContext(settings=settings, database=database, fence=fence, job=job, stop=stop)
    context.attempt_dir.mkdir(parents=True, exist_ok=True)
    outcome = _outcome_of(context)
    try:
        write_outcome(context.attempt_dir, outcome)
    except OSError as error:
        if full_disk_reason(error) is None:
            raise
        _log.error("%s is not written: %s", outcome.status, error)
        return ExitCode.DISK_FULL
    match outcome:
        case Succeeded():
            return ExitCode.OK
        case Failed():
            return ExitCode.FAILED
        case Cancelled():
            return ExitCode.CANCELLED
        case PreemptedOutcome():
            return ExitCode.PREEMPTED
        case DiskFull():
            return ExitCode.DISK_FULL
        case _:
            assert_never(outcome)


def _outcome_of(context: JobContext) -> Outcome:
    try:
        return Succeeded(result=_dispatch(context))
    except CancelRequested:
        return Cancelled()
    except Preempted:
        return PreemptedOutcome()
    except LeaseLost:
        raise
    except Exception as error:
        no_room = _no_room(error)
        if no_room is None:
            _log.exception("job %s failed", context.fence.job_id)
            return Failed(error=_failure(context, error))
        _log.exception("job %s found no room", context.fence.job_id)
        return disk_full(
            context.settings.root, no_room, job_id=context.fence.job_id,
            attempt=context.fence.attempt, phase=context.job.phase,
        )  # fmt: skip


def _no_room(error: BaseException | None) -> str | None:
    """Return why the disk or a database had no room, if an error says so or comes from that."""
    while error is not None:
        reason = full_disk_reason(error)
        if reason is not None:
            return reason
        if isinstance(error, DBAPIError) and is_disk_full(error):
            return "the database found no room"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _dispatch(context: JobContext) -> dict[str, Any]:
    """Do the job. Jobs that run models are imported here: a dataset job must not load torch."""
    match context.job.kind:
        case JobKind.DATASET:
            return validate_dataset.run(context)
        case JobKind.RECOMMENDATION:
            with _importing():
                from worker.jobs import recommend

            return recommend.run(context)
        case JobKind.TRAINING:
            with _importing():
                from worker.jobs import fine_tune

            return fine_tune.run(context)
        case JobKind.EXPORT:
            from worker.jobs import export

            return export.run(context)
        case JobKind.EVALUATION:
            with _importing():
                from worker.jobs import evaluate_checkpoint

            return evaluate_checkpoint.run(context)
        case JobKind.SEARCH:
            with _importing():
                from worker.jobs import help_search

            return help_search.run(context)
        case _:
            assert_never(context.job.kind)


@contextmanager
def _importing() -> Iterator[None]:
    """Import without looking for garbage: torch and transformers make millions of lasting objects.

    They are left out of all later collections too; on a CPU this saves a seventh of the imports.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _import_models() -> None:
    """Import what jobs of models need; a job that needs what cannot be imported fails by itself."""
    with _importing():
        try:
            for name in ("fine_tune", "recommend", "export", "help_search", "evaluate_checkpoint"):
                importlib.import_module(f"worker.jobs.{name}")
        except Exception:
            _log.exception("a spare runner could not import all that jobs need")


def _failure(context: JobContext, raised: Exception) -> JobFailure:
    """Say in public terms what went wrong; the traceback stays in the log."""
    error = raised if isinstance(raised, KdpoError) else _as_kdpo_error(raised)
    return JobFailure(
        code=_code_of(error), message=error.message, hint=error.hint, retryable=error.retryable,
        phase=context.job.phase, attempt=context.fence.attempt,
        errors=[asdict(detail) for detail in error.errors],
    )  # fmt: skip


def _as_kdpo_error(error: Exception) -> RunAborted:
    if is_out_of_memory(error):
        return RunAborted(
            "the machine has not enough memory for this job",
            failure=FailureCode.OUT_OF_MEMORY,
            hint="lower batch_size or max_length, or take a smaller model",
        )
    return RunAborted(
        "an error inside kdpo ended the job",
        failure=FailureCode.INTERNAL,
        hint="log_tail and the log of the attempt have the details",
    )


def _code_of(error: KdpoError) -> FailureCode:
    """Return the public reason of a job's end for an error that is meant for people."""
    if error.code in {code.value for code in FailureCode}:
        return FailureCode(error.code)
    if error.code == "model_unreachable":
        return FailureCode.DEPENDENCY_ERROR
    if error.code.startswith("model_"):
        return FailureCode.MODEL_NOT_FOUND
    match error.category:
        case Category.UNAVAILABLE:
            return FailureCode.DEPENDENCY_ERROR
        case (
            Category.INVALID | Category.MALFORMED | Category.TOO_LARGE | Category.UNSUPPORTED_MEDIA
        ):
            # A job's other input was checked when it was made; what is left to refuse is the data.
            return FailureCode.DATASET_INVALID
        case _:
            return FailureCode.INTERNAL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device ran out; torch need not be loaded to know."""
    if isinstance(error, MemoryError):
        return True
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(error).__mro__}
    if names & {"torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}:
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


# ------------------------------------------------------------------ the process


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="worker.runner", description="Run one attempt at a job.")
    begins = parser.add_mutually_exclusive_group(required=True)
    begins.add_argument("--job")
    begins.add_argument("--spare", action="store_true", help="be told the job on standard input")
    parser.add_argument("--attempt", type=int, help="of the job")
    parser.add_argument("--parent", required=True, type=int, help="process id of the supervisor")
    arguments = parser.parse_args(argv)
    if arguments.spare != (arguments.attempt is None):
        parser.error("--attempt goes with --job, and not with --spare")
    return arguments


def _offer_to_the_oom_killer() -> None:
    with suppress(OSError):  # not on this system, or not allowed in this container
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    with suppress(OSError):  # the log is on the disk that may be full
        sys.stdout.flush()
    # Not sys.exit: a library's thread or teardown must not delay or change how the attempt ended.
    os._exit(code)
