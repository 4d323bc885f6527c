"""What people come for, each in one call: recommend, fine_tune, wait, download."""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kdpo.calls import HasPolicy, call, listing
from kdpo.downloads import DownloadProgress, downloaded
from kdpo.errors import InvalidArgument, KdpoClientError
from kdpo.evaluations import Split, asked_evaluation, get_evaluation
from kdpo.flows import FilePart, Flow, Items, Request, heard
from kdpo.resources import (
    ANSWER_S,
    get_recommendation,
    got,
    id_of,
    paged,
    posted,
    uploaded,
    without_none,
)
from kdpo.sending import Policy, json_body, parsed, sent
from kdpo.types import Checkpoint, Dataset, Evaluation, Job, Recommendation, Update
from kdpo.watching import Clock, verdict, watching

Told = Callable[[Job], None]
Data = str | Path | Dataset
DATASET_PREFIX = "ds_"
CHECKPOINT_PREFIX = "ckpt_"
VALIDATION_S = 60


class WorkflowCalls:
    """The calls of the clients themselves."""

    @call
    def recommend(
        self: HasPolicy,
        data: Data,
        *,
        model: str,
        seed: int = 0,
        policy: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        wait: bool = True,
        timeout_s: float | None = None,
        on_progress: Told | None = None,
        on_upload: Callable[[int, int], None] | None = None,
    ) -> Flow[Recommendation]:
        """Return which kernel and divergence fit the data under a model, and why.

        `data` is a file, or a dataset or its id. `policy` says how the rows of a file become pairs.
        Without `wait` the answer comes later: `client.wait` and `client.recommendations.get`.
        """
        return _recommended(
            data, self._policy, model=model, seed=seed, policy=policy, metadata=metadata,
            wait=_Wait(timeout_s, on_progress) if wait else None, on_upload=on_upload,
        )  # fmt: skip

    @call
    def fine_tune(
        self: HasPolicy,
        /,
        data: Data,
        *,
        model: str,
        method: str | Mapping[str, Any] = "auto",
        kernel: str | Mapping[str, Any] | None = None,
        divergence: str | Mapping[str, Any] | None = None,
        search: Mapping[str, Any] | None = None,
        seed: int = 0,
        suffix: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait: bool = False,
        timeout_s: float | None = None,
        on_progress: Told | None = None,
        on_upload: Callable[[int, int], None] | None = None,
        **hyperparameters: Any,
    ) -> Flow[Job]:
        """Fine-tune a model: `auto` recommends and searches first, `kernel_dpo` and `dpo` do not.

        `kernel` and `divergence` name the pair of `kernel_dpo`, `search` limits the search of
        `auto`, and hyperparameters are those of docs/training.md. A mapping as `method` is sent as
        it is. The server refuses what would have no effect.
        """
        return _fine_tuned(
            data,
            self._policy,
            body=without_none(
                {
                    "model": model, "seed": seed, "suffix": suffix, "metadata": metadata,
                    "method": method_of(
                        method, kernel=kernel, divergence=divergence, search=search,
                        hyperparameters=hyperparameters,
                    ),
                }
            ),
            wait=_Wait(timeout_s, on_progress) if wait else None,
            on_upload=on_upload,
        )  # fmt: skip

    @call
    def evaluate(
        self: HasPolicy,
        what: str | Checkpoint | Job,
        *,
        dataset: str | Dataset | None = None,
        split: Split | None = None,
        reward_model: str | None = None,
        max_prompts: int | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        metadata: Mapping[str, str] | None = None,
        wait: bool = True,
        timeout_s: float | None = None,
        on_progress: Told | None = None,
    ) -> Flow[Evaluation]:
        """Measure a checkpoint, or the best one of a job, on pairs that it was not trained on.

        With a `reward_model` it and its base answer prompts, and the answers are compared.
        """
        return _evaluated(
            what, self._policy, wait=_Wait(timeout_s, on_progress) if wait else None,
            ask=partial(
                asked_evaluation, dataset=dataset, split=split, reward_model=reward_model,
                max_prompts=max_prompts, max_new_tokens=max_new_tokens, seed=seed,
                metadata=metadata,
            ),
        )  # fmt: skip

    @call
    def upload(
        self: HasPolicy,
        path: str | Path,
        *,
        name: str | None = None,
        policy: Mapping[str, Any] | None = None,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> Flow[Dataset]:
        """Upload preference data and return the dataset that the server has made of it."""
        return uploaded(Path(path), self._policy, name=name, policy=policy, on_bytes=on_bytes)

    @call
    def wait(
        self: HasPolicy,
        job: str | Job | Recommendation | Dataset | Evaluation,
        *,
        timeout_s: float | None = None,
        on_progress: Told | None = None,
    ) -> Flow[Job]:
        """Return a job when it has succeeded.

        A job that fails, is cancelled or paused raises `JobFailed`, `JobCancelled`, `JobPaused`,
        each with `.job`; `TimedOut` is raised after `timeout_s`.
        """
        return _waited(job_id_of(job), self._policy, _Wait(timeout_s, on_progress))

    @listing
    def watch(
        self: HasPolicy,
        job: str | Job | Recommendation | Dataset | Evaluation,
        *,
        after: int | None = None,
        timeout_s: float | None = None,
        stream: bool = True,
    ) -> Items[Update]:
        """Iterate over what happens to a job until it has ended or is paused.

        Events behind `after` (a `seq`) come first. Without `stream` the job is polled, and updates
        have no events.
        """
        return watching(job_id_of(job), self._policy, _clock(timeout_s), after=after, stream=stream)

    @call
    def download(
        self: HasPolicy,
        what: str | Checkpoint | Job,
        folder: str | Path,
        *,
        parallel: int = 4,
        on_progress: Callable[[DownloadProgress], None] | None = None,
    ) -> Flow[Path]:
        """Bring a checkpoint, or the best one of a job, to a folder, and check every hash.

        What is there already is kept; a download that broke goes on where it was.
        """
        return _brought(what, Path(folder), self._policy, parallel=parallel, tell=on_progress)

    @call
    def request(
        self: HasPolicy,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        json: object | None = None,
    ) -> Flow[Any]:
        """Send any request to the API, e.g. `("GET", "/v1/studies")`, and return its JSON."""
        asked = Request(method.upper(), path, query=query or {}, json=json)
        return _plain(asked, self._policy)


class _Wait:
    """How long to wait, and who hears of it."""

    def __init__(self, timeout_s: float | None, told: Told | None) -> None:
        self.timeout_s = timeout_s
        self.told = told


def method_of(
    method: str | Mapping[str, Any],
    *,
    kernel: str | Mapping[str, Any] | None,
    divergence: str | Mapping[str, Any] | None,
    search: Mapping[str, Any] | None,
    hyperparameters: Mapping[str, Any],
) -> dict[str, Any]:
    """Return `method` as the API has it.

    Raises:
        InvalidArgument: an option would be ignored.
    """
    options = without_none(
        {
            "kernel": kernel,
            "divergence": divergence,
            "search": search,
            "hyperparameters": dict(hyperparameters) or None,
        }
    )
    if isinstance(method, str):
        return {"type": method, method: options}
    if options:
        raise InvalidArgument(
            f"received a whole `method` and {', '.join(options)} beside it, which would be ignored",
            hint='put them into the method, or name it: method="kernel_dpo"',
        )
    return dict(method)


def job_id_of(thing: str | Job | Recommendation | Dataset | Evaluation) -> str:
    """Return the id of the job that makes something."""
    match thing:
        case Dataset() | Recommendation():
            return thing.job_id
        case _:
            return id_of(thing)


def as_file(data: Data) -> Path | None:
    """Return the file that is meant; None for a dataset and its id."""
    if isinstance(data, Dataset) or (isinstance(data, str) and data.startswith(DATASET_PREFIX)):
        return None
    path = Path(data).expanduser()
    if not path.is_file():
        raise InvalidArgument(
            f"received {str(data)!r}, expected a file, or the id of a dataset ({DATASET_PREFIX}…)",
            hint="check the path; `kdpo` runs in another folder than you may think",
        )
    return path


def _clock(timeout_s: float | None) -> Clock:
    now = time.monotonic
    return Clock(now, None if timeout_s is None else now() + timeout_s)


def _recommended(
    data: Data,
    sending: Policy,
    *,
    model: str,
    seed: int,
    policy: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None,
    wait: _Wait | None,
    on_upload: Callable[[int, int], None] | None,
) -> Flow[Recommendation]:
    file = as_file(data)
    if file is None:
        if policy is not None:
            raise InvalidArgument(
                "`policy` is for reading a file, and a dataset was given",
                hint="client.datasets.reread makes a dataset of it under another policy",
            )
        body = without_none(
            {"dataset_id": _id(data), "model": model, "seed": seed, "metadata": metadata}
        )
        made = yield from posted(Recommendation, "/v1/recommendations", sending, body)
    else:
        form = {"model": model, "seed": str(seed)}
        if policy is not None:
            form["policy"] = json.dumps(policy)
        if metadata is not None:
            form["metadata"] = json.dumps(metadata)
        request = Request(
            "POST", "/v1/recommendations", file=FilePart(file, on_upload), form=form,
            read_timeout_s=VALIDATION_S + ANSWER_S,
        )  # fmt: skip
        made = parsed(Recommendation, (yield from sent(request, sending)).content)
    if wait is None:
        return made
    yield from _waited(made.job_id, sending, wait)
    return (yield from get_recommendation(made.id, sending))


def _fine_tuned(
    data: Data,
    policy: Policy,
    *,
    body: dict[str, Any],
    wait: _Wait | None,
    on_upload: Callable[[int, int], None] | None,
) -> Flow[Job]:
    file = as_file(data)
    if file is None:
        dataset_id = _id(data)
    else:
        dataset = yield from uploaded(file, policy, wait_s=VALIDATION_S, on_bytes=on_upload)
        if dataset.status == "validating":
            yield from _waited(dataset.job_id, policy, _Wait(None, None))
        dataset_id = dataset.id
    body = {**body, "dataset_id": dataset_id}
    job = yield from posted(Job, "/v1/fine_tuning/jobs", policy, body)
    if wait is None:
        return job
    return (yield from _waited(job.id, policy, wait))


def _evaluated(
    what: str | Checkpoint | Job,
    policy: Policy,
    *,
    wait: _Wait | None,
    ask: Callable[[Checkpoint, Policy], Flow[Evaluation]],
) -> Flow[Evaluation]:
    made = yield from ask((yield from _checkpoint(what, policy)), policy)
    if wait is None:
        return made
    yield from _waited(made.id, policy, wait)
    return (yield from get_evaluation(made.id, policy))


def _waited(job_id: str, policy: Policy, wait: _Wait) -> Flow[Job]:
    told = wait.told

    def hear(update: Update) -> None:
        if told is not None:
            told(update.job)

    updates = watching(job_id, policy, _clock(wait.timeout_s))
    return verdict((yield from heard(updates, hear)))


def _brought(
    what: str | Checkpoint | Job,
    folder: Path,
    policy: Policy,
    *,
    parallel: int,
    tell: Callable[[DownloadProgress], None] | None,
) -> Flow[Path]:
    if parallel < 1:
        raise InvalidArgument(f"received parallel={parallel}, expected 1 or more")
    checkpoint = yield from _checkpoint(what, policy)
    return (yield from downloaded(checkpoint, folder, policy, parallel=parallel, tell=tell))


def _checkpoint(what: str | Checkpoint | Job, policy: Policy) -> Flow[Checkpoint]:
    """Return the checkpoint that is meant; of a job the one that it names as its result."""
    if isinstance(what, Checkpoint):
        return what
    wanted = id_of(what)
    if not wanted.startswith(CHECKPOINT_PREFIX):
        job = yield from got(Job, f"/v1/jobs/{wanted}", policy)
        found: list[Checkpoint] = []
        if job.checkpoint_id is None:
            pages = paged(Checkpoint, "/v1/checkpoints", policy, limit=1, job_id=job.id)
            yield from heard(pages, found.append)
        if job.checkpoint_id is None and not found:
            raise KdpoClientError(
                f"job {job.id} is {job.status} and has published no checkpoint",
                hint="wait for it first: client.wait(job)",
            )
        wanted = job.checkpoint_id or found[0].id
    return (yield from got(Checkpoint, f"/v1/checkpoints/{wanted}", policy))


def _plain(request: Request, policy: Policy) -> Flow[Any]:
    reply = yield from sent(request, policy)
    return json_body(reply.content)


def _id(data: Data) -> str:
    return data.id if isinstance(data, Dataset) else str(data)
