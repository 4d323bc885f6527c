"""A running API on a fresh database, and workers that act through the repositories."""

import gzip
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.keys import Scope, make_key
from app.main import create_app
from core.errors import ErrorDetail, KdpoError
from core.lifecycle import JobKind, JobStatus
from core.profile import (
    Choice,
    DatasetProfile,
    Estimate,
    HistoryUse,
    KernelMetrics,
    Lead,
    RankedPair,
    Recommendation,
    ReferenceMetrics,
)
from core.queue import QUEUE_OF_KIND
from core.results import Comparison, Evaluation, GeneratedSample, RunSummary, TrainingResult
from core.run_spec import DatasetPolicy, SearchSpec
from core.settings import Settings
from core.spec import ObjectiveSpec
from models.job import Job as JobRow
from models.repositories.datasets import DatasetRepository
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import Fence, JobRepository
from models.repositories.owners import OwnerRepository
from models.repositories.searches import SearchRepository
from models.repositories.steps import StepRepository
from models.session import Database
from tests.integration.study_world import PLAIN_DPO, Made, pair, store_search
from worker.ingest.pipeline import CANONICAL_NAME, PARQUET_NAME, ingest
from worker.ingest.table_form import write_parquet
from worker.jobs.validate_dataset import published_files

ROOT = Path(__file__).parents[2]
MODEL_DIR = ROOT / "examples" / "models"
MODEL = "tiny-lm"
LEASE_S = 600.0  # no attempt of these tests ever renews it


def pairs(count: int) -> bytes:
    rows = (
        {"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": f"It is {i}!"}
        for i in range(count)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def stored_failure(error: KdpoError) -> dict[str, Any]:
    return {
        "category": error.category.value,
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "param": error.param,
        "retryable": error.retryable,
        "errors": [asdict(e) for e in error.errors if isinstance(e, ErrorDetail)],
    }


@dataclass
class World:
    app: FastAPI
    client: TestClient
    database: Database
    settings: Settings
    keys: dict[str, str] = field(default_factory=dict)

    # ------------------------------------------------------------ callers

    def key(self, owner: str = "ada", scopes: tuple[Scope, ...] = (Scope.ADMIN,)) -> str:
        new = make_key("test")
        with self.database.transaction() as session:
            owners = OwnerRepository(session)
            owners.add_key(
                owner_id=owners.ensure(owner).id,
                name="test",
                prefix=new.prefix,
                secret_sha256=new.sha256,
                scopes=[s.value for s in scopes],
            )
        return new.secret

    def headers(self, owner: str = "ada") -> dict[str, str]:
        if owner not in self.keys:
            self.keys[owner] = self.key(owner)
        return {"Authorization": f"Bearer {self.keys[owner]}"}

    def get(self, path: str, **more: Any) -> Any:
        return self.client.get(path, headers={**self.headers(), **more.pop("headers", {})}, **more)

    def post(self, path: str, **more: Any) -> Any:
        return self.client.post(path, headers={**self.headers(), **more.pop("headers", {})}, **more)

    # ------------------------------------------------- what workers would do

    def claim(self, kind: JobKind) -> Fence:
        with self.database.transaction() as session:
            claim = JobRepository(session).claim(
                QUEUE_OF_KIND[kind], worker_id="wrk_test", lease_s=LEASE_S
            )
        assert claim is not None, f"no {kind.value} job is queued"
        assert claim.kind is kind
        return claim.fence

    def finish(
        self, fence: Fence, status: JobStatus = JobStatus.SUCCEEDED, **more: dict[str, Any]
    ) -> None:
        with self.database.transaction() as session:
            JobRepository(session).finish(fence, status, message="done", **more)  # type: ignore[arg-type]

    def validate(self) -> None:
        """Do the next dataset job with the real ingest."""
        fence = self.claim(JobKind.DATASET)
        with self.database.reading() as session:
            dataset_id = session.get_one(JobRow, fence.job_id).dataset_id
            assert dataset_id is not None
            dataset = DatasetRepository(session).load(dataset_id)
        result = ingest(
            self.settings.upload_dir / dataset.upload_id,
            out_dir=self.settings.artifact_dir / "datasets" / dataset_id,
            dataset_id=dataset_id,
            policy=DatasetPolicy.model_validate(dataset.policy),
            limits=self.settings.data,
            on_progress=lambda _done, _total: None,
        )
        folder = self.settings.artifact_dir / "datasets" / dataset_id
        if result.canonical_sha256 is not None:
            write_parquet(folder / CANONICAL_NAME, folder / PARQUET_NAME, on_part=lambda: None)
        counts = result.report["counts"]
        assert isinstance(counts, dict)
        with self.database.transaction() as session:
            DatasetRepository(session).record_result(
                dataset_id,
                status=result.status,
                report=result.report,
                counts=counts,
                canonical_sha256=result.canonical_sha256,
                failure=None if result.failure is None else stored_failure(result.failure),
                files=published_files(folder),
            )
            JobRepository(session).finish(fence, JobStatus.SUCCEEDED, message="validated")

    def soon(self, do: Callable[[], None], kind: JobKind) -> threading.Thread:
        """Run `do` in the background as soon as a job of the kind is queued."""

        def wait_and_do() -> None:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with self.database.reading() as session:
                    queued = JobRepository(session).overdue_queues(older_than_s=-1.0)
                if QUEUE_OF_KIND[kind] in queued:
                    do()
                    return
                time.sleep(0.02)

        thread = threading.Thread(target=wait_and_do)
        thread.start()
        return thread

    # -------------------------------------------------------------- objects

    def upload(self, data: bytes | None = None, owner: str = "ada", **form: str) -> Any:
        return self.client.post(
            "/v1/datasets",
            files={"file": ("pairs.jsonl", pairs(30) if data is None else data)},
            data=form,
            headers={**self.headers(owner), "Prefer": "wait=0"},
        )

    def dataset(self, owner: str = "ada") -> str:
        answer = self.upload(owner=owner)
        assert answer.status_code == 202, answer.text
        self.validate()
        return str(answer.json()["id"])

    def training_job(self, dataset_id: str, owner: str = "ada", **body: Any) -> dict[str, Any]:
        answer = self.client.post(
            "/v1/fine_tuning/jobs",
            json={"model": MODEL, "dataset_id": dataset_id, **body},
            headers=self.headers(owner),
        )
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def train(self, job_id: str, owner: str = "ada") -> dict[str, str]:
        """Claim the training job and leave everything that such a job makes."""
        fence = self.claim(JobKind.TRAINING)
        assert fence.job_id == job_id
        with self.database.transaction() as session:
            job = session.get_one(JobRow, job_id)
            experiments = ExperimentRepository(session)
            steps = StepRepository(session)
            steps.plan(fence, ["recommend", "search", "train"])
            row = experiments.save_recommendation(
                fence,
                owner_id=job.owner_id,
                dataset_id=str(job.dataset_id),
                model=str(job.model),
                result=recommendation().model_dump(mode="json"),
            )
            steps.start(fence, "search")
            study = store_search(
                session, fence, job.owner_id,
                [Made(PLAIN_DPO, 0.61, drift=0.1), Made(objective("rbf"), 0.55, drift=0.1)],
                spec=SearchSpec(max_trials=2),
            )  # fmt: skip
            SearchRepository(session).end(study, by="finished", reason="all of the plan is done")
            steps.succeed(fence, "search", {"study_id": study.id})
            for step in (1, 2):
                experiments.record_metrics(
                    fence, job_id=job_id, scope="train", step=step, values={"loss": 0.7 / step}
                )
        checkpoint_id = self.publish(fence, {"model.safetensors": b"weights", "config.json": b"{}"})
        self.finish(fence, result=training_result(checkpoint_id).model_dump(mode="json"))
        return {"recommendation": row.id, "study": study.id, "checkpoint": checkpoint_id}

    def publish(self, fence: Fence, contents: dict[str, bytes], *, kind: str = "adapter") -> str:
        checkpoint_id = f"ckpt_{fence.job_id[-10:]}"
        folder = self.settings.artifact_dir / "checkpoints" / checkpoint_id
        for name, data in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        files = [
            {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        ]
        with self.database.transaction() as session:
            job = session.get_one(JobRow, fence.job_id)
            ExperimentRepository(session).publish_checkpoint(
                fence, owner_id=job.owner_id, checkpoint_id=checkpoint_id, kind=kind,
                label="best", step=2, path=f"checkpoints/{checkpoint_id}", files=files,
                manifest_sha256="0" * 64, size_bytes=sum(map(len, contents.values())), metrics={},
            )  # fmt: skip
        return checkpoint_id


@contextmanager
def running_api(database_url: str, tmp_path: Path, **settings: Any) -> Iterator[World]:
    database_file = {"url": database_url}
    made = Settings(
        data_dir=tmp_path / "data",
        db=database_file,
        models={"dirs": (MODEL_DIR,), "allow_local_paths": False, "hub_enabled": False},
        **settings,
    )
    database = Database(database_url, pool_size=2)
    app = create_app(made)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield World(app, client, database, made)
    database.dispose()


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.1)


def objective(kernel: str, divergence: str = "kl") -> ObjectiveSpec:
    return pair(kernel, divergence)


def recommendation() -> Recommendation:
    lead = Lead(margin=estimate(0.5), confidence=0.8, separated=True)
    ranking = tuple(
        RankedPair(
            rank=rank, kernel=kernel, divergence="kl", mode="penalty", score=estimate(1.0 / rank),
            behind=None if rank == 1 else lead,
            reason="its geometry separates the sides", evidence={"pnd": 0.4},
            objective=objective(kernel),
        )
        for rank, kernel in enumerate(("rbf", "polynomial"), start=1)
    )  # fmt: skip
    one = estimate(0.5)
    return Recommendation(
        kernel="rbf", divergence="kl", runner_up=ranking[1], margin=0.5, confidence=0.8,
        separated=True, kernels_separated=True, summary="rbf with kl", ranking=ranking,
        kernel_choice=Choice(
            name="rbf", runner_up="polynomial", lead=lead, tied=(), sentence="rbf leads."
        ),
        divergence_choice=Choice(
            name="kl", runner_up="hellinger", lead=lead, tied=(), sentence="kl leads."
        ),
        tied_pairs=0,
        history=HistoryUse(searches=0, weight=0.0, sentence="No finished searches were asked."),
        profile=DatasetProfile(
            pairs=30, prompts=30, sampled_pairs=30, sampled_prompts=30, max_pairs=2000,
            sampled_tokens=100, resamples=200, seed=0, mixtures=(),
            kernels=(KernelMetrics(kernel="rbf", pnd=one, pnav=one, tat=one, nag=one, kpa=one),),
            reference=ReferenceMetrics(
                support_overlap=one, drift_magnitude=one, kurtosis=one, smoothness=one,
                reference_accuracy=one, length_bias=one,
            ),
        ),
    )  # fmt: skip


def training_result(checkpoint_id: str) -> TrainingResult:
    evaluation = Evaluation(
        log_loss=0.5, temperature=1.0, accuracy=0.7, accuracy_length_normalized=0.7,
        calibration_error=0.05, drift=0.1, chosen_displacement=0.0, pairs=5, prompts=5,
    )  # fmt: skip
    run = RunSummary(
        objective=ObjectiveSpec(), learning_rate=1e-4, steps=2, pairs_seen=32, seconds=1.0,
        checkpoint_id=checkpoint_id, evaluation=evaluation,
    )  # fmt: skip
    return TrainingResult(
        run=run, baseline=run,
        comparison=Comparison(
            log_loss=estimate(-0.1), accuracy=estimate(0.1), drift=0.0, verdict="better",
            sentence="better than DPO",
        ),
        samples=(GeneratedSample(prompt="p", base="b", aligned="a"),), bundle={"seed": "0"},
    )  # fmt: skip


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)
