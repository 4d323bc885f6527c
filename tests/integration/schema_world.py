"""A server on loopback, and its document as schemathesis reads it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import requests
import schemathesis
import uvicorn
from schemathesis.config import SchemathesisConfig
from schemathesis.schemas import APIOperation, BaseSchema

from tests.integration.api_world import World, running_api
from tests.integration.object_world import (
    HOST,
    make_objects,
    new_checkpoint,
    new_part,
    new_upload,
)

# Of operations that change the state of what they name, each has an object of its own.
VERBS = ("cancel", "pause", "resume")


@dataclass
class Live:
    """A server on loopback, a caller, and objects of the caller's for paths."""

    url: str
    world: World
    session: requests.Session = field(default_factory=requests.Session)
    ids: dict[str, str] = field(default_factory=dict)
    own: dict[str, dict[str, str]] = field(default_factory=dict)
    links: dict[int, dict[str, str]] = field(default_factory=dict)

    def make_objects(self) -> None:
        """Make one object of each kind, and more for operations that would spoil it."""
        world = self.world
        self.ids = ids = make_objects(world)
        checkpoint = new_checkpoint(world, ids["dataset_id"])
        self.own = {
            "delete_dataset": {"dataset_id": world.dataset()},
            "delete_checkpoint": {"checkpoint_id": checkpoint},
            "retry_trial": {"number": "2"},
            "get_divergence": {"name": "kl"},
        }
        for verb in VERBS:
            for operation in (f"{verb}_job", f"{verb}_fine_tuning_job"):
                job = world.training_job(ids["dataset_id"])["id"]
                self.own[operation] = {"job_id": job}
        asked = {"dataset_id": ids["dataset_id"], "model": "tiny-lm"}
        waiting = world.post("/v1/recommendations", json=asked, headers={"Prefer": "wait=0"})
        self.own["cancel_recommendation"] = {"recommendation_id": waiting.json()["id"]}
        ended = world.training_job(ids["dataset_id"])["id"]
        world.post(f"/v1/jobs/{ended}/cancel")
        self.own["retry_job"] = {"job_id": ended}
        upload = new_upload(world, size=10)
        parts = {"part_01jd": new_part(world, upload, b"12345")}
        parts["part_01je"] = new_part(world, upload, b"67890")
        self.own["complete_upload"] = {"upload_id": upload, **parts}
        for path in (None, ids["path"]):
            url = f"/v1/checkpoints/{ids['checkpoint_id']}/download_url"
            link = urlsplit(world.post(url, json={"path": path}).json()["url"])
            self.links[link.path.count("/files/")] = dict(parse_qsl(link.query))

    def of(self, operation_id: str) -> dict[str, str]:
        """Return the ids that go with an operation, by the names of path parameters."""
        return self.ids | self.own.get(operation_id, {})


@contextmanager
def live_server(database_url: str, tmp_path: Path) -> Iterator[Live]:
    """Serve a fresh database on loopback to a caller that may ask as often as it likes."""
    more = {
        "api": {"wait_default_s": 0.0, "wait_max_s": 0.05},
        "auth": {"requests_per_minute": 1_000_000_000},
        "worker": {"lease_s": 7200.0},
        "webhooks": {"hosts": HOST, "max_per_owner": 100_000},
    }
    with running_api(database_url, tmp_path, **more) as world, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(world.app, log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            one = Live(url, world)
            one.make_objects()
            one.session.headers.update(world.headers())
            with one.session:
                yield one
        finally:
            server.should_exit = True
            thread.join()


def read_schema(live: Live) -> BaseSchema:
    """Return the document of the server."""
    config = SchemathesisConfig.from_dict({"generation": {"with-security-parameters": False}})
    return schemathesis.openapi.from_dict(live.world.app.openapi(), config=config)


def operations(schema: BaseSchema) -> list[APIOperation]:
    """Return all operations, in an order in which what one ends is not needed after it."""
    found = [result.ok() for result in schema.get_all_operations()]
    late = ("cancel_", "complete_", "delete_", "drain_", "revoke_")
    return sorted(found, key=lambda one: name_of(one).startswith(late))


def name_of(operation: APIOperation) -> str:
    return str(operation.definition.raw["operationId"])
