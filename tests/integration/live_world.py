"""The API behind a real socket, in a thread of the test's process."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import uvicorn
from fastapi.testclient import TestClient

from app.main import create_app
from app.server import Server
from core.settings import Settings
from models.session import Database
from tests.integration.api_world import MODEL_DIR, World

WAIT_S = 20.0


@dataclass
class Live(World):
    """A world whose client talks to a server."""

    url: str = ""
    server: Server | None = None
    thread: threading.Thread | None = None

    def stop(self) -> None:
        """Stop the server as SIGTERM does, and wait until it is gone."""
        assert self.server is not None
        assert self.thread is not None
        self.server.should_exit = True
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


@contextmanager
def live_api(database_url: str, tmp_path: Path, **settings: Any) -> Iterator[Live]:
    made = Settings(
        data_dir=tmp_path / "data",
        db={"url": database_url, "pool_size": 2},
        models={"dirs": (MODEL_DIR,), "allow_local_paths": False, "hub_enabled": False},
        **settings,
    )
    app = create_app(made)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=10)
    server = Server(app, config)
    # With the protocol named, as `kdpo serve` does: asyncio sends small answers at once only then.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    database = Database(database_url, pool_size=2)
    with httpx.Client(base_url=url, timeout=WAIT_S) as client:
        live = Live(
            app, cast(TestClient, client), database, made, url=url, server=server, thread=thread
        )
        try:
            yield live
        finally:
            live.stop()
            database.dispose()


def until(true: Any, seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


@dataclass
class Message:
    """One event of a stream."""

    event: str
    id: str | None
    data: Any


def messages(lines: Iterator[str]) -> Iterator[Message]:
    """Parse a stream as the HTML standard says; a comment comes as an event `:`."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            yield Message(":", None, line)
        elif line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield Message(fields["event"], fields.get("id"), json.loads(fields["data"]))
            fields = {}
        else:
            fields = {}
