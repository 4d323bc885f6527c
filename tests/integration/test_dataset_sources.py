"""Datasets that the server fetches: a real runner process, real servers on loopback."""

import fcntl
import hashlib
import json
import socket
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from core.errors import CancelRequested, LeaseLost, Unavailable
from core.lifecycle import JobKind
from core.settings import Settings
from models.repositories.jobs import Fence
from tests.integration.api_world import gzipped, pairs
from tests.integration.fetching_world import Fetching, served_sources
from tests.integration.source_servers import (
    COMMIT,
    LATER,
    REPO,
    TOKEN,
    Asked,
    Reply,
    file_reply,
    make_authority,
)
from tests.integration.test_api import check_problem
from worker.ingest import table_form
from worker.ingest.sources import assembly, hub
from worker.ingest.sources.assembly import sole_writer
from worker.jobs import validate_dataset
from worker.jobs.fetch_source import fetch

HUB = {"type": "huggingface", "repo_id": REPO}
CARD = b"---\nconfigs:\n- config_name: a\n  data_files:\n  - {split: train, path: 'a/*.parquet'}\n"
CARD += (
    b"  - {split: test, path: a/held.jsonl}\n- config_name: b\n  data_files: b.jsonl\n---\n# x\n"
)


def parquet(data: bytes, path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in data.splitlines()]), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_authority(tmp_path_factory.mktemp("tls"), "DNS:localhost,IP:127.0.0.1")


@pytest.fixture
def fetching(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Any
) -> Iterator[Fetching]:
    with served_sources(sqlite_url, tmp_path, monkeypatch, authority) as served:
        yield served


# ------------------------------------------------------------------ the hub


def test_a_hub_dataset_is_pinned_to_its_commit(fetching: Fetching) -> None:
    view = fetching.made(HUB, policy={"on_invalid": "fail"}, name="mine")
    assert view["error"] is None
    assert (view["name"], view["commit"]) == ("mine", COMMIT)
    assert view["counts"]["pairs"] == 40
    assert view["source"]["repo_id"] == REPO
    assert view["policy"]["on_invalid"] == "fail"
    assert view["sha256"] == hashlib.sha256(pairs(40)).hexdigest()
    assert view["bytes"] == len(pairs(40))
    source = fetching.report(view)["source"]
    assert (source["commit"], source["config"], source["split"]) == (COMMIT, "default", "train")
    assert [file["path"] for file in source["files"]] == ["prefs.jsonl"]
    assert all("authorization" not in asked.headers for asked in fetching.hub.server.asked)


def test_many_files_are_one_dataset_and_the_same_one_again(fetching: Fetching) -> None:
    made = fetching.folder / "x.parquet"
    rows = pairs(60).splitlines(keepends=True)
    parts = {
        f"a/{n}.parquet": parquet(b"".join(rows[n * 20 : n * 20 + 20]), made) for n in range(3)
    }
    fetching.hub.files = {
        "README.md": CARD,
        "a/held.jsonl": pairs(12),
        "b.jsonl": pairs(15),
        **parts,
    }
    source = {**HUB, "config": "a", "split": "train"}
    first, second = fetching.made(source), fetching.made(source)
    assert first["error"] is None
    assert first["counts"]["pairs"] == 60
    for name in ("sha256", "canonical_sha256", "counts", "commit"):
        assert first[name] == second[name], name
    report = fetching.report(first)
    assert [member["name"] for member in report["detected"]["members"]] == sorted(parts)
    assert report["source"]["num_files"] == 3
    held = fetching.made({**HUB, "config": "a", "split": "test", "revision": COMMIT})
    assert held["counts"]["pairs"] == 12


def test_what_is_ambiguous_or_absent_is_said(fetching: Fetching) -> None:
    fetching.hub.files = {
        "README.md": CARD, "a/1.parquet": b"x", "a/held.jsonl": b"x", "b.jsonl": b"x"
    }  # fmt: skip
    for source, code, named in (
        (HUB, "source_ambiguous", ["'a'", "'b'"]),
        ({**HUB, "config": "a"}, "source_ambiguous", ["'train'", "'test'"]),
        ({**HUB, "config": "c"}, "source_not_found", ["'a'", "'b'"]),
        ({**HUB, "revision": "v9"}, "source_not_found", ["'v9'"]),
        ({**HUB, "repo_id": "acme/other"}, "source_not_found", ["'acme/other'"]),
    ):
        error = fetching.refused(source)
        assert error["code"] == code, source
        assert all(name in error["message"] for name in named), error


def test_a_listing_that_does_not_end_is_refused(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching.hub.files = {f"{number}.jsonl": b"x" for number in range(6)}
    monkeypatch.setattr(hub, "_MAX_LISTED", 5)
    error = fetching.refused(HUB)
    assert error["code"] == "too_many_members"
    assert "more than 5 files and folders" in error["message"]


def test_cards_that_cannot_be_read(fetching: Fetching) -> None:
    # Each of these would be twice as large as the one before.
    merged = "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    for metadata in ("- a list", "a: [", f"a0: &a0 {{x: 1}}\n{merged}"):
        fetching.hub.files["README.md"] = f"---\n{metadata}\n---\n".encode()
        error = fetching.refused(HUB)
        assert (error["code"], "README.md" in error["message"]) == ("source_unreadable", True)


def test_a_table_beyond_the_limits_leaves_no_rows(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_args: object, **_more: object) -> None:
        raise MemoryError

    monkeypatch.setattr(table_form, "write_parquet", out_of_memory)
    monkeypatch.setattr(validate_dataset, "_limit_this_process", lambda *_a, **_k: None)
    dataset_id, context = fetching.claimed(HUB)
    assert validate_dataset.run(context)["status"] == "invalid"
    failure = fetching.dataset(dataset_id).failure or {}
    assert (failure["code"], "PARSER_MEMORY_BYTES" in failure["hint"]) == ("too_large", True)
    left = {path.name for path in (fetching.folder / "data").rglob("*") if path.is_file()}
    assert not {"canonical.jsonl", "canonical.parquet", "rejected.jsonl"} & left


def test_a_refusal_is_the_answer_of_a_request_that_waits(fetching: Fetching) -> None:
    worker = fetching.world.soon(fetching.work, JobKind.DATASET)
    answer = fetching.world.post(
        "/v1/datasets", json={"source": {**HUB, "split": "dev"}}, headers={"Prefer": "wait=30"}
    )
    worker.join()
    problem = check_problem(answer, 422, "source_not_found")
    assert problem["error"]["param"] == "source.split"
    assert "'train'" in problem["detail"]


def test_a_private_dataset_needs_a_named_secret_that_nobody_sees(fetching: Fetching) -> None:
    fetching.hub.private = True
    assert fetching.refused(HUB)["code"] == "source_not_found"
    view = fetching.made({**HUB, "token_secret": "team"})
    assert (view["error"], view["counts"]["pairs"]) == (None, 40)
    assert TOKEN not in fetching.everything_said() + json.dumps(fetching.report(view))
    unknown = fetching.post({**HUB, "token_secret": "other"})
    assert check_problem(unknown, 422, "unknown_secret")["error"]["param"] == "source.token_secret"


def test_a_gated_dataset_says_so(fetching: Fetching) -> None:
    fetching.hub.gated = True
    assert fetching.refused(HUB)["code"] == "source_gated"


def test_a_download_that_breaks_off_goes_on_at_the_same_commit(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    first, second = pairs(400), pairs(700)[len(pairs(400)) :]
    hub = fetching.hub
    hub.files, hub.cut_at, hub.damaged = {"1.jsonl": first, "2.jsonl": second}, 20_500, {"2.jsonl"}
    dataset_id, context = fetching.claimed(HUB)
    with pytest.raises(Unavailable, match="sha1") as caught:
        fetch(context, fetching.dataset(dataset_id))
    assert caught.value.retryable
    assert [name for name in fetching.uploads() if name.endswith(".part")] == fetching.uploads()
    # Somebody pushes before the next attempt: what was pinned stays.
    hub.server.answer = lambda one: hub.answer(one) if COMMIT in one.path else Reply(500)
    before = len(hub.server.asked)
    fetch(context, fetching.dataset(dataset_id))
    dataset = fetching.dataset(dataset_id)
    assert dataset.origin is not None
    assert dataset.origin["commit"] == COMMIT
    assert fetching.uploads() == [dataset_id]
    place = fetching.world.settings.upload_dir / dataset_id
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    with tarfile.open(place) as archive:
        members = {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    assert members == {"1.jsonl": first, "2.jsonl": second}
    assert dataset.sha256 == hashlib.sha256(place.read_bytes()).hexdigest()
    ranges = [one.headers["range"] for one in hub.server.asked if "range" in one.headers]
    assert ranges == ["bytes=20000-"], "it went on where it broke off"
    paths = [one.path.rpartition("/")[2] for one in hub.server.asked[before:]]
    assert paths == ["2.jsonl"], "what was whole is not fetched again"
    fetch(context, dataset)
    assert len(hub.server.asked) == before + 1, "what is here is not fetched again"


def test_main_that_moved_is_another_dataset(fetching: Fetching) -> None:
    first = fetching.made(HUB)
    fetching.hub.commit, fetching.hub.files = LATER, {"prefs.jsonl": pairs(50)}
    second = fetching.made(HUB)
    assert (first["commit"], second["commit"]) == (COMMIT, LATER)
    assert (first["counts"]["pairs"], second["counts"]["pairs"]) == (40, 50)


def test_a_hub_that_is_down_fails_the_job_after_its_retries(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDPO_WORKER__MAX_RETRIES", "1")
    fetching.hub.down = True
    view = fetching.made(HUB)
    job = fetching.world.get(f"/v1/jobs/{view['job_id']}").json()
    assert (job["status"], job["error"]["code"]) == ("failed", "dependency_error")
    assert view["status"] == "invalid"
    assert "503" in view["error"]["message"]


def test_a_hub_that_is_switched_off_is_refused_at_once(fetching: Fetching) -> None:
    fetching.world.app.state.settings = Settings(models={"hub_enabled": False})
    problem = check_problem(fetching.post(HUB), 403, "source_not_allowed")
    assert "KDPO_MODELS__HUB_ENABLED" in problem["hint"]
    assert fetching.hub.server.asked == []


# ------------------------------------------------------------------ https


def serve(fetching: Fetching, data: bytes, etag: str | None = '"one"') -> None:
    fetching.https.answer = lambda asked: file_reply(asked, data, etag=etag)


def test_https_with_checksum_and_signed_query(fetching: Fetching) -> None:
    data = gzipped(pairs(40))
    serve(fetching, data)
    url = fetching.url("/prefs.bin?signature=TOPSECRET")
    view = fetching.made({"type": "https", "url": url, "sha256": hashlib.sha256(data).hexdigest()})
    assert (view["error"], view["counts"]["pairs"], view["name"]) == (None, 40, "prefs.bin")
    assert view["sha256"] == hashlib.sha256(data).hexdigest()
    assert [asked.path for asked in fetching.https.asked] == ["/prefs.bin?signature=TOPSECRET"]
    assert fetching.https.asked[0].headers["host"] == f"localhost:{fetching.https.port}"
    report = fetching.report(view)
    assert report["detected"]["container"] == "jsonl.gz"
    assert "TOPSECRET" not in json.dumps([view, report])
    logs = [p.read_text() for p in fetching.folder.rglob("log.txt")]
    assert logs
    assert "TOPSECRET" not in "".join(logs)


def test_https_with_another_checksum_is_refused(fetching: Fetching) -> None:
    serve(fetching, pairs(40))
    source = {"type": "https", "url": fetching.url(), "sha256": "0" * 64}
    assert fetching.refused(source)["code"] == "source_changed"


@pytest.mark.parametrize("etag", ['"one"', None, 'W/"one"'])
def test_https_goes_on_where_it_broke_off_if_the_file_is_the_same(
    fetching: Fetching, etag: str | None
) -> None:
    data = pairs(4000)
    versions = [(data, etag, 100_000), (data, etag, None)]
    ranges = broken_off_and_fetched_again(fetching, versions)
    assert ranges == [None, "bytes=100000-" if etag == '"one"' else None]


def test_https_starts_over_when_the_file_has_changed(fetching: Fetching) -> None:
    versions = [(pairs(4000), '"one"', 100_000), (pairs(50), '"two"', None)]
    assert broken_off_and_fetched_again(fetching, versions) == [None, "bytes=100000-"]


@pytest.mark.parametrize(
    ("part", "told", "etag"),
    [
        (slice(200_000, None), "bytes 200000-{last}/{size}", '"one"'),
        (slice(100_000, 150_000), "bytes 100000-149999/{size}", '"one"'),
        (slice(100_000, None), "bytes 100000-{last}/{more}", '"one"'),
        (slice(100_000, None), "bytes 100000-{last}/{size}", '"two"'),
        (slice(100_000, None), "", '"one"'),
    ],
    ids=["another beginning", "another end", "another size", "another version", "none"],
)
def test_a_wrong_part_is_dropped_and_the_next_attempt_asks_for_all(
    fetching: Fetching, part: slice, told: str, etag: str
) -> None:
    data = pairs(4000)
    size = len(data)
    told = told.format(last=size - 1, size=size, more=size + 1)

    def answer(asked: Asked) -> Reply:
        if "range" not in asked.headers:
            first = len(fetching.https.asked) == 1
            return Reply(body=data, headers={"ETag": '"one"'}, cut_at=100_000 if first else None)
        return Reply(206, data[part], {"ETag": etag, "Content-Range": told} if told else {})

    fetching.https.answer = answer
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    with pytest.raises(Unavailable, match="transfer from localhost failed"):
        fetch(context, fetching.dataset(dataset_id))
    with pytest.raises(Unavailable, match="asked for the bytes from 100000 on") as wrong:
        fetch(context, fetching.dataset(dataset_id))
    assert "dropped" in wrong.value.hint
    fetch(context, fetching.dataset(dataset_id))
    assert (fetching.world.settings.upload_dir / dataset_id).read_bytes() == data
    asked = [request.headers.get("range") for request in fetching.https.asked]
    assert asked == [None, "bytes=100000-", None]


def broken_off_and_fetched_again(
    fetching: Fetching, versions: list[tuple[bytes, str | None, int | None]]
) -> list[str | None]:
    """Fetch twice, where the first answer breaks off; return the ranges that were asked for."""

    def answer(asked: Asked) -> Reply:
        data, etag, cut_at = versions[len(fetching.https.asked) - 1]
        reply = file_reply(asked, data, etag=etag)
        reply.cut_at = cut_at
        return reply

    fetching.https.answer = answer
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    with pytest.raises(Unavailable, match="transfer from localhost failed"):
        fetch(context, fetching.dataset(dataset_id))
    fetch(context, fetching.dataset(dataset_id))
    last = versions[-1][0]
    assert (fetching.world.settings.upload_dir / dataset_id).read_bytes() == last
    dataset = fetching.dataset(dataset_id)
    assert (dataset.bytes, dataset.sha256) == (len(last), hashlib.sha256(last).hexdigest())
    assert fetching.uploads() == [dataset_id]
    return [asked.headers.get("range") for asked in fetching.https.asked]


def test_redirects_stay_on_the_host(fetching: Fetching) -> None:
    def answer(asked: Asked) -> Reply:
        if asked.path == "/old":
            return Reply(302, headers={"Location": "/new?x=1"})
        if asked.path == "/away":
            return Reply(302, headers={"Location": f"https://127.0.0.1:{fetching.https.port}/new"})
        if asked.path == "/plain":
            return Reply(301, headers={"Location": "http://169.254.169.254/latest/meta-data"})
        if asked.path in ("/port", "/bracket"):
            where = "https://localhost:x/" if asked.path == "/port" else "https://[/"
            return Reply(302, headers={"Location": where})
        if asked.path == "/loop":
            return Reply(307, headers={"Location": "/loop"})
        return file_reply(asked, pairs(40))

    fetching.https.answer = answer
    for path, code in (
        ("/away", "source_not_allowed"),
        ("/plain", "source_not_allowed"),
        ("/port", "source_refused"),
        ("/bracket", "source_refused"),
        ("/loop", "source_refused"),
    ):
        error = fetching.refused({"type": "https", "url": fetching.url(path)})
        assert error["code"] == code, path
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url("/old")})
    fetch(context, fetching.dataset(dataset_id))
    assert (fetching.world.settings.upload_dir / dataset_id).read_bytes() == pairs(40)


def test_a_listed_host_on_a_private_address_is_not_connected_to(fetching: Fetching) -> None:
    serve(fetching, pairs(40))
    error = fetching.refused({"type": "https", "url": fetching.url(host="127.0.0.1")})
    assert error["code"] == "source_address_blocked"
    assert "loopback" in error["message"]
    assert fetching.https.asked == []


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Reply(404), "source_refused"),
        (Reply(403), "source_refused"),
        (Reply(200, b""), "empty_file"),
        (Reply(200, b"x" * 3_000_001), "file_too_large"),
    ],
)
def test_answers_that_are_no_data(fetching: Fetching, reply: Reply, code: str) -> None:
    fetching.https.answer = lambda _asked: reply
    assert fetching.refused({"type": "https", "url": fetching.url()})["code"] == code
    assert len(fetching.https.asked) == 1


def test_a_source_that_could_not_be_had_is_asked_for_again(fetching: Fetching) -> None:
    fetching.https.answer = lambda _asked: Reply(403)
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    assert validate_dataset.run(context)["status"] == "invalid"
    fetching.world.finish(context.fence)
    serve(fetching, pairs(40))
    answer = fetching.world.post(
        f"/v1/datasets/{dataset_id}/versions", json={"policy": {}}, headers={"Prefer": "wait=0"}
    )
    assert (answer.status_code, answer.json()["version"]) == (202, 2)
    second = fetching.dataset(answer.json()["id"])
    fetch(fetching.attempt(), second)
    assert fetching.dataset(second.id).sha256 == hashlib.sha256(pairs(40)).hexdigest()
    assert fetching.uploads() == [dataset_id]


def test_what_it_is_is_told_from_its_bytes(fetching: Fetching) -> None:
    reply = Reply(200, b"BZh9" + b"x" * 100, {"Content-Type": "application/json"})
    fetching.https.answer = lambda _asked: reply
    view = fetching.made({"type": "https", "url": fetching.url()})
    assert (view["status"], view["error"]["code"]) == ("invalid", "unsupported_media_type")


def test_the_size_is_counted_where_it_is_not_told(fetching: Fetching) -> None:
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    headers = {"Transfer-Encoding": "chunked"}
    fetching.https.answer = lambda _asked: Reply(200, chunk * 40 + b"0\r\n\r\n", headers)
    assert fetching.refused({"type": "https", "url": fetching.url()})["code"] == "file_too_large"


def test_an_untrusted_certificate_is_refused(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KDPO_SOURCES__CA_FILE")
    serve(fetching, pairs(40))
    error = fetching.refused({"type": "https", "url": fetching.url()})
    assert error["code"] == "source_refused"
    assert "certificate" in error["message"]
    assert fetching.https.asked == []


def test_the_name_is_resolved_once(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, port: int, **more: Any) -> Any:
        """A name server that says something else the second time."""
        if host != "localhost":
            return real(host, port, **more)
        calls.append(host)
        return real("127.0.0.1" if len(calls) == 1 else "203.0.113.9", port, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    replies = [Reply(302, headers={"Location": "/there"}), file_reply(Asked("/", {}), pairs(40))]
    fetching.https.answer = lambda _asked: replies[len(fetching.https.asked) - 1]
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    fetch(context, fetching.dataset(dataset_id))
    assert calls == ["localhost"]
    assert [asked.path for asked in fetching.https.asked] == ["/prefs.jsonl", "/there"]


def test_a_server_that_stalls_meets_the_deadline(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDPO_SOURCES__DEADLINE_S", "1")
    go_on = threading.Event()
    fetching.https.answer = lambda _asked: Reply(200, pairs(40), pause=lambda: go_on.wait(30))
    try:
        error = fetching.refused({"type": "https", "url": fetching.url()})
    finally:
        go_on.set()
    assert error["code"] == "source_too_slow"


def test_an_answer_that_ends_when_time_is_over_is_too_slow(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is broken off may look like one that the server has ended."""
    late_s = 0.0
    monkeypatch.setattr(assembly, "time", SimpleNamespace(monotonic=lambda: monotonic() + late_s))

    def answer(_asked: Asked) -> Reply:
        nonlocal late_s
        late_s = 1e6
        return Reply(200, pairs(40), cut_at=0)

    fetching.https.answer = answer
    error = fetching.refused({"type": "https", "url": fetching.url()})
    assert error["code"] == "source_too_slow"


def test_a_fetch_can_be_cancelled(fetching: Fetching) -> None:
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    job_id = context.fence.job_id

    def cancel() -> None:
        fetching.world.post(f"/v1/jobs/{job_id}/cancel")
        time.sleep(0.1)

    fetching.https.answer = lambda _asked: Reply(200, pairs(20_000), pause=cancel)
    with pytest.raises(CancelRequested):
        fetch(context, fetching.dataset(dataset_id))
    job = fetching.world.get(f"/v1/jobs/{job_id}").json()
    assert (job["phase"], job["progress"]["unit"]) == ("downloading_data", "bytes")
    assert job["progress"]["total"] == len(pairs(20_000))
    assert fetching.uploads() == []


def test_an_attempt_that_lost_its_job_puts_nothing_in_place(fetching: Fetching) -> None:
    serve(fetching, pairs(40))
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    context.fence = Fence(context.fence.job_id, context.fence.attempt + 1)
    with pytest.raises(LeaseLost):
        fetch(context, fetching.dataset(dataset_id))
    assert not (fetching.world.settings.upload_dir / dataset_id).exists()
    assert fetching.dataset(dataset_id).sha256 is None


def test_two_attempts_do_not_write_to_one_file(fetching: Fetching) -> None:
    serve(fetching, pairs(40))
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    folder = fetching.world.settings.upload_dir
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{dataset_id}.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        fetching.world.post(f"/v1/jobs/{context.fence.job_id}/cancel")
        with pytest.raises(CancelRequested):
            fetch(context, fetching.dataset(dataset_id))
        other.write(b"of the other")
    assert fetching.https.asked == []
    assert (folder / f".{dataset_id}.part").read_bytes() == b"of the other"


def test_what_is_in_its_place_is_not_fetched_again(fetching: Fetching) -> None:
    """Its bytes are in place before the database knows of them: a commit that is to come, or a
    worker that died between both."""
    serve(fetching, pairs(40))
    dataset_id, context = fetching.claimed({"type": "https", "url": fetching.url()})
    place = fetching.world.settings.upload_dir / dataset_id
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(pairs(40))
    fetch(context, fetching.dataset(dataset_id))
    assert fetching.https.asked == []
    found = fetching.dataset(dataset_id)
    assert (found.bytes, found.sha256) == (
        len(pairs(40)), hashlib.sha256(pairs(40)).hexdigest()
    )  # fmt: skip


def test_a_version_that_comes_meanwhile_waits_for_the_bytes(fetching: Fetching) -> None:
    first, context = fetching.claimed({"type": "https", "url": fetching.url()})
    others: list[threading.Thread] = []
    made: list[str] = []

    def ask_again() -> None:
        body = {"policy": {"pairing": "all"}}
        answer = fetching.world.post(
            f"/v1/datasets/{first}/versions", json=body, headers={"Prefer": "wait=0"}
        )
        made.append(answer.json()["id"])
        second = fetching.attempt()
        others.append(
            threading.Thread(target=fetch, args=(second, fetching.dataset(made[0])), daemon=True)
        )
        others[0].start()
        others[0].join(0.5)

    # Without an ETag: whoever comes second would begin again.
    fetching.https.answer = lambda _asked: Reply(200, pairs(4000), pause=ask_again)
    fetch(context, fetching.dataset(first))
    others[0].join(20)
    assert not others[0].is_alive()
    assert len(fetching.https.asked) == 1
    assert fetching.uploads() == [first]
    sha256 = hashlib.sha256(pairs(4000)).hexdigest()
    assert [fetching.dataset(name).sha256 for name in (first, made[0])] == [sha256] * 2


def test_a_file_that_got_its_place_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, place = tmp_path / ".x.part", tmp_path / "x"
    part.write_bytes(b"whole")
    real, waits = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        """A lock that comes when who had it before has put the file in its place."""
        if not place.exists():
            part.replace(place)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_writer(part, on_wait=lambda: waits.append("once")) as file:
        file.write(b"anew")
    assert (place.read_bytes(), part.read_bytes(), waits) == (b"whole", b"anew", ["once"])


# ------------------------------------------------------------------ paths


def test_a_path_below_a_listed_folder(fetching: Fetching) -> None:
    file = fetching.folder / "open" / "deep" / "prefs.jsonl"
    file.parent.mkdir()
    file.write_bytes(pairs(40))
    (fetching.folder / "open" / "inside").symlink_to(file)
    for path in (str(file), "deep/prefs.jsonl"):
        dataset_id, context = fetching.claimed({"type": "path", "path": path})
        fetch(context, fetching.dataset(dataset_id))
        copy = fetching.world.settings.upload_dir / dataset_id
        assert copy.read_bytes() == pairs(40)
        assert not copy.samefile(file), "the dataset does not change with the file"
        fetching.world.finish(context.fence)
    view = fetching.made({"type": "path", "path": "inside"})
    assert (view["error"], view["counts"]["pairs"], view["name"]) == (None, 40, "inside")


def test_paths_that_lead_out_are_refused(fetching: Fetching) -> None:
    secret = fetching.folder / "secret.jsonl"
    secret.write_bytes(pairs(40))
    root = fetching.folder / "open"
    (root / "link").symlink_to(secret)
    (root / "up").symlink_to(fetching.folder)
    (root / "folder").mkdir()
    for path, code in (
        (str(secret), "source_not_found"),
        ("../secret.jsonl", "source_not_found"),
        ("link", "source_not_found"),
        ("up/secret.jsonl", "source_not_found"),
        ("nothing.jsonl", "source_not_found"),
        (".", "source_not_found"),
        ("folder", "source_unreadable"),
    ):
        assert fetching.refused({"type": "path", "path": path})["code"] == code, path


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_input", "source"),
        ({"source": {**HUB, "token": "hf_x"}}, "invalid_input", "source.token"),
        ({"source": {"type": "ftp"}}, "invalid_input", "source"),
        ({"source": HUB, "polcy": {}}, "invalid_input", "polcy"),
        ({"source": HUB, "policy": {"on_tie": "maybe"}}, "invalid_input", "policy.on_tie"),
        ({"source": HUB, "name": "a\nb"}, "invalid_input", "name"),
        ({"source": {"type": "https", "url": "http://localhost/x"}}, "unusable_url", "source.url"),
    ],
)
def test_bodies_that_are_refused(
    fetching: Fetching, body: dict[str, object], code: str, param: str
) -> None:
    problem = check_problem(fetching.world.post("/v1/datasets", json=body), 422, code)
    assert problem["error"]["param"] == param
    assert fetching.world.get("/v1/datasets").json()["data"] == []


def test_json_that_is_none_or_too_long(fetching: Fetching) -> None:
    kind = {"content-type": "application/json; charset=utf-8"}
    broken = fetching.world.post("/v1/datasets", content=b"{", headers=kind)
    check_problem(broken, 400, "malformed_request")
    long = fetching.world.post("/v1/datasets", content=b" " * 1_100_000, headers=kind)
    check_problem(long, 413, "too_large")
