"""Checkpoints as a tar, links without a key, and how long checkpoints stay."""

import hashlib
import io
import itertools
import os
import stat
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.keys import Scope
from core.lifecycle import JobKind, JobStatus
from core.settings import DownloadSettings
from models.experiment import Checkpoint
from models.job import Event
from models.repositories.checkpoints import CheckpointRepository
from tests.integration.api_world import World, running_api
from tests.integration.test_api import check_problem

LONG = "deep/" + "x" * 120 + ".txt"  # longer than a header's field for names
CONTENTS = {
    "model.safetensors": bytes(range(256)) * 2500,
    "config.json": b"{}",
    "empty": b"",
    "sub dir/é.txt": b"x" * 512,
    LONG: b"long name",
}
HOUR_S = 3600


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


@pytest.fixture
def checkpoint(world: World) -> str:
    world.training_job(world.dataset())
    fence = world.claim(JobKind.TRAINING)
    made = world.publish(fence, CONTENTS)
    world.finish(fence, JobStatus.FAILED)
    return made


def anonymous(world: World, url: str, method: str = "GET", **headers: str) -> Any:
    return world.client.request(method, url, headers=headers)


# ----------------------------------------------------------------- the archive


def test_the_archive_has_every_file(world: World, checkpoint: str) -> None:
    answer = world.get(f"/v1/checkpoints/{checkpoint}/archive?format=tar")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert f"{checkpoint}.tar" in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        members = tar.getmembers()
        names = [f"{checkpoint}/{name}" for name in sorted(CONTENTS)]
        assert [member.name for member in members] == names
        for member, name in zip(members, sorted(CONTENTS), strict=True):
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == CONTENTS[name]
            assert (member.uid, member.gid, member.mode) == (0, 0, 0o644)


def test_the_archive_is_the_same_each_time_and_in_parts(world: World, checkpoint: str) -> None:
    url = f"/v1/checkpoints/{checkpoint}/archive"
    whole = world.get(url)
    etag = whole.headers["etag"]
    assert world.get(url).content == whole.content
    head = world.client.head(url, headers=world.headers())
    assert (head.headers["content-length"], head.headers["etag"]) == (
        str(len(whole.content)),
        etag,
    )
    assert world.get(url, headers={"If-None-Match": etag}).status_code == 304
    size = len(whole.content)
    # Cuts in headers, in files, in padding, at borders, at the end.
    cuts = [0, 1, 511, 512, 513, 1024, 1536, 2000, 300_000, size - 1030, size - 1, size]
    joined = b""
    for start, stop in itertools.pairwise(cuts):
        part = world.get(url, headers={"Range": f"bytes={start}-{stop - 1}", "If-Range": etag})
        assert part.status_code == 206
        joined += part.content
    assert hashlib.sha256(joined).hexdigest() == hashlib.sha256(whole.content).hexdigest()
    stale = world.get(url, headers={"Range": "bytes=0-9", "If-Range": '"tar:old"'})
    assert (stale.status_code, len(stale.content)) == (200, size)
    check_problem(world.get(url, headers={"Range": f"bytes={size}-"}), 416, "range_not_satisfiable")
    check_problem(world.get(f"{url}?format=zip"), 422, "invalid_input")


def test_an_archive_of_damaged_files_is_not_begun(world: World, checkpoint: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    folder = world.settings.artifact_dir / "checkpoints" / checkpoint
    (folder / "model.safetensors").write_bytes(b"short")
    answer = world.get(f"/v1/checkpoints/{checkpoint}/archive")
    check_problem(answer, 500, "checkpoint_corrupt")
    assert len(os.listdir("/proc/self/fd")) <= before


# ----------------------------------------------------------------- signed links


def link(world: World, checkpoint: str, **body: Any) -> dict[str, Any]:
    answer = world.post(f"/v1/checkpoints/{checkpoint}/download_url", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


@pytest.mark.parametrize("path", [*CONTENTS, None])
def test_a_link_needs_no_key(world: World, checkpoint: str, path: str | None) -> None:
    made = link(world, checkpoint, path=path, expires_in_s=60)
    assert made["path"] == path
    assert 55 <= made["expires_at"] - time.time() <= 60
    answer = anonymous(world, made["url"])
    assert answer.status_code == 200
    if path is None:
        assert answer.content == world.get(f"/v1/checkpoints/{checkpoint}/archive").content
    else:
        assert answer.content == CONTENTS[path]
    head = anonymous(world, made["url"], "HEAD")
    assert head.headers["content-length"] == str(len(answer.content))
    if len(answer.content) > 4:
        part = anonymous(world, made["url"], Range="bytes=1-3")
        assert (part.status_code, part.content) == (206, answer.content[1:4])


def test_a_link_is_for_one_path_and_one_time(world: World, checkpoint: str) -> None:
    made = link(world, checkpoint, path="config.json")
    query = urlsplit(made["url"]).query
    expires = made["expires_at"]
    base = f"/v1/downloads/{checkpoint}"
    for url in (
        f"{base}/files/model.safetensors?{query}",
        f"{base}/archive?{query}",
        made["url"].replace(str(expires), str(expires + 1)),
        made["url"][:-1] + ("A" if made["url"][-1] != "A" else "B") + "",
    ):
        check_problem(anonymous(world, url), 403, "link_invalid")
    check_problem(anonymous(world, made["url"] + "&more=1"), 422, "unknown_parameter")
    check_problem(anonymous(world, f"{base}/files/config.json"), 422, "invalid_input")


def test_a_link_ends(world: World, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = link(world, checkpoint, path="config.json", expires_in_s=10)
    now = time.time()
    monkeypatch.setattr("app.signed_links.time.time", lambda: now + 11)
    check_problem(anonymous(world, made["url"]), 403, "link_expired")


def test_a_link_ends_with_its_checkpoint(world: World, checkpoint: str) -> None:
    made = link(world, checkpoint)
    world.client.delete(f"/v1/checkpoints/{checkpoint}", headers=world.headers())
    check_problem(anonymous(world, made["url"]), 404, "not_found")


def test_who_may_make_links_and_to_what(world: World, checkpoint: str) -> None:
    url = f"/v1/checkpoints/{checkpoint}/download_url"
    check_problem(world.post(url, json={"path": "none.txt"}), 404, "not_found")
    too_long = {"expires_in_s": world.settings.downloads.max_link_s + 1}
    check_problem(world.post(url, json=too_long), 422, "invalid_input")
    eve = world.headers("eve")
    check_problem(world.client.post(url, json={}, headers=eve), 404, "not_found")
    writer = {"Authorization": f"Bearer {world.key(scopes=(Scope.JOBS_WRITE,))}"}
    check_problem(world.client.post(url, json={}, headers=writer), 403, "missing_scope")


def test_the_servers_secret_is_made_once_and_private(
    world: World, checkpoint: str, tmp_path: Path
) -> None:
    made = link(world, checkpoint)
    key = world.settings.root / "secrets" / "downloads.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    assert [path.name for path in key.parent.iterdir()] == ["downloads.key"]
    assert anonymous(world, made["url"]).status_code == 200
    key.unlink()
    check_problem(anonymous(world, made["url"]), 403, "link_invalid")
    set_ = world.settings.model_copy(update={"downloads": DownloadSettings(secret="s" * 32)})
    world.app.state.settings = set_
    key.unlink()
    assert anonymous(world, link(world, checkpoint)["url"]).status_code == 200
    assert not key.exists()


# ----------------------------------------------------------------- how long they stay


def patch(world: World, checkpoint: str, body: dict[str, Any], **headers: str) -> Any:
    return world.client.patch(
        f"/v1/checkpoints/{checkpoint}", json=body, headers={**world.headers(), **headers}
    )


def test_label_pin_and_end_can_be_set(world: World, checkpoint: str) -> None:
    url = f"/v1/checkpoints/{checkpoint}"
    first = world.get(url)
    assert (first.json()["label"], first.json()["role"]) == ("best", "best")
    assert (first.json()["pinned"], first.json()["expires_at"]) == (False, None)
    ends = int(time.time()) + 100_000
    changed = patch(
        world, checkpoint, {"label": "shipped", "pinned": True, "expires_at": ends},
        **{"If-Match": first.headers["etag"]},
    )  # fmt: skip
    assert changed.status_code == 200, changed.text
    assert changed.json() == {
        **first.json(), "label": "shipped", "pinned": True, "expires_at": ends,
    }  # fmt: skip
    assert world.get(url).headers["etag"] == changed.headers["etag"] != first.headers["etag"]
    late = patch(world, checkpoint, {"pinned": False}, **{"If-Match": first.headers["etag"]})
    check_problem(late, 412, "precondition_failed")
    assert patch(world, checkpoint, {"pinned": False}).json()["label"] == "shipped"
    back = patch(world, checkpoint, {"label": None, "expires_at": None}).json()
    assert (back["label"], back["expires_at"]) == ("best", None)


@pytest.mark.parametrize(
    "body", [{"expires_at": 1}, {"label": ""}, {"label": "a\x00b"}, {"kept": True}, {"pinned": "x"}]
)
def test_wrong_changes_are_refused(world: World, checkpoint: str, body: dict[str, object]) -> None:
    check_problem(patch(world, checkpoint, body), 422, "invalid_input")


def test_a_deleted_checkpoint_is_gone(world: World, checkpoint: str) -> None:
    url = f"/v1/checkpoints/{checkpoint}"
    assert world.client.delete(url, headers=world.headers()).status_code == 204
    for path in (url, f"{url}/files", f"{url}/files/config.json", f"{url}/archive"):
        check_problem(world.get(path), 404, "not_found")
    assert world.get("/v1/checkpoints").json()["data"] == []
    check_problem(world.client.delete(url, headers=world.headers()), 404, "not_found")


def test_a_checkpoint_in_use_stays(world: World, checkpoint: str) -> None:
    url = f"/v1/checkpoints/{checkpoint}"
    export = world.post(f"{url}/export", json={"merge": True}).json()["id"]
    problem = check_problem(
        world.client.delete(url, headers=world.headers()), 409, "checkpoint_in_use"
    )
    assert export in problem["detail"]
    world.post(f"/v1/jobs/{export}/cancel")
    assert world.client.delete(url, headers=world.headers()).status_code == 204


def test_a_checkpoint_of_a_job_that_runs_stays(world: World) -> None:
    world.training_job(world.dataset())
    made = world.publish(world.claim(JobKind.TRAINING), CONTENTS)
    answer = world.client.delete(f"/v1/checkpoints/{made}", headers=world.headers())
    check_problem(answer, 409, "checkpoint_in_use")


# --------------------------------------------------------------------- retention


def sweep(world: World, *, days: float | None = None) -> list[str]:
    with world.database.transaction() as session:
        checkpoints = CheckpointRepository(session)
        if days is not None:
            checkpoints.set_ends(days=days)
        checkpoints.warn()
        return checkpoints.expire()


def set_row(world: World, checkpoint: str, **values: Any) -> None:
    with world.database.transaction() as session:
        row = session.get_one(Checkpoint, checkpoint)
        for name, value in values.items():
            setattr(row, name, value)


def warnings(world: World, checkpoint: str) -> list[str]:
    with world.database.reading() as session:
        events = session.query(Event).order_by(Event.seq).all()
        return [
            str(event.data["code"]) + " " + event.message.rpartition(") ")[2]
            for event in events
            if event.data.get("checkpoint_id") == checkpoint and "code" in event.data
        ]


def test_an_end_is_announced_twice_and_then_comes(world: World, checkpoint: str) -> None:
    now = time.time()
    set_row(world, checkpoint, expires_at=now + 73 * HOUR_S)
    assert sweep(world) == []
    assert warnings(world, checkpoint) == []
    set_row(world, checkpoint, expires_at=now + 71 * HOUR_S)
    for _ in range(2):
        assert sweep(world) == []
    assert warnings(world, checkpoint) == ["checkpoint_expiring expires within 72 hours."]
    set_row(world, checkpoint, expires_at=now + 23 * HOUR_S)
    for _ in range(2):
        assert sweep(world) == []
    assert warnings(world, checkpoint)[1:] == ["checkpoint_expiring expires within 24 hours."]
    set_row(world, checkpoint, expires_at=now - 1)
    assert sweep(world) == [checkpoint]
    assert warnings(world, checkpoint)[2:] == ["checkpoint_expired has expired and is deleted."]
    check_problem(world.get(f"/v1/checkpoints/{checkpoint}"), 404, "not_found")


def test_a_pin_is_stronger_than_an_end(world: World, checkpoint: str) -> None:
    set_row(world, checkpoint, expires_at=1.0, pinned=True)
    assert sweep(world) == []
    assert warnings(world, checkpoint) == []


def test_old_checkpoints_get_an_end_but_not_best_last_or_pinned(
    world: World, checkpoint: str
) -> None:
    old = time.time() - 31 * 24 * HOUR_S
    with world.database.transaction() as session:
        first = session.get_one(Checkpoint, checkpoint)
        first.created_at = old
        copied = (
            "owner_id", "job_id", "attempt", "kind", "step", "files", "manifest_sha256", "bytes",
            "metrics",
        )  # fmt: skip
        for name, label in (("zz1", "final"), ("zz2", "baseline"), ("zz3", "baseline")):
            values = {column: getattr(first, column) for column in copied}
            session.add(
                Checkpoint(
                    id=f"ckpt_{name}",
                    label=label,
                    path=name,
                    created_at=old,
                    pinned=name == "zz2",
                    **values,
                )
            )
    assert sweep(world, days=40) == []
    assert {c["expires_at"] for c in world.get("/v1/checkpoints").json()["data"]} == {None}
    assert sweep(world, days=30) == []
    ends = {c["id"]: c["expires_at"] for c in world.get("/v1/checkpoints").json()["data"]}
    assert ends.pop("ckpt_zz1") is ends.pop("ckpt_zz2") is ends.pop("ckpt_zz3") is None
    # Never without a warning: three days from now, however old it is.
    assert abs(ends.pop(checkpoint) - time.time() - 72 * HOUR_S) < 60
    assert ends == {}
    assert warnings(world, checkpoint) == ["checkpoint_expiring expires within 72 hours."]
