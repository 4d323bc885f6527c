"""One of the processes of a final run, other than the first; see `distributed.py`."""

import logging
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

import orjson
import torch
from torch._C._distributed_c10d import TCPStore

from core.lifecycle import EndedBy
from worker.training.checkpoint import SavedState
from worker.training.distributed import prepare
from worker.training.processes import failure_file, joined, wait_for_the_end
from worker.training.rank_job import RankJob
from worker.training.ranks import Ranks
from worker.training.run import DidNotFit
from worker.training.trainer import drive


class _Follower:
    """Hooks and store of a process that says nothing, saves nothing, and stops with the first."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The first process reports."""

    def stepped(self, step: int, total: int) -> None:
        """The first process reports."""

    def stopping(self) -> bool:
        """The first process is asked to stop."""
        return False

    def raise_if_stopped(self) -> None:
        """Called when the first process stops: wait for it to end this one, once it has saved."""
        while True:
            threading.Event().wait()

    def save(self, state: SavedState) -> None:
        """The first process saves."""

    def load(self) -> SavedState | None:
        """The point has come with the job."""
        return None

    def is_due(self) -> bool:
        """The first process decides."""
        return False


def main(arguments: list[str]) -> NoReturn:
    """Train as process `rank` of `size`, then wait for the first to be done."""
    folder, rank, size, port = Path(arguments[0]), *map(int, arguments[1:])
    threading.Thread(target=_follow_pipe, name="parent", daemon=True).start()
    logging.basicConfig(level=logging.INFO)
    job, saved = RankJob.read(folder)
    torch.set_num_threads(job.threads)
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    policy = job.policy(device)
    store = TCPStore("127.0.0.1", port, is_master=False)
    store.set(f"ready/{rank}", "1")
    follower = _Follower()
    with joined(store, rank=rank, size=size, device=job.device):
        ranks = Ranks(rank=rank, size=size, sharded=job.sharded)
        try:
            run, validate = prepare(job, policy, job.build_objective(policy), ranks, saved)
            ended_by, message = drive(
                run, hooks=follower, folder=folder, store=follower, validate=validate
            )
        except DidNotFit as end:
            _fail(folder, rank, str(end), did_not_fit=True)
        if ended_by is EndedBy.OOM:
            _fail(folder, rank, message, did_not_fit=False)
        wait_for_the_end(store)
    # At once: how gloo's threads wind down is not ours.
    os._exit(0)


def _fail(folder: Path, rank: int, message: str, *, did_not_fit: bool) -> NoReturn:
    failure = {"message": f"process {rank}: {message}", "did_not_fit": did_not_fit}
    failure_file(folder, rank).write_bytes(orjson.dumps(failure))
    # The others wait inside the step that this one left: the broken group or their watch tells.
    os._exit(1)


def _follow_pipe() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    # At once, whatever is under way.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
