"""The processes of a final run, started, joined and ended by the first of them.

They are its children in its process group and end when their standard input does, so that nothing
is left of a run when its runner is gone, however it went.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import orjson
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import _abort_process_group

from core.errors import FailureCode, KdpoError, RunAborted
from core.lifecycle import EndedBy
from worker.training.checkpoint import SavedState
from worker.training.rank_job import RankJob
from worker.training.ranks import Ranks
from worker.training.run import DidNotFit, Ended, RunHooks

# One process may write a large resume point while the others wait for it.
_TIMEOUT = timedelta(hours=2)
_POLL_S, _GRACE_S, _LOG_TAIL = 0.1, 10.0, 500
_LOOPBACK = "127.0.0.1"
_END = "end"


@contextmanager
def joined(store: TCPStore, *, rank: int, size: int, device: str) -> Iterator[None]:
    """Be process `rank` of a group within the block, for torch and for accelerate.

    All have to leave it by its end, or each by an exception.
    """
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": store.port,
        # Else accelerate chooses for us.
        "OMP_NUM_THREADS": torch.get_num_threads(),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
        )
        try:
            yield
        except BaseException:
            abort(device)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def abort(device: str) -> None:
    """Give a broken group up: NCCL would wait for processes that no longer come; gloo notices."""
    if device == "cuda" and dist.is_initialized():
        _abort_process_group()


def tell_the_end(store: TCPStore) -> None:
    """Let the others leave the group together with the first, who says so."""
    store.set(_END, "1")


def wait_for_the_end(store: TCPStore) -> None:
    """Wait until the first process is done; polled, as the group uses the store meanwhile."""
    while not store.check([_END]):
        time.sleep(_POLL_S)


def failure_file(folder: Path, rank: int) -> Path:
    """Where a process says what did not fit into its device's memory."""
    return folder / f"failed-{rank}.json"


@contextmanager
def other_processes(
    job: RankJob, folder: Path, *, size: int, saved: SavedState | None, hooks: RunHooks
) -> Iterator[Ranks]:
    """Start the other processes and be the first of the group; none is left after the block."""
    shutil.rmtree(folder, ignore_errors=True)
    threads = torch.get_num_threads()
    children: list[subprocess.Popen[bytes]] = []
    try:
        job.write(folder, saved)
        # It lives here: another process could end while somebody still asks it.
        store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
        for rank in range(1, size):
            children.append(_start(folder, rank, size, store.port))  # noqa: PERF401  # all are ended
        torch.set_num_threads(job.threads)
        _wait_for(children, folder, store, waiting=hooks.raise_if_stopped)
        with joined(store, rank=0, size=size, device=job.device):
            lost = threading.Event()

            def give_up() -> None:
                lost.set()
                abort(job.device)

            try:
                with watched(children, ended=give_up):
                    yield Ranks(rank=0, size=size, sharded=job.sharded)
            except Exception as error:
                # The group broke: what ended the other process says why.
                is_ours = isinstance(error, KdpoError)
                if isinstance(error, RuntimeError) or (lost.is_set() and not is_ours):
                    _raise_failure(children, folder, cause=error)
                raise
            tell_the_end(store)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)
    finally:
        torch.set_num_threads(threads)
        _end(children)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def watched(
    children: list[subprocess.Popen[bytes]], *, ended: Callable[[], None]
) -> Iterator[None]:
    """Call `ended` in a thread when a process ends within the block: NCCL would wait."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            if any(child.poll() is not None for child in children):
                ended()
                return

    thread = threading.Thread(target=watch, name="ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _start(folder: Path, rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
    with (folder / f"rank-{rank}.log").open("wb") as log:
        # Whoever asks the runner to stop asks its whole group; the runner decides when all do.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "worker.training.rank_main"),
                    *(str(folder), str(rank), str(size), str(port)),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for(
    children: list[subprocess.Popen[bytes]],
    folder: Path,
    store: TCPStore,
    *,
    waiting: Callable[[], None],
) -> None:
    """Wait until all have loaded their model, so that joining them takes no time."""
    names = [f"ready/{rank}" for rank in range(1, len(children) + 1)]
    while not store.check(names):
        waiting()
        if any(child.poll() is not None for child in children):
            _raise_failure(children, folder, cause=None)
        time.sleep(_POLL_S)


def _raise_failure(
    children: list[subprocess.Popen[bytes]], folder: Path, *, cause: Exception | None
) -> None:
    """Raise what a process that ended has left to say; nothing if all of them run."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        for rank, child in enumerate(children, start=1):
            if child.poll() is None:
                continue
            said = failure_file(folder, rank)
            if said.is_file():
                failure = orjson.loads(said.read_bytes())
                kind = DidNotFit if failure["did_not_fit"] else Ended
                raise kind(EndedBy.OOM, failure["message"]) from cause
            lines = (folder / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()
            raise RunAborted(
                f"process {rank} of the run ended with status {child.returncode}: "
                f"{lines[-1][:_LOG_TAIL] if lines else 'it said nothing'}",
                failure=FailureCode.INTERNAL,
                hint="the job can be started again; report this if it happens twice",
            ) from cause
        time.sleep(_POLL_S)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """End them all at once: they have nothing to save, and one may not even have begun."""
    for child in children:
        child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()
