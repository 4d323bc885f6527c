"""Webhooks over HTTP and on their way: written with the event, signed, tried again, given up."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.keys import Scope
from core.lifecycle import JobKind, JobStatus
from core.settings import WebhookSettings
from core.webhook_events import MAX_TRIES
from models.repositories.checkpoints import CheckpointRepository
from models.repositories.jobs import JobRepository
from models.repositories.webhooks import WebhookRepository
from models.webhook import WebhookDelivery
from tests.integration.api_world import World, running_api
from tests.integration.live_world import until
from tests.integration.source_servers import make_authority
from tests.integration.test_api import check_problem
from tests.integration.webhook_world import Receiver, is_signed, receiving
from worker.deliveries import Deliveries
from worker.webhook_sender import post

LOOPBACK = "127.0.0.0/8"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path, receiver: Receiver) -> Iterator[World]:
    webhooks = {
        "hosts": (f"localhost:{receiver.port}={LOOPBACK}",),
        "allow_http": True,
        "timeout_s": 5.0,
        "max_per_owner": 3,
    }
    with running_api(sqlite_url, tmp_path, webhooks=webhooks) as made:
        yield made


def hook(world: World, receiver: Receiver, *events: str, path: str = "/hook") -> dict[str, Any]:
    url = f"http://localhost:{receiver.port}{path}"
    answer = world.post("/v1/webhooks", json={"url": url, "events": list(events)})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/webhooks/{made['id']}"
    return made


def deliver(world: World) -> None:
    Deliveries(world.settings, world.database).run()


def log_of(world: World, webhook: str, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = world.get(f"/v1/webhooks/{webhook}/deliveries{query}").json()[
        "data"
    ]
    return found


def hasten(world: World) -> None:
    """Let the time of the next tries come."""
    with world.database.transaction() as session:
        for row in session.query(WebhookDelivery):
            row.due_at = 0.0


# ----------------------------------------------------------------- what is told


def test_a_job_tells_its_story(world: World, receiver: Receiver) -> None:
    made = hook(world, receiver)
    dataset = world.dataset()
    job = world.training_job(dataset)["id"]
    ids = world.train(job)
    deliver(world)
    told = [(one.event["type"], one.event["data"]["id"]) for one in receiver.posted]
    assert sorted(told) == sorted(
        [
            ("dataset.ready", dataset),
            ("recommendation.completed", ids["recommendation"]),
            ("study.completed", ids["study"]),
            ("checkpoint.created", ids["checkpoint"]),
            ("fine_tuning.job.succeeded", job),
        ]
    )
    for one in receiver.posted:
        assert one.path == "/hook"
        assert one.headers["content-type"] == "application/json"
        assert one.headers["webhook-id"] == one.event["id"]
        assert abs(int(one.headers["webhook-timestamp"]) - time.time()) < 60
        assert set(one.event) == {"id", "object", "type", "created_at", "data"}
        assert one.event["object"] == "event"
        assert is_signed(made["secret"], one.headers, one.body)
        assert not is_signed(made["secret"], one.headers, one.body + b" ")
    assert len({one.headers["webhook-id"] for one in receiver.posted}) == 5
    entries = log_of(world, made["id"])
    assert {entry["status"] for entry in entries} == {"delivered"}
    assert [entry["attempts"][0]["status_code"] for entry in entries] == [204] * 5
    # Nothing is sent twice.
    deliver(world)
    assert len(receiver.posted) == 5


@pytest.mark.parametrize(
    ("status", "type_"),
    [
        (JobStatus.FAILED, "fine_tuning.job.failed"),
        (JobStatus.CANCELLED, "fine_tuning.job.cancelled"),
    ],
)
def test_other_ends_of_a_job(
    world: World, receiver: Receiver, status: JobStatus, type_: str
) -> None:
    job = world.training_job(world.dataset())["id"]
    hook(world, receiver)
    world.finish(world.claim(JobKind.TRAINING), status)
    deliver(world)
    assert [(one.event["type"], one.event["data"]["id"]) for one in receiver.posted] == [
        (type_, job)
    ]


def test_a_paused_and_a_lost_job(world: World, receiver: Receiver) -> None:
    world.training_job(world.dataset())
    hook(world, receiver)
    fence = world.claim(JobKind.TRAINING)
    lost = {"message": "gone", "log_tail": [], "max_losses": 5, "backoff_s": 0.0}
    with world.database.transaction() as session:
        JobRepository(session).lose(fence, **lost)  # type: ignore[arg-type]
    fence = world.claim(JobKind.TRAINING)
    error = {"code": "disk_full", "message": "the disk is full", "hint": "free some"}
    with world.database.transaction() as session:
        JobRepository(session).pause(fence, error, data={})
    deliver(world)
    assert sorted(receiver.types) == ["fine_tuning.job.paused", "fine_tuning.job.stalled"]


def test_an_invalid_dataset_and_a_recommendation(world: World, receiver: Receiver) -> None:
    dataset = world.dataset()
    hook(world, receiver)
    world.upload(b"not json\n" * 20)
    world.validate()
    world.post(f"/v1/jobs/{world.upload().json()['job_id']}/cancel")
    body = {"model": "tiny-lm", "dataset_id": dataset}
    world.post("/v1/recommendations", json=body)
    world.finish(world.claim(JobKind.RECOMMENDATION), JobStatus.FAILED)
    deliver(world)
    assert sorted(receiver.types) == ["dataset.invalid"] * 2 + ["recommendation.failed"]


def test_evaluations_that_end(world: World, receiver: Receiver) -> None:
    dataset = world.dataset()
    world.training_job(dataset)
    fence = world.claim(JobKind.TRAINING)
    made = world.publish(fence, {"config.json": b"{}"})
    world.finish(fence, JobStatus.FAILED)
    deliver(world)
    hook(world, receiver)
    ids = [
        world.post("/v1/evaluations", json={"checkpoint_id": made}).json()["id"] for _ in range(2)
    ]
    world.finish(world.claim(JobKind.EVALUATION), JobStatus.FAILED)
    world.finish(world.claim(JobKind.EVALUATION))
    deliver(world)
    told = [(one.event["type"], one.event["data"]["id"]) for one in receiver.posted]
    assert sorted(told) == [("evaluation.completed", ids[1]), ("evaluation.failed", ids[0])]


def test_an_expiring_checkpoint(world: World, receiver: Receiver) -> None:
    world.training_job(world.dataset())
    fence = world.claim(JobKind.TRAINING)
    checkpoint = world.publish(fence, {"config.json": b"{}"})
    world.finish(fence, JobStatus.FAILED)
    hook(world, receiver, "checkpoint.expiring")
    ends = int(time.time()) + 3600
    changed = world.client.patch(
        f"/v1/checkpoints/{checkpoint}", json={"expires_at": ends}, headers=world.headers()
    )
    assert changed.status_code == 200
    with world.database.transaction() as session:
        assert CheckpointRepository(session).warn() == 1
    deliver(world)
    assert receiver.types == ["checkpoint.expiring"]
    assert receiver.posted[0].event["data"] == {"id": checkpoint}


def test_an_event_that_is_rolled_back_is_not_told(world: World, receiver: Receiver) -> None:
    world.training_job(world.dataset())
    made = hook(world, receiver)
    fence = world.claim(JobKind.TRAINING)

    class Stop(Exception):
        pass

    def fail() -> None:
        with world.database.transaction() as session:
            JobRepository(session).finish(fence, JobStatus.SUCCEEDED, result={}, message="done")
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert log_of(world, made["id"]) == []
    world.finish(fence, JobStatus.FAILED)
    assert [entry["type"] for entry in log_of(world, made["id"])] == ["fine_tuning.job.failed"]


def test_only_the_owner_and_what_was_asked_for(world: World, receiver: Receiver) -> None:
    made = hook(world, receiver, "dataset.ready")
    world.training_job(world.dataset())
    world.finish(world.claim(JobKind.TRAINING), JobStatus.FAILED)
    world.dataset(owner="eve")
    assert [entry["type"] for entry in log_of(world, made["id"])] == ["dataset.ready"]


# --------------------------------------------------------------- tries and failures


def test_what_fails_is_tried_again_under_the_same_id(world: World, receiver: Receiver) -> None:
    receiver.status = 503
    made = hook(world, receiver)
    world.post(f"/v1/webhooks/{made['id']}/test")
    deliver(world)
    deliver(world)
    assert len(receiver.posted) == 1
    (entry,) = log_of(world, made["id"], "?status=pending")
    assert (entry["tries"], entry["attempts"][0]["error"]) == (1, "answered 503")
    assert 3 <= entry["next_try_at"] - time.time() <= 7
    receiver.status = 200
    hasten(world)
    deliver(world)
    (entry,) = log_of(world, made["id"], "?status=delivered")
    assert [one["status_code"] for one in entry["attempts"]] == [503, 200]
    first, second = receiver.posted
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


def test_after_ten_tries_the_webhook_is_switched_off(world: World, receiver: Receiver) -> None:
    receiver.status = 500
    made = hook(world, receiver)
    with receiving() as other:
        settings = world.settings.model_copy(
            update={
                "webhooks": world.settings.webhooks.model_copy(
                    update={
                        "hosts": (
                            *world.settings.webhooks.hosts, f"localhost:{other.port}={LOOPBACK}",
                        )
                    }
                )
            }
        )  # fmt: skip
        world.app.state.settings = world.settings = settings
        hook(world, other, "webhook.disabled")
        world.post(f"/v1/webhooks/{made['id']}/test")
        for tries in range(1, MAX_TRIES + 1):
            assert world.get(f"/v1/webhooks/{made['id']}").json()["enabled"] is True
            deliver(world)
            assert len(receiver.posted) == tries
            hasten(world)
        deliver(world)
        assert other.types == ["webhook.disabled"]
        assert other.posted[0].event["data"] == {"id": made["id"]}
    assert len(receiver.posted) == MAX_TRIES
    off = world.get(f"/v1/webhooks/{made['id']}").json()
    assert off["enabled"] is False
    assert "answered 500" in off["disabled_reason"]
    (entry,) = log_of(world, made["id"])
    assert (entry["status"], len(entry["attempts"])) == ("failed", MAX_TRIES)
    redeliver = f"/v1/webhooks/deliveries/{entry['id']}/redeliver"
    check_problem(world.post(redeliver), 409, "webhook_disabled")
    # Nothing is written for a webhook that is off; on again, it is told what comes from then on.
    world.dataset()
    assert len(log_of(world, made["id"])) == 1
    on = world.client.patch(
        f"/v1/webhooks/{made['id']}", json={"enabled": True}, headers=world.headers()
    )
    assert (on.json()["enabled"], on.json()["disabled_reason"]) == (True, None)
    receiver.status = 200
    again = world.post(redeliver)
    assert again.status_code == 202
    assert again.json()["event_id"] == entry["event_id"]
    deliver(world)
    assert receiver.posted[-1].body == receiver.posted[0].body


def test_a_receiver_that_is_gone_switches_its_webhook_off(world: World, receiver: Receiver) -> None:
    receiver.status = 410
    made = hook(world, receiver)
    world.post(f"/v1/webhooks/{made['id']}/test")
    deliver(world)
    assert world.get(f"/v1/webhooks/{made['id']}").json()["enabled"] is False
    assert log_of(world, made["id"])[0]["status"] == "failed"


def test_one_event_that_never_gets_through_does_not_silence_the_others(
    world: World, receiver: Receiver
) -> None:
    receiver.status = 500
    made = hook(world, receiver)
    world.post(f"/v1/webhooks/{made['id']}/test")
    deliver(world)
    receiver.status = 200
    world.post(f"/v1/webhooks/{made['id']}/test")
    deliver(world)
    receiver.status = 500
    for _ in range(MAX_TRIES - 1):
        hasten(world)
        deliver(world)
    assert sorted(e["status"] for e in log_of(world, made["id"])) == ["delivered", "failed"]
    assert world.get(f"/v1/webhooks/{made['id']}").json()["enabled"] is True


def test_a_delivery_whose_worker_died_is_taken_again(world: World, receiver: Receiver) -> None:
    made = hook(world, receiver)
    world.post(f"/v1/webhooks/{made['id']}/test")

    with world.database.transaction() as session:
        from_before = WebhookRepository(session).claim(lease_s=60.0, limit=8)
    assert len(from_before) == 1
    deliver(world)
    assert receiver.posted == []
    hasten(world)
    deliver(world)
    assert len(receiver.posted) == 1
    assert log_of(world, made["id"])[0]["status"] == "delivered"


def test_many_workers_send_each_event_once(
    database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    webhooks = {"hosts": (f"localhost:{receiver.port}={LOOPBACK}",), "allow_http": True}
    with running_api(database_url, tmp_path, webhooks=webhooks) as world:
        made = hook(world, receiver)
        for _ in range(30):
            world.post(f"/v1/webhooks/{made['id']}/test")
        threads = [threading.Thread(target=deliver, args=(world,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = [one.headers["webhook-id"] for one in receiver.posted]
        assert len(ids) == len(set(ids)) == 30
        assert len(log_of(world, made["id"], "?status=delivered&limit=100")) == 30


def test_a_receiver_that_hangs_delays_nobody_else(sqlite_url: str, tmp_path: Path) -> None:
    with receiving() as slow, receiving() as quick:
        release = threading.Event()
        slow.before = lambda: release.wait(20)
        hosts = tuple(f"localhost:{one.port}={LOOPBACK}" for one in (slow, quick))
        webhooks = {"hosts": hosts, "allow_http": True, "timeout_s": 15.0}
        with running_api(sqlite_url, tmp_path, webhooks=webhooks) as world:
            hung, other = hook(world, slow), hook(world, quick)
            for _ in range(20):
                world.post(f"/v1/webhooks/{hung['id']}/test")
            for _ in range(3):
                world.post(f"/v1/webhooks/{other['id']}/test")
            thread = threading.Thread(target=deliver, args=(world,))
            thread.start()
            try:
                until(lambda: len(quick.posted) == 3, 8)
            finally:
                release.set()
                thread.join(60)
            assert len(slow.posted) == 20


# ----------------------------------------------------------------- secrets


def test_the_secret_is_shown_once(world: World, receiver: Receiver) -> None:
    made = hook(world, receiver)
    assert made["secret"].startswith("whsec_")
    shown = {name: value for name, value in made.items() if name != "secret"}
    assert world.get(f"/v1/webhooks/{made['id']}").json() == shown
    assert world.get("/v1/webhooks").json()["data"] == [shown]


def test_both_secrets_sign_while_they_change(world: World, receiver: Receiver) -> None:
    made = hook(world, receiver)
    url = f"/v1/webhooks/{made['id']}"
    new = world.post(f"{url}/rotate_secret", json={"overlap_s": 60}).json()["secret"]
    assert new != made["secret"]
    world.post(f"{url}/test")
    deliver(world)
    both = receiver.posted[-1]
    assert is_signed(new, both.headers, both.body)
    assert is_signed(made["secret"], both.headers, both.body)
    last = world.post(f"{url}/rotate_secret", json={"overlap_s": 0}).json()["secret"]
    world.post(f"{url}/test")
    deliver(world)
    one = receiver.posted[-1]
    assert is_signed(last, one.headers, one.body)
    assert not is_signed(new, one.headers, one.body)


# ----------------------------------------------------------------- requests


def test_webhooks_are_changed_and_deleted(world: World, receiver: Receiver) -> None:
    made = hook(world, receiver, "dataset.ready", "dataset.ready")
    assert made["events"] == ["dataset.ready"]
    url = f"/v1/webhooks/{made['id']}"
    changed = world.client.patch(
        url, json={"events": [], "description": "all", "enabled": False}, headers=world.headers()
    ).json()
    assert (changed["events"], changed["description"], changed["enabled"]) == ([], "all", False)
    assert changed["disabled_reason"] == "switched off by its owner"
    world.post(f"{url}/test")
    deliver(world)
    assert receiver.posted == []
    assert world.client.delete(url, headers=world.headers()).status_code == 204
    check_problem(world.get(url), 404, "not_found")
    check_problem(world.get(f"{url}/deliveries"), 404, "not_found")


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("https://localhost/hook", 403, "webhook_host_not_allowed"),
        ("http://127.0.0.1:{port}/hook", 403, "webhook_host_not_allowed"),
        ("http://169.254.169.254/latest/meta-data", 403, "webhook_host_not_allowed"),
        ("ftp://localhost/hook", 422, "unusable_url"),
        ("http://me:secret@localhost:{port}/", 422, "unusable_url"),
        ("http://localhost:{port}/#x", 422, "unusable_url"),
        ("http://localhost:{port}/a b", 422, "unusable_url"),
    ],
)
def test_addresses_that_are_not_listed(
    world: World, receiver: Receiver, url: str, status: int, code: str
) -> None:
    body = {"url": url.format(port=receiver.port)}
    check_problem(world.post("/v1/webhooks", json=body), status, code)
    made = hook(world, receiver)
    patched = world.client.patch(f"/v1/webhooks/{made['id']}", json=body, headers=world.headers())
    check_problem(patched, status, code)


def test_two_requests_at_once_do_not_both_make_the_last_webhook(
    database_url: str, tmp_path: Path
) -> None:
    webhooks = {"hosts": ("hooks.example.com",), "max_per_owner": 2}
    with running_api(database_url, tmp_path, webhooks=webhooks) as world:
        world.headers()
        body = {"url": "https://hooks.example.com/"}
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: world.post("/v1/webhooks", json=body), range(8)))
        assert sorted(answer.status_code for answer in made) == [201] * 2 + [409] * 6


def test_limits_scopes_and_strangers(world: World, receiver: Receiver) -> None:
    made = hook(world, receiver)
    delivery = world.post(f"/v1/webhooks/{made['id']}/test").json()["id"]
    hook(world, receiver)
    hook(world, receiver)
    body = {"url": f"http://localhost:{receiver.port}/"}
    check_problem(world.post("/v1/webhooks", json=body), 409, "too_many_webhooks")
    eve = world.headers("eve")
    url = f"/v1/webhooks/{made['id']}"
    for method, path, json in (
        ("GET", url, None), ("PATCH", url, {}), ("DELETE", url, None),
        ("POST", f"{url}/test", None), ("POST", f"{url}/rotate_secret", {}),
        ("GET", f"{url}/deliveries", None),
        ("POST", f"/v1/webhooks/deliveries/{delivery}/redeliver", None),
    ):  # fmt: skip
        answer = world.client.request(method, path, headers=eve, json=json)
        check_problem(answer, 404, "not_found")
    reader = {"Authorization": f"Bearer {world.key(scopes=(Scope.JOBS_READ,))}"}
    assert world.client.get(url, headers=reader).status_code == 200
    check_problem(
        world.client.post("/v1/webhooks", json=body, headers=reader), 403, "missing_scope"
    )
    check_problem(
        world.post("/v1/webhooks", json={**body, "events": ["job.done"]}), 422, "invalid_input"
    )


# ----------------------------------------------------------------- the request itself


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    receiver.status, receiver.headers = 302, {"Location": f"http://localhost:{receiver.port}/else"}
    settings = WebhookSettings(hosts=(f"localhost:{receiver.port}={LOOPBACK}",), allow_http=True)
    attempt = post(f"http://localhost:{receiver.port}/", b"{}", {}, settings)
    assert (attempt.ok, attempt.status, attempt.error) == (
        False, 302, "redirects are not followed",
    )  # fmt: skip
    assert len(receiver.posted) == 1


def test_private_addresses_are_not_connected_to(receiver: Receiver) -> None:
    settings = WebhookSettings(hosts=(f"localhost:{receiver.port}",), allow_http=True)
    attempt = post(f"http://localhost:{receiver.port}/", b"{}", {}, settings)
    assert attempt.error is not None
    assert "loopback" in attempt.error
    assert (attempt.ok, receiver.posted) == (False, [])


def test_the_name_is_resolved_once(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    real = socket.getaddrinfo

    def noting(host: Any, *args: Any, **more: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1", *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", noting)
    settings = WebhookSettings(hosts=(f"hook.test:{receiver.port}={LOOPBACK}",), allow_http=True)
    assert post(f"http://hook.test:{receiver.port}/x?y=1", b"{}", {}, settings).ok
    assert asked == ["hook.test"]
    assert receiver.posted[0].path == "/x?y=1"
    assert receiver.posted[0].headers["host"] == f"hook.test:{receiver.port}"


def test_http_needs_a_setting(receiver: Receiver) -> None:
    settings = WebhookSettings(hosts=(f"localhost:{receiver.port}={LOOPBACK}",))
    attempt = post(f"http://localhost:{receiver.port}/", b"{}", {}, settings)
    assert attempt.error is not None
    assert "https://" in attempt.error
    assert receiver.posted == []


def test_https_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    context, ca = make_authority(tmp_path, "DNS:localhost")
    with receiving(context) as receiver:
        url = f"https://localhost:{receiver.port}/"
        hosts = (f"localhost:{receiver.port}={LOOPBACK}",)
        assert post(url, b"{}", {}, WebhookSettings(hosts=hosts, ca_file=ca)).ok
        refused = post(url, b"{}", {}, WebhookSettings(hosts=hosts))
        assert refused.error is not None
        assert "certificate" in refused.error
        assert len(receiver.posted) == 1


@pytest.mark.parametrize("tls", [False, True])
def test_a_receiver_that_is_slow_is_left(tmp_path: Path, tls: bool) -> None:
    context: ssl.SSLContext | None = None
    ca: Path | None = None
    if tls:
        context, ca = make_authority(tmp_path, "DNS:localhost")
    woken = threading.Event()
    with receiving(context) as receiver:
        receiver.before = lambda: bool(woken.wait(10))
        settings = WebhookSettings(
            hosts=(f"localhost:{receiver.port}={LOOPBACK}",), allow_http=True, ca_file=ca,
            timeout_s=0.5,
        )  # fmt: skip
        began = time.monotonic()
        scheme = "https" if tls else "http"
        attempt = post(f"{scheme}://localhost:{receiver.port}/", b"{}", {}, settings)
        assert time.monotonic() - began < 5
        woken.set()
    assert attempt.error == "no answer within 0.5 s"


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        settings = WebhookSettings(hosts=(f"localhost:{port}={LOOPBACK}",), allow_http=True)
        attempt = post(f"http://localhost:{port}/", b"{}", {}, settings)
    assert attempt.error is not None
    assert "ConnectionRefusedError" in attempt.error
