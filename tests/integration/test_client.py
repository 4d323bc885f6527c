"""Both clients against a running server; workers act through the repositories."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.keys import Scope
from core.lifecycle import JobKind, JobStatus, Phase
from kdpo import (
    AsyncClient,
    Client,
    ConnectionFailed,
    InvalidRequest,
    Job,
    JobFailed,
    JobPaused,
    NotFound,
    PermissionDenied,
    RateLimited,
    TimedOut,
    Unauthenticated,
    UnsupportedMedia,
    Update,
)
from models.evaluation import AnsweredPrompt
from models.repositories.evaluations import AnswerRepository
from models.repositories.jobs import Fence, JobRepository
from tests.integration.api_world import MODEL, pairs, recommendation
from tests.integration.live_world import Live, live_api, until
from tests.integration.test_api_evaluations import RESULT as EVALUATED
from tests.integration.test_api_recommendations import store

pytestmark = pytest.mark.timeout(60)
BIG = bytes(range(256)) * 40_000
FILES = {"model.safetensors": BIG, "config.json": b"{}", "sub dir/é.txt": b"x", "empty": b""}


@pytest.fixture
def live(sqlite_url: str, tmp_path: Path) -> Iterator[Live]:
    with live_api(sqlite_url, tmp_path, api={"stream_poll_s": 0.05}) as made:
        yield made


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    live.headers()
    with Client(live.url, live.keys["ada"], max_retries=1) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(pairs(30))
    return path


@contextmanager
def working(live: Live, *does: tuple[JobKind, Callable[[], None]]) -> Iterator[None]:
    """Do jobs in the background, one after the other, each as soon as it is queued."""

    def work() -> None:
        for kind, do in does:
            live.soon(do, kind).join()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)


def validating(live: Live) -> AbstractContextManager[None]:
    return working(live, (JobKind.DATASET, live.validate))


def uploaded(live: Live, client: Client, file: Path) -> str:
    with validating(live):
        return client.upload(file).id


def test_datasets(live: Live, client: Client, file: Path) -> None:
    sent: list[tuple[int, int]] = []
    with validating(live):
        made = client.upload(
            file, name="sums", policy={"on_invalid": "fail"}, on_bytes=lambda *at: sent.append(at)
        )
    assert (made.name, made.status) == ("sums", "ready")
    assert sent[-1] == (file.stat().st_size,) * 2
    assert client.datasets.get(made).model_extra is not None
    assert [found.id for found in client.datasets.list()] == [made.id]
    assert client.datasets.report(made).counts == made.counts
    rows = list(client.datasets.rows(made, limit=7))
    assert [row.number for row in rows] == [*range(1, 8)]
    with validating(live):
        other = client.datasets.reread(made, policy={"split": {"seed": 3}})
    assert (other.version, other.id != made.id) == (2, True)
    assert client.wait(made).status == "succeeded"
    client.datasets.delete(other)
    with pytest.raises(NotFound, match=other.id):
        client.datasets.get(other)


def test_a_bad_file_names_its_lines(live: Live, client: Client, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(pairs(20) + b'{"prompt": "?", "chosen": "yes"}\n' * 20)
    with validating(live), pytest.raises(InvalidRequest) as caught:
        client.upload(bad)
    assert caught.value.code == "dataset_invalid"
    assert caught.value.errors[0].line == 21
    assert caught.value.body["dataset_id"].startswith("ds_")
    assert "line 21" in str(caught.value)
    packed = tmp_path / "prefs.7z"
    packed.write_bytes(b"7z\xbc\xaf\x27\x1c" + b"0" * 50)
    with pytest.raises(UnsupportedMedia):
        client.upload(packed)


def test_errors_are_typed(live: Live, client: Client) -> None:
    with pytest.raises(NotFound) as caught:
        client.jobs.get("job_nobody")
    assert (caught.value.code, caught.value.status) == ("not_found", 404)
    assert caught.value.request_id is not None
    assert caught.value.request_id.startswith("req_")
    with Client(live.url, "dk-test-wrong") as stranger, pytest.raises(Unauthenticated):
        next(stranger.jobs.list())
    reader = live.key("ada", (Scope.JOBS_READ,))
    with Client(live.url, reader) as narrow, pytest.raises(PermissionDenied, match="jobs:write"):
        narrow.jobs.cancel("job_nobody")
    with pytest.raises(InvalidRequest, match="learning_speed"):
        client.fine_tune(live.dataset(), model=MODEL, method="dpo", learning_speed=1)
    with Client("http://127.0.0.1:1", max_retries=0) as lost:
        with pytest.raises(ConnectionFailed, match="cannot reach") as broken:
            lost.jobs.get("x")
        assert not broken.value.sent


def begun(live: Live, client: Client, **method: Any) -> tuple[Job, Fence]:
    job = client.fine_tune(live.dataset(), model=MODEL, **method)
    fence = live.claim(JobKind.TRAINING)
    assert fence.job_id == job.id
    return job, fence


def phase(live: Live, fence: Fence, phase: Phase) -> None:
    with live.database.transaction() as session:
        JobRepository(session).set_phase(fence, phase)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "polls"])
def test_watching_a_job(live: Live, client: Client, stream: bool) -> None:
    job, fence = begun(live, client, method="dpo")
    seen: list[Update] = []
    for update in client.watch(job, stream=stream, after=0 if stream else None):
        seen.append(update)
        if len(seen) == 1:
            phase(live, fence, Phase.TRAINING)
        elif update.job.phase == "training" and not seen[-2].job.phase:
            live.finish(fence, result={"run": {"checkpoint_id": "ckpt_1"}})
    assert seen[0].job.status == "running"
    assert (seen[-1].job.status, seen[-1].job.checkpoint_id) == ("succeeded", "ckpt_1")
    told = [update.event.seq for update in seen if update.event is not None]
    assert told == ([1, 2, 3, 4, 5] if stream else [])
    assert [event.seq for event in client.jobs.events(job)] == [1, 2, 3, 4, 5]
    past = [update.event.type for update in client.watch(job, after=2) if update.event]
    assert past == ["job.phase", "job.status", "done"]


def test_streams_that_the_server_ends_are_opened_again(live: Live, client: Client) -> None:
    job, fence = begun(live, client, method="dpo")
    followers = live.app.state.followers
    found: list[Job] = []
    thread = threading.Thread(target=lambda: found.append(client.wait(job)))
    thread.start()
    until(lambda: followers._followers)
    (first,) = followers._followers
    followers._task.get_loop().call_soon_threadsafe(first.close)
    until(lambda: followers._followers and first not in followers._followers)
    phase(live, fence, Phase.SAVING)
    live.finish(fence)
    thread.join(30)
    assert [one.status for one in found] == ["succeeded"]


def test_too_many_streams_are_polled(sqlite_url: str, tmp_path: Path) -> None:
    with live_api(sqlite_url, tmp_path, api={"max_streams": 1}) as live:
        headers = {**live.headers(), "Accept": "text/event-stream"}
        with Client(live.url, live.keys["ada"]) as client:
            job, fence = begun(live, client, method="dpo")
            url = f"{live.url}/v1/jobs/{job.id}/events"
            with httpx.stream("GET", url, headers=headers, timeout=20) as taken:
                pieces = taken.iter_bytes()
                assert next(pieces)
                until(lambda: live.app.state.followers._streams)
                asked = f"/v1/jobs/{job.id}/events"
                with (
                    Client(live.url, live.keys["ada"], max_retries=0) as hasty,
                    pytest.raises(RateLimited, match="streams"),
                ):
                    hasty.request("GET", asked, query={"stream": True})
                threading.Timer(0.3, lambda: live.finish(fence)).start()
                assert client.wait(job).status == "succeeded"


def test_how_a_job_ends_is_how_a_wait_ends(live: Live, client: Client) -> None:
    job, fence = begun(live, client, method="dpo")
    with pytest.raises(TimedOut):
        client.wait(job, timeout_s=0.3)
    live.finish(
        fence, JobStatus.FAILED, error={"code": "loss_nan", "message": "nan", "hint": "lower it"}
    )
    with pytest.raises(JobFailed, match="nan") as caught:
        client.wait(job)
    assert caught.value.job.error is not None
    assert (caught.value.hint, caught.value.job.error.code) == ("lower it", "loss_nan")
    paused, fence = begun(live, client, method="dpo")
    with live.database.transaction() as session:
        JobRepository(session).pause(
            fence, {"code": "disk_full", "message": "full", "hint": None}, data={"free_bytes": 0}
        )
    with pytest.raises(JobPaused, match="full"):
        client.wait(paused)
    assert client.jobs.resume(paused).status == "queued"
    assert client.jobs.cancel(paused).status == "cancelled"


def test_from_a_file_to_a_recommendation_and_its_job(
    live: Live, client: Client, file: Path
) -> None:
    def recommend() -> None:
        fence = live.claim(JobKind.RECOMMENDATION)
        store(live, fence, recommendation())
        live.finish(fence, result={"recommendation_id": fence.job_id})

    steps: list[str] = []
    work = ((JobKind.DATASET, live.validate), (JobKind.RECOMMENDATION, recommend))
    with working(live, *work):
        found = client.recommend(
            file, model=MODEL, metadata={"team": "x"}, on_progress=lambda job: steps.append(job.id)
        )
    assert found.answer is not None
    assert (found.answer.kernel, found.answer.divergence) == ("rbf", "kl")
    assert (found.ranking[1].kernel, found.metadata) == ("polynomial", {"team": "x"})  # type: ignore[attr-defined]
    assert set(steps) == {found.job_id}
    assert len(client.recommendations.matrix(found).cells) == 2
    assert [one.id for one in client.recommendations.list()] == [found.id]
    job = client.recommendations.accept(found, rank=2, n_epochs=2, suffix="second")
    assert job.method["kernel_dpo"]["kernel"]["type"] == "polynomial"  # type: ignore[attr-defined]
    assert job.method["kernel_dpo"]["hyperparameters"]["n_epochs"] == 2  # type: ignore[attr-defined]
    later = client.recommend(found.dataset_id, model=MODEL, wait=False)
    assert later.status == "queued"
    assert client.recommendations.cancel(later).status == "cancelled"


def evaluated(live: Live) -> None:
    """Do an evaluation as a worker does, with two answers of which one is scored."""
    fence = live.claim(JobKind.EVALUATION)
    answers = [
        AnsweredPrompt(
            job_id=fence.job_id, number=n, pair_id="0" * 32, prompt=f"p{n}", base="b", aligned="a"
        )
        for n in (1, 2)
    ]
    with live.database.transaction() as session:
        AnswerRepository(session).add(fence, answers, gpu_seconds=1.0)
    with live.database.transaction() as session:
        AnswerRepository(session).score(fence, [(1, -0.5, 0.5)], gpu_seconds=1.0)
    live.finish(fence, result=EVALUATED.model_dump(mode="json"))


def test_evaluations(live: Live, client: Client) -> None:
    job, fence = begun(live, client, method="dpo")
    checkpoint = live.publish(fence, FILES)
    live.finish(fence, result={"run": {"checkpoint_id": checkpoint}})
    told: list[str] = []
    with working(live, (JobKind.EVALUATION, lambda: evaluated(live))):
        found = client.evaluate(
            job, split="validation", max_prompts=2, seed=5, metadata={"team": "x"},
            on_progress=lambda job: told.append(job.kind),
        )  # fmt: skip
    assert (found.status, found.checkpoint_id, found.split) == (
        "succeeded", checkpoint, "validation",
    )  # fmt: skip
    assert (found.seed, found.metadata) == (5, {"team": "x"})
    assert set(told) == {"evaluation"}
    assert found.result is not None
    assert found.result.win_rate is not None
    assert found.result.win_rate.verdict == "better"
    assert found.result.accuracy.high == 0.7
    samples = list(client.evaluations.samples(found))
    assert [(one.number, one.aligned_reward) for one in samples] == [(1, 0.5), (2, None)]
    later = client.evaluate(checkpoint, dataset=found.dataset_id, wait=False)
    assert (later.status, later.split, later.result) == ("queued", "test", None)
    assert [one.id for one in client.evaluations.list()] == [later.id, found.id]
    assert list(client.evaluations.list(checkpoint="ckpt_none")) == []
    with pytest.raises(InvalidRequest, match="reward model"):
        client.evaluate(checkpoint, reward_model=MODEL)

    async def use() -> None:
        async with AsyncClient(live.url, live.keys["ada"]) as awaited:
            with working(live, (JobKind.EVALUATION, lambda: evaluated(live))):
                job = await awaited.wait(later)
            assert job.kind == "evaluation"
            same = await awaited.evaluations.get(later)
            assert same.result == found.result
            numbers = [one.number async for one in awaited.evaluations.samples(same, limit=1)]
            assert numbers == [1]
            with pytest.raises(NotFound):
                await awaited.evaluate("ckpt_none")

    asyncio.run(use())


def check_folder(folder: Path) -> None:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES


def test_downloads(live: Live, client: Client, tmp_path: Path) -> None:
    job, fence = begun(live, client, method="dpo")
    checkpoint = live.publish(fence, FILES)
    assert [file.sha256 for file in client.checkpoints.files(checkpoint)] == [
        hashlib.sha256(data).hexdigest() for data in FILES.values()
    ]
    check_folder(client.download(checkpoint, tmp_path / "whole"))
    # Half of a file is there already, as an earlier download has left it.
    sha = hashlib.sha256(BIG).hexdigest()
    begun_at = tmp_path / "half" / f".model.safetensors.{sha[:12]}.part"
    begun_at.parent.mkdir()
    begun_at.write_bytes(BIG[:5_000_000])
    first: list[int] = []
    client.download(job, tmp_path / "half", on_progress=lambda p: first.append(p.done_bytes))
    check_folder(tmp_path / "half")
    assert max(first) == sum(map(len, FILES.values()))
    assert not begun_at.exists()


def test_the_awaited_client(live: Live, file: Path, tmp_path: Path) -> None:
    live.headers()

    async def use() -> None:
        async with AsyncClient(live.url, live.keys["ada"]) as client:
            with validating(live):
                dataset = await client.upload(file)
            job = await client.fine_tune(dataset, model=MODEL, method="dpo")
            fence = live.claim(JobKind.TRAINING)
            seen: list[str] = []
            async for update in client.watch(job):
                if not seen:
                    checkpoint = live.publish(fence, FILES)
                    live.finish(fence, result={"run": {"checkpoint_id": checkpoint}})
                seen.append(update.job.status)
            assert seen[-1] == "succeeded"
            check_folder(await client.download(job, tmp_path / "out", parallel=2))
            assert [one.id async for one in client.jobs.list(kind="training")] == [job.id]
            assert [event.seq async for event in client.jobs.events(job, limit=2)] == [1, 2]
            waits = asyncio.gather(*(client.wait(job) for _ in range(3)))
            assert {one.id for one in await waits} == {job.id}
            with pytest.raises(NotFound):
                await client.jobs.get("job_nobody")

    asyncio.run(use())


def test_a_wait_can_be_cancelled(live: Live) -> None:
    live.headers()

    async def use() -> None:
        async with AsyncClient(live.url, live.keys["ada"]) as client:
            job = await client.fine_tune(live.dataset(), model=MODEL, method="dpo")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await client.wait(job)
            assert (await client.jobs.cancel(job)).status == "cancelled"

    asyncio.run(use())
    until(lambda: not live.app.state.followers._followers)
