"""Real workers on a real database and broker, for tests that hurt them."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from core.ids import IdPrefix, new_id
from core.lifecycle import AttemptOutcome, EventType, JobKind
from core.run_spec import DatasetPolicy
from core.settings import Settings
from models.dataset import Dataset
from models.job import Event, Job
from models.repositories.datasets import DatasetRepository
from models.repositories.events import events_after
from models.repositories.jobs import Fence, JobRepository
from models.repositories.owners import OwnerRepository
from models.session import Database
from worker.celery_app import CelerySender, make_celery

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
LEASE_S = 3.0
FAST = {
    "KDPO_WORKER__LEASE_S": str(LEASE_S),
    "KDPO_WORKER__HEARTBEAT_S": "0.5",
    "KDPO_WORKER__SELF_FENCE_S": "2",
    "KDPO_WORKER__REAP_S": "0.5",
    "KDPO_WORKER__SWEEP_S": "0.5",
    "KDPO_WORKER__KILL_GRACE_S": "5",
    "KDPO_WORKER__BACKOFF_S": "0.2",
    # Tests that need one ask for it: it costs seconds of imports.
    "KDPO_WORKER__SPARE_RUNNER": "false",
    "KDPO_TRAINING__PROGRESS_EVERY_S": "0.1",
}


def wait_for(what: str, condition: Callable[[], T | None], *, timeout_s: float = 30.0) -> T:
    """Return the first true value of the condition."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.03)
    raise AssertionError(f"waited {timeout_s} s in vain for {what}")


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def pairs(count: int) -> bytes:
    """Return JSON Lines with so many different pairs."""
    rows = (
        {"prompt": f"Question {n % 997}?", "chosen": f"Good answer {n}.", "rejected": f"No {n}."}
        for n in range(count)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@dataclass
class Stack:
    """One database, one broker, one data folder, and the workers that share them."""

    folder: Path
    environment: Mapping[str, str]
    settings: Settings
    database: Database
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, *queues: str, extra: Mapping[str, str] | None = None, parent_pipe: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a worker of the given queues."""
        log = (self.folder / f"worker-{len(self.processes)}.log").open("wb")
        command = [sys.executable, "-m", "worker.main"]
        for queue in queues or ("cpu",):
            command += ["--queue", queue]
        with log:
            process = subprocess.Popen(
                command + (["--parent-pipe"] if parent_pipe else []),
                cwd=ROOT,
                env={**self.environment, **(extra or {})},
                stdin=subprocess.PIPE if parent_pipe else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def sender(self) -> CelerySender:
        return CelerySender(make_celery(self.settings), self.settings)

    def submit(self, data: bytes) -> str:
        """Do what the API does with an upload; return the job."""
        dataset_id, job_id = new_id(IdPrefix.DATASET), new_id(IdPrefix.JOB)
        self.settings.upload_dir.mkdir(parents=True, exist_ok=True)
        (self.settings.upload_dir / dataset_id).write_bytes(data)
        with self.database.transaction() as session:
            owner = OwnerRepository(session).ensure("tester")
            DatasetRepository(session).create(
                dataset_id=dataset_id, owner_id=owner.id, job_id=job_id, name="pairs",
                size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(),
                policy=DatasetPolicy().model_dump(mode="json"),
            )  # fmt: skip
            JobRepository(session).create(
                owner_id=owner.id, kind=JobKind.DATASET, spec={}, job_id=job_id,
                dataset_id=dataset_id,
            )  # fmt: skip
        return job_id

    def job(self, job_id: str) -> Job:
        with self.database.reading() as session:
            owner = OwnerRepository(session).ensure("tester")
            return JobRepository(session).get(owner.id, job_id)

    def dataset(self, job_id: str) -> Dataset:
        with self.database.reading() as session:
            return DatasetRepository(session).load(str(self.job(job_id).dataset_id))

    def cancel(self, job_id: str) -> Job:
        with self.database.transaction() as session:
            owner = OwnerRepository(session).ensure("tester")
            return JobRepository(session).request_cancel(owner.id, job_id)

    def events(self, job_id: str) -> list[Event]:
        with self.database.reading() as session:
            return events_after(session, job_id, 0, 10_000)

    def outcomes(self, job_id: str) -> list[AttemptOutcome | None]:
        """Return how the attempts ended, first one first."""
        with self.database.reading() as session:
            jobs = JobRepository(session)
            numbers = range(1, self.job(job_id).attempt + 1)
            return [jobs.attempt_outcome(Fence(job_id, number)) for number in numbers]

    def ended(self, job_id: str, *, timeout_s: float = 40.0) -> Job:
        """Wait for the end of a job."""

        def terminal() -> Job | None:
            job = self.job(job_id)
            return job if job.status.is_terminal else None

        try:
            return wait_for(f"the end of {job_id}", terminal, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def in_the_middle(self, job_id: str, *, attempt: int = 1) -> Job:
        """Wait until an attempt has begun to parse and is not done."""

        def busy() -> Job | None:
            job = self.job(job_id)
            assert not job.status.is_terminal, f"the job ended too early: {job.error}"
            return job if job.attempt == attempt and job.progress is not None else None

        try:
            return wait_for(f"attempt {attempt} to parse", busy)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def runner(self, worker: subprocess.Popen[bytes]) -> int:
        """Return the process id of the job that a worker runs."""

        def child() -> int | None:
            children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
            return int(children[0]) if children else None

        return wait_for("a runner", child)

    def assert_one_story(self, job_id: str) -> None:
        """Events are gapless, say `done` once and last, and every attempt is closed."""
        events = self.events(job_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [e.type for e in events].count(EventType.DONE) == 1
        assert events[-1].type is EventType.DONE
        assert None not in self.outcomes(job_id)

    def logs(self) -> str:
        files = self.folder.rglob("*.log"), self.settings.artifact_dir.rglob("log.txt")
        return "\n".join(f"== {f}\n{f.read_text()[-3000:]}" for group in files for f in group)

    def stop(self) -> None:
        """Kill all workers; their runners die with them."""
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


@contextmanager
def run_stack(folder: Path, *, database: str, broker: str | None) -> Iterator[Stack]:
    """Yield a stack whose workers end with the block."""
    own = {
        "KDPO_DATA_DIR": str(folder / "data"),
        "KDPO_DB__URL": database,
        "OMP_NUM_THREADS": "1",
        **({} if broker is None else {"KDPO_BROKER__URL": broker}),
        **FAST,
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KDPO_")}
    settings = Settings.model_validate(
        {
            "data_dir": folder / "data",
            "db": {"url": database},
            "broker": {"url": broker},
            "worker": {"lease_s": 3, "heartbeat_s": 0.5, "self_fence_s": 2, "sweep_s": 0.5},
        }
    )
    stack = Stack(folder, {**kept, **own}, settings, Database(database))
    try:
        yield stack
    finally:
        stack.stop()
        stack.database.dispose()
