"""`kdpo serve` as a user starts it: one command, real workers, a clean end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
KEY = re.compile(r"^dk-live-[0-9A-Za-z]{22}$", re.MULTILINE)
URL = re.compile(r"http://127\.0\.0\.1:\d+")
WAIT_S = 60.0

pytestmark = pytest.mark.e2e


class Served:
    """A running `kdpo serve` and what it has said."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.output = folder / "stdout"
        self.log = folder / "stderr"
        outside = {name: v for name, v in os.environ.items() if name[:5] != "KDPO_"}
        environment = {**outside, "KDPO_WORKER__SPARE_RUNNER": "false", **settings}
        with self.output.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "app", "serve",
                    "--data-dir", str(folder / "data"), "--port", "0",
                ],
                cwd=ROOT, env=environment, stdout=out, stderr=log,
            )  # fmt: skip

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not true():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def children(self) -> list[int]:
        found: list[int] = []
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
                found += [int(pid) for pid in (thread / "children").read_text().split()]
        return found

    def is_ready(self) -> bool:
        found = URL.search(self.output.read_text())
        try:
            return found is not None and httpx.get(f"{found.group()}/readyz").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def serving(folder: Path, **settings: str) -> Iterator[Served]:
    running = Served(folder, **settings)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as running:
        yield running


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see children")
def test_serve_from_first_key_to_clean_end(served: Served) -> None:
    served.until(served.is_ready)
    key = KEY.search(served.output.read_text())
    url = URL.search(served.output.read_text())
    assert key is not None
    assert url is not None
    headers = {"Authorization": f"Bearer {key.group()}"}
    assert httpx.get(f"{url.group()}/v1/jobs", headers=headers).status_code == 200
    assert key.group() not in served.log.read_text()
    workers = served.children()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    served.until(lambda: len(served.children()) == 2 and workers[0] not in served.children())
    workers += served.children()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(WAIT_S) == 0
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_serve_with_a_redis_broker_and_the_database_file(tmp_path: Path, redis_url: str) -> None:
    with serving(tmp_path, KDPO_BROKER__URL=redis_url) as running:
        running.until(running.is_ready)
        found = URL.search(running.output.read_text())
        assert found is not None
        assert httpx.get(f"{found.group()}/readyz").json()["broker"]["ok"] is True
        assert (tmp_path / "data" / "kdpo.db").is_file()
        assert not (tmp_path / "data" / "broker").exists()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(WAIT_S) == 0
