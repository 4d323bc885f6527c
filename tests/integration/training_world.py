"""A data folder with a database, an ingested dataset and a model, and attempts at jobs on them."""

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from core.ids import IdPrefix, new_id
from core.lifecycle import AttemptOutcome, JobKind, JobStatus
from core.modelref import ModelRef
from core.queue import QueueName
from core.run_spec import DatasetPolicy
from core.settings import DbSettings, Settings, TrainingSettings, WorkerSettings
from models.repositories.datasets import DatasetRepository
from models.repositories.job_claims import Claim
from models.repositories.jobs import JobRepository
from models.repositories.owners import OwnerRepository
from models.session import Database
from worker.context import JobContext, Preempted
from worker.ingest.pipeline import ingest

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LM = EXAMPLES / "models" / "tiny-lm"
TRUTHFULQA = EXAMPLES / "data" / "truthfulqa-600.jsonl.gz"


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


class StopAfter(threading.Event):
    """A stop signal that arrives when it has been asked for `polls` times."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self._left = polls

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


Job = Callable[[JobContext], dict[str, Any]]


def micro_llama(folder: Path) -> Path:
    """Write a random Llama of 0.1 million parameters with tiny-lm's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM, local_files_only=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class TrainingWorld:
    """Everything a job needs; jobs run in this process."""

    settings: Settings
    database: Database
    owner_id: str
    dataset_id: str
    model: Path

    def job(self, kind: JobKind, *, spec: dict[str, Any], seed: int = 7) -> str:
        """Queue a job and return its id."""
        with self.database.transaction() as session:
            job = JobRepository(session).create(
                owner_id=self.owner_id, kind=kind, spec=spec, dataset_id=self.dataset_id,
                model=str(self.model), seed=seed,
            )  # fmt: skip
            return job.id

    def model_ref(self) -> dict[str, Any]:
        return ModelRef(name=self.model.name, source="local", path=self.model).model_dump(
            mode="json"
        )

    def fine_tune(self, method: dict[str, Any], *, encoder: Path | None = None) -> str:
        ref = None
        if encoder is not None:
            ref = ModelRef(name="encoder", source="local", path=encoder).model_dump(mode="json")
        spec = {"model": self.model_ref(), "method": method, "encoder": ref}
        return self.job(JobKind.TRAINING, spec=spec)

    def claim(self) -> Claim | None:
        """Take the job that is due."""
        with self.database.transaction() as session:
            return JobRepository(session).claim(QueueName.GPU, worker_id="wrk_test", lease_s=3600)

    def context(self, claim: Claim, *, stop: threading.Event | None = None) -> JobContext:
        """What the job's function is given."""
        with self.database.reading() as session:
            job = JobRepository(session).load(claim.fence)
        context = JobContext(
            settings=self.settings, database=self.database, fence=claim.fence, job=job,
            stop=stop or threading.Event(),
        )  # fmt: skip
        context.attempt_dir.mkdir(parents=True, exist_ok=True)
        return context

    def attempt(self, run: Job, *, stop: threading.Event | None = None) -> dict[str, Any]:
        """Claim the job that is due and do it; a preempted one goes back to its queue."""
        claim = self.claim()
        assert claim is not None, "no job is due"
        context = self.context(claim, stop=stop)
        try:
            result = run(context)
        except (Preempted, Killed):
            with self.database.transaction() as session:
                JobRepository(session).requeue(
                    claim.fence, AttemptOutcome.LOST, delay_s=0, message="the process ended"
                )
            raise
        with self.database.transaction() as session:
            JobRepository(session).finish(
                claim.fence, JobStatus.SUCCEEDED, result=result, message="done"
            )
        return result


@contextmanager
def running_world(root: Path, *, url: str, model: Path, pairs: int) -> Iterator[TrainingWorld]:
    """A world on one thread, on whose number results depend; its database is closed at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = make_world(root, url=url, model=model, pairs=pairs)
    try:
        yield made
    finally:
        made.database.dispose()
        torch.set_num_threads(threads)


def make_world(root: Path, *, url: str, model: Path, pairs: int) -> TrainingWorld:
    """Ingest the first `pairs` pairs of TruthfulQA for a new owner."""
    settings = Settings(
        data_dir=root,
        db=DbSettings.model_validate({"url": url}),
        training=TrainingSettings(num_threads=1, checkpoint_every_s=0.0, progress_every_s=1e-9),
        worker=WorkerSettings(spare_runner=False),
    )
    database = Database(url)
    upload = root / "upload.jsonl"
    with gzip.open(TRUTHFULQA, "rb") as file:
        upload.write_bytes(b"".join(file.readlines()[:pairs]))
    dataset_id, job_id = new_id(IdPrefix.DATASET), new_id(IdPrefix.JOB)
    policy = DatasetPolicy()
    found = ingest(
        upload, out_dir=settings.artifact_dir / "datasets" / dataset_id, dataset_id=dataset_id,
        policy=policy, limits=settings.data, on_progress=lambda _done, _total: None,
    )  # fmt: skip
    assert found.failure is None
    with database.transaction() as session:
        owner = OwnerRepository(session).ensure("ada")
        datasets = DatasetRepository(session)
        datasets.create(
            dataset_id=dataset_id, owner_id=owner.id, job_id=job_id, name="t", sha256="0" * 64,
            size_bytes=upload.stat().st_size, policy=policy.model_dump(mode="json"),
        )  # fmt: skip
        datasets.record_result(
            dataset_id, status=found.status, report=found.report, counts={"pairs": found.num_pairs},
            canonical_sha256=found.canonical_sha256, failure=None,
        )  # fmt: skip
        owner_id = owner.id
    return TrainingWorld(settings, database, owner_id, dataset_id, model)


def canonical_bytes(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
