"""The calls that both clients have, grouped as the API groups them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from kdpo.calls import HasPolicy, call, listing
from kdpo.flows import Emit, FilePart, Flow, Items, QueryValue, Request
from kdpo.sending import Policy, json_body, parsed, sent
from kdpo.types import (
    Checkpoint,
    CheckpointFile,
    Dataset,
    Evaluation,
    Event,
    Job,
    Matrix,
    Metrics,
    Recommendation,
    Report,
    Row,
)
from kdpo.watching import get_job

M = TypeVar("M", bound=BaseModel)
Order = Literal["asc", "desc"]
PAGE = 100
# What an answer may take beyond the time that the server was asked to wait.
ANSWER_S = 60.0


def got(kind: type[M], path: str, policy: Policy, **query: QueryValue) -> Flow[M]:
    """Return one object."""
    reply = yield from sent(Request("GET", path, query=query), policy)
    return parsed(kind, reply.content)


def posted(
    kind: type[M],
    path: str,
    policy: Policy,
    body: object | None = None,
    *,
    prefer_wait_s: int | None = None,
) -> Flow[M]:
    """Return what a POST answers, after at most `prefer_wait_s` where the server can wait."""
    waits = prefer_wait_s is not None
    request = Request(
        "POST",
        path,
        json={} if body is None else body,
        headers={"Prefer": f"wait={prefer_wait_s}"} if waits else {},
        read_timeout_s=prefer_wait_s + ANSWER_S if prefer_wait_s is not None else None,
    )
    reply = yield from sent(request, policy)
    return parsed(kind, reply.content)


def paged(
    kind: type[M],
    path: str,
    policy: Policy,
    /,
    *,
    limit: int | None,
    after: str | None = None,
    **query: QueryValue,
) -> Items[M]:
    """Emit the objects of all pages of a list, at most `limit` of them, those behind `after`."""
    left, cursor = limit, after
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        asked = {**query, "limit": size, "after": cursor}
        reply = yield from sent(Request("GET", path, query=asked), policy)
        page = json_body(reply.content)
        for item in page["data"]:
            yield Emit(kind.model_validate(item))
        if left is not None:
            left -= len(page["data"])
        if not page["has_more"]:
            return
        cursor = page["last_id"]


def id_of(thing: str | Dataset | Job | Recommendation | Checkpoint | Evaluation) -> str:
    """Return the id of an object, or an id as it is."""
    return thing if isinstance(thing, str) else thing.id


class JobCalls:
    """`client.jobs`: all kinds of jobs in one view."""

    @call
    def get(self: HasPolicy, job: str | Job) -> Flow[Job]:
        """Return a job as it is now."""
        return get_job(id_of(job), self._policy)

    @listing
    def list(
        self: HasPolicy,
        *,
        kind: str | None = None,
        status: str | None = None,
        dataset_id: str | None = None,
        model: str | None = None,
        order: Order = "desc",
        limit: int | None = None,
    ) -> Items[Job]:
        """Iterate over jobs, newest first, page by page as you go."""
        return paged(
            Job, "/v1/jobs", self._policy, limit=limit, kind=kind, status=status,
            dataset_id=dataset_id, model=model, order=order,
        )  # fmt: skip

    @call
    def cancel(self: HasPolicy, job: str | Job) -> Flow[Job]:
        """Cancel a job: at once when it waits, at its next step when it runs."""
        return posted(Job, f"/v1/jobs/{id_of(job)}/cancel", self._policy)

    @call
    def pause(self: HasPolicy, job: str | Job) -> Flow[Job]:
        """Pause a job; it keeps what it has done."""
        return posted(Job, f"/v1/jobs/{id_of(job)}/pause", self._policy)

    @call
    def resume(self: HasPolicy, job: str | Job) -> Flow[Job]:
        """Let a paused job go on where it was."""
        return posted(Job, f"/v1/jobs/{id_of(job)}/resume", self._policy)

    @call
    def retry(self: HasPolicy, job: str | Job) -> Flow[Job]:
        """Try a failed job again, from the last step that it finished."""
        return posted(Job, f"/v1/jobs/{id_of(job)}/retry", self._policy)

    @listing
    def events(
        self: HasPolicy,
        job: str | Job,
        *,
        after: str | None = None,
        order: Order = "asc",
        limit: int | None = None,
    ) -> Items[Event]:
        """Iterate over the events that are stored of a job, oldest first."""
        path = f"/v1/jobs/{id_of(job)}/events"
        return paged(Event, path, self._policy, limit=limit, after=after, order=order)

    @call
    def metrics(self: HasPolicy, job: str | Job, *, scope: str = "train") -> Flow[Metrics]:
        """Return the metric series of `train`, `baseline` or `trial:<number>`."""
        return got(Metrics, f"/v1/jobs/{id_of(job)}/metrics", self._policy, scope=scope)


class DatasetCalls:
    """`client.datasets`: preference pairs as the server has read them."""

    @call
    def upload(
        self: HasPolicy,
        path: str | Path,
        *,
        name: str | None = None,
        policy: Mapping[str, Any] | None = None,
        wait_s: int = 60,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> Flow[Dataset]:
        """Upload a file and return its dataset; an invalid one is an `InvalidRequest`.

        Validation that takes longer than `wait_s` goes on: `status` is `validating` then. `policy`
        says how rows become pairs (docs/datasets.md).
        """
        return uploaded(
            Path(path), self._policy, name=name, policy=policy, wait_s=wait_s, on_bytes=on_bytes
        )

    @call
    def fetch(
        self: HasPolicy,
        source: Mapping[str, Any],
        *,
        name: str | None = None,
        policy: Mapping[str, Any] | None = None,
        wait_s: int = 60,
    ) -> Flow[Dataset]:
        """Let the server fetch a dataset, e.g. `{"type": "huggingface", "repo_id": …}`."""
        body = without_none({"source": dict(source), "name": name, "policy": policy})
        return posted(Dataset, "/v1/datasets", self._policy, body, prefer_wait_s=wait_s)

    @call
    def get(self: HasPolicy, dataset: str | Dataset) -> Flow[Dataset]:
        """Return a dataset as it is now."""
        return got(Dataset, f"/v1/datasets/{id_of(dataset)}", self._policy)

    @listing
    def list(self: HasPolicy, *, order: Order = "desc", limit: int | None = None) -> Items[Dataset]:
        """Iterate over datasets, newest first, page by page as you go."""
        return paged(Dataset, "/v1/datasets", self._policy, limit=limit, order=order)

    @call
    def report(self: HasPolicy, dataset: str | Dataset) -> Flow[Report]:
        """Return what validation found: layout, counts, every kind of error, lint, a preview."""
        return got(Report, f"/v1/datasets/{id_of(dataset)}/report", self._policy)

    @listing
    def rows(
        self: HasPolicy,
        dataset: str | Dataset,
        *,
        view: Literal["canonical", "rejected"] = "canonical",
        limit: int | None = None,
    ) -> Items[Row]:
        """Iterate over the pairs, or over the rows that were rejected."""
        return paged(
            Row, f"/v1/datasets/{id_of(dataset)}/rows", self._policy, limit=limit, view=view
        )

    @call
    def reread(
        self: HasPolicy,
        dataset: str | Dataset,
        *,
        policy: Mapping[str, Any],
        name: str | None = None,
        wait_s: int = 60,
    ) -> Flow[Dataset]:
        """Read the upload of a dataset again under another policy, as a version of its own."""
        body = without_none({"policy": dict(policy), "name": name})
        path = f"/v1/datasets/{id_of(dataset)}/versions"
        return posted(Dataset, path, self._policy, body, prefer_wait_s=wait_s)

    @call
    def delete(self: HasPolicy, dataset: str | Dataset) -> Flow[None]:
        """Forget a dataset; refused while a job needs it."""
        return done(Request("DELETE", f"/v1/datasets/{id_of(dataset)}"), self._policy)


class RecommendationCalls:
    """`client.recommendations`: which pair fits a dataset under a model, and why."""

    @call
    def get(self: HasPolicy, recommendation: str | Recommendation) -> Flow[Recommendation]:
        """Return a recommendation as it is now."""
        return get_recommendation(id_of(recommendation), self._policy)

    @listing
    def list(self: HasPolicy, *, limit: int | None = None) -> Items[Recommendation]:
        """Iterate over recommendations, newest first, page by page as you go."""
        return paged(Recommendation, "/v1/recommendations", self._policy, limit=limit)

    @call
    def matrix(self: HasPolicy, recommendation: str | Recommendation) -> Flow[Matrix]:
        """Return the ranking as a heat map, with how often searches have tried each pair."""
        return got(Matrix, f"/v1/recommendations/{id_of(recommendation)}/matrix", self._policy)

    @call
    def accept(
        self: HasPolicy,
        /,
        recommendation: str | Recommendation,
        *,
        rank: int = 1,
        seed: int | None = None,
        suffix: str | None = None,
        metadata: Mapping[str, str] | None = None,
        **hyperparameters: Any,
    ) -> Flow[Job]:
        """Fine-tune with a pair of the ranking, the first one unless `rank` says another."""
        body = without_none(
            {
                "rank": rank, "seed": seed, "suffix": suffix, "metadata": metadata,
                "hyperparameters": hyperparameters or None,
            }
        )  # fmt: skip
        path = f"/v1/recommendations/{id_of(recommendation)}/accept"
        return posted(Job, path, self._policy, body)

    @call
    def cancel(self: HasPolicy, recommendation: str | Recommendation) -> Flow[Recommendation]:
        """Cancel a recommendation that is not finished."""
        path = f"/v1/recommendations/{id_of(recommendation)}/cancel"
        return posted(Recommendation, path, self._policy)


class CheckpointCalls:
    """`client.checkpoints`: weights that jobs have published."""

    @call
    def get(self: HasPolicy, checkpoint: str | Checkpoint) -> Flow[Checkpoint]:
        """Return a checkpoint."""
        return got(Checkpoint, f"/v1/checkpoints/{id_of(checkpoint)}", self._policy)

    @listing
    def list(
        self: HasPolicy, *, job_id: str | None = None, limit: int | None = None
    ) -> Items[Checkpoint]:
        """Iterate over checkpoints, newest first, page by page as you go."""
        return paged(Checkpoint, "/v1/checkpoints", self._policy, limit=limit, job_id=job_id)

    @listing
    def files(self: HasPolicy, checkpoint: str | Checkpoint) -> Items[CheckpointFile]:
        """Iterate over the files of a checkpoint, with sizes and hashes."""
        return files_of(id_of(checkpoint), self._policy)

    @call
    def export(
        self: HasPolicy,
        checkpoint: str | Checkpoint,
        *,
        merge: bool = True,
        dtype: str | None = None,
        push_to_hub: Mapping[str, Any] | None = None,
    ) -> Flow[Job]:
        """Merge an adapter into its base model, as a checkpoint that needs no adapter.

        `dtype` is the precision of the merged weights. `push_to_hub` has `repo_id`, `token_secret`
        and perhaps `private`; with `merge=False` the checkpoint is pushed as it is.
        """
        path = f"/v1/checkpoints/{id_of(checkpoint)}/export"
        options = without_none({"dtype": dtype, "push_to_hub": push_to_hub})
        return posted(Job, path, self._policy, {"merge": merge, **options})


def uploaded(
    path: Path,
    sending: Policy,
    *,
    name: str | None = None,
    policy: Mapping[str, Any] | None = None,
    wait_s: int = 60,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Flow[Dataset]:
    """Upload a file and return its dataset."""
    form = without_none({"name": name, "policy": None if policy is None else json.dumps(policy)})
    request = Request(
        "POST",
        "/v1/datasets",
        file=FilePart(path, on_bytes),
        form=form,
        headers={"Prefer": f"wait={wait_s}"},
        read_timeout_s=wait_s + ANSWER_S,
    )
    reply = yield from sent(request, sending)
    return parsed(Dataset, reply.content)


def files_of(checkpoint_id: str, policy: Policy) -> Items[CheckpointFile]:
    """Emit the files of a checkpoint; the list has one page."""
    reply = yield from sent(Request("GET", f"/v1/checkpoints/{checkpoint_id}/files"), policy)
    for item in json_body(reply.content)["data"]:
        yield Emit(CheckpointFile.model_validate(item))


def get_recommendation(recommendation_id: str, policy: Policy) -> Flow[Recommendation]:
    """Return a recommendation as it is now."""
    return got(Recommendation, f"/v1/recommendations/{recommendation_id}", policy)


def done(request: Request, policy: Policy) -> Flow[None]:
    """Send a request whose answer says nothing."""
    yield from sent(request, policy)


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is set."""
    return {name: value for name, value in values.items() if value is not None}
