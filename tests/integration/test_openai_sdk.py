"""The unchanged `openai` package, today's and that of a year ago, against a running server."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from core.lifecycle import JobKind
from core.queue import QUEUE_OF_KIND
from models.repositories.jobs import JobRepository
from tests.integration.api_world import MODEL, ROOT, pairs, training_result
from tests.integration.live_world import Live, live_api

A_YEAR_AGO = "2.8.1"
WAIT_S = 240

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def old_sdk() -> Path:
    """Folder with last year's package and what it needs that ours does not, kept for next time."""
    folder = Path(sys.prefix) / f"openai-{A_YEAR_AGO}"
    if folder.is_dir():
        return folder
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--target", str(fresh), f"openai=={A_YEAR_AGO}", "distro==1.9.0"),
        ],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(done.stderr, pytrace=False)
        pytest.skip(f"openai {A_YEAR_AGO} cannot be installed: {done.stderr[-300:]}")
    if not folder.is_dir():  # another process of the tests may have been faster
        fresh.rename(folder)
    return folder


@contextmanager
def working(live: Live) -> Iterator[None]:
    """Do what workers do: validate every dataset, train the first job."""
    stop = threading.Event()

    def work() -> None:
        trained = False
        while not stop.is_set():
            with live.database.reading() as session:
                due = JobRepository(session).overdue_queues(older_than_s=-1.0)
            if QUEUE_OF_KIND[JobKind.DATASET] in due:
                live.validate()
            elif QUEUE_OF_KIND[JobKind.TRAINING] in due and not trained:
                fence = live.claim(JobKind.TRAINING)
                checkpoint = live.publish(fence, {"config.json": b"{}"})
                live.finish(fence, result=training_result(checkpoint).model_dump(mode="json"))
                trained = True
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run_sdk(live: Live, folder: Path | None, tmp_path: Path) -> str:
    data = tmp_path / "prefs.jsonl"
    data.write_bytes(pairs(30))
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("OPENAI_", "KDPO_"))}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    script = ROOT / "tests" / "integration" / "openai_calls.py"
    key = live.headers()["Authorization"].removeprefix("Bearer ")
    with working(live):
        done = subprocess.run(
            [sys.executable, "-P", str(script), live.url, key, str(data), MODEL],
            env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def live(sqlite_url: str, tmp_path: Path) -> Iterator[Live]:
    with live_api(sqlite_url, tmp_path) as made:
        yield made


def test_the_newest_sdk(live: Live, tmp_path: Path) -> None:
    assert run_sdk(live, None, tmp_path) == version("openai")


def test_the_sdk_of_a_year_ago(live: Live, old_sdk: Path, tmp_path: Path) -> None:
    assert run_sdk(live, old_sdk, tmp_path) == A_YEAR_AGO
