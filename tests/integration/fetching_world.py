"""The API, its database, and the servers that datasets are fetched from."""

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from core.lifecycle import JobKind
from core.queue import QUEUE_OF_KIND
from core.settings import Settings
from models.dataset import Dataset
from models.repositories.datasets import DatasetRepository
from models.repositories.jobs import JobRepository
from tests.integration.api_world import World, pairs, running_api
from tests.integration.source_servers import TOKEN, Hub, Server, running
from tests.integration.workers import wait_for
from worker.context import JobContext
from worker.jobs import validate_dataset
from worker.supervisor import Supervisor

QUEUE = QUEUE_OF_KIND[JobKind.DATASET]


@dataclass
class Fetching:
    """The API, its database, and the servers that it fetches from."""

    world: World
    https: Server
    hub: Hub
    folder: Path

    def post(self, source: object, **more: object) -> Any:
        body = {"source": source, **more}
        return self.world.post("/v1/datasets", json=body, headers={"Prefer": "wait=0"})

    def url(self, path: str = "/prefs.jsonl", host: str = "localhost") -> str:
        return f"https://{host}:{self.https.port}{path}"

    def work(self) -> None:
        """Run what is due, each job in a process of its own, until nothing is queued."""
        supervisor = Supervisor(Settings(), self.world.database, worker_id="wrk_test")

        def done() -> bool:
            supervisor.drain(QUEUE)
            with self.world.database.reading() as session:
                return not session.connection().exec_driver_sql(
                    "SELECT 1 FROM job WHERE status IN ('queued', 'running')"
                ).all()  # fmt: skip

        wait_for("the end of all jobs", done, timeout_s=60)

    def made(self, source: object, **more: object) -> dict[str, Any]:
        """Ask, work, and return the dataset."""
        answer = self.post(source, **more)
        assert answer.status_code == 202, answer.text
        self.work()
        view: dict[str, Any] = self.world.get(answer.headers["location"]).json()
        return view

    def claimed(self, source: object, **more: object) -> tuple[str, JobContext]:
        """Ask, and return the dataset's id and an attempt at its job."""
        answer = self.post(source, **more)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"], self.attempt()

    def attempt(self) -> JobContext:
        fence = self.world.claim(JobKind.DATASET)
        with self.world.database.reading() as session:
            job = JobRepository(session).load(fence)
        return JobContext(Settings(), self.world.database, fence, job)

    def dataset(self, dataset_id: str) -> Dataset:
        with self.world.database.reading() as session:
            return DatasetRepository(session).load(dataset_id)

    def refused(self, source: object) -> dict[str, Any]:
        """Do the job here: parsing, which would limit this process, is not reached."""
        dataset_id, context = self.claimed(source)
        result = validate_dataset.run(context)
        assert result["status"] == "invalid"
        self.world.finish(context.fence)
        assert self.uploads() == []
        error: dict[str, Any] = self.world.get(f"/v1/datasets/{dataset_id}").json()["error"]
        assert error["hint"]
        return error

    def report(self, view: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.world.get(view["report_url"]).json()
        return found

    def uploads(self) -> list[str]:
        folder = self.world.settings.upload_dir
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def everything_said(self) -> str:
        """All files and rows that the service has written, as text."""
        parts = [p.read_bytes() for p in self.folder.rglob("*") if p.is_file()]
        return b"\n".join(parts).decode(errors="replace")


@contextmanager
def served_sources(
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    authority: tuple[ssl.SSLContext, Path],
) -> Iterator[Fetching]:
    """Serve a hub and an https host, and an API that may fetch from both."""
    context, ca = authority
    hub = Hub({"README.md": b"# x\n", "prefs.jsonl": pairs(40)})
    hub.server.answer = hub.answer
    (tmp_path / "open").mkdir()
    with running(Server(), context) as https, running(hub.server):
        loopback = "=127.0.0.0/8|::1/128"
        port = https.port
        sources = {
            "https_hosts": f"localhost:{port}{loopback},127.0.0.1:{port}",
            "ca_file": str(ca),
            "paths": str(tmp_path / "open"),
            "secrets": {"team": TOKEN},
            "max_bytes": 3_000_000,
            "timeout_s": 5,
            "deadline_s": 20,
        }
        for name, value in sources.items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            monkeypatch.setenv(f"KDPO_SOURCES__{name.upper()}", text)
        monkeypatch.setenv("KDPO_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("KDPO_DB__URL", sqlite_url)
        monkeypatch.setenv("KDPO_WORKER__BACKOFF_S", "0.05")
        monkeypatch.setenv("KDPO_TRAINING__PROGRESS_EVERY_S", "0.05")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server.port}")
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        # For what is done in this process.
        endpoint = f"http://127.0.0.1:{hub.server.port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with running_api(sqlite_url, tmp_path, sources=sources) as world:
            # The world is made without a hub; runners are not.
            world.settings = world.app.state.settings = Settings()
            yield Fetching(world, https, hub, tmp_path)
