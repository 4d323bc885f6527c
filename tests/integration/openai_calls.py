"""Calls of OpenAI's own client, unchanged, to a kdpo server: run as a script, one SDK a process."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
from openai import OpenAI

WAIT_S = 60.0


def main(url: str, key: str, data: str, model: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=key, timeout=30)
    with Path(data).open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    assert uploaded.object == "file"
    assert client.files.retrieve(uploaded.id).bytes == Path(data).stat().st_size
    assert uploaded.id in [one.id for one in client.files.list(limit=1)]

    jobs: Any = client.fine_tuning.jobs
    dpo = jobs.create(
        model=model,
        training_file=uploaded.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
        seed=7,
        suffix="v1",
        metadata={"team": "a"},
    )
    assert dpo.object == "fine_tuning.job"
    assert dpo.status in ("validating_files", "queued", "running")
    assert (dpo.training_file, dpo.seed, dpo.metadata) == (uploaded.id, 7, {"team": "a"})
    assert dpo.method.dpo.hyperparameters.beta == 0.2
    others = [
        jobs.create(model=model, training_file=uploaded.id, method={"type": "auto"})
        for _ in range(3)
    ]
    assert all(job.method.type == "auto" for job in others)
    selected = jobs.create(
        model=model, training_file=uploaded.id, method={"type": "dpo"},
        extra_body={"selection": "auto", "auto_start": False},
    )  # fmt: skip
    assert selected.method.type == "auto"
    assert jobs.cancel(selected.id).status == "cancelled"
    once = {"Idempotency-Key": "only-once"}
    same = [
        jobs.create(model=model, training_file=uploaded.id, seed=9, extra_headers=once)
        for _ in range(2)
    ]
    assert same[0].id == same[1].id

    made = [dpo.id, *(job.id for job in others), selected.id, same[0].id]
    assert [job.id for job in jobs.list(limit=2)] == made[::-1]
    assert [job.id for job in jobs.list(extra_query={"metadata[team]": "a"})] == [dpo.id]

    end = until(lambda: jobs.retrieve(dpo.id), lambda job: job.status == "succeeded")
    assert end.fine_tuned_model.startswith("ckpt_")
    assert end.error is None
    checkpoints = list(jobs.checkpoints.list(dpo.id))
    assert [one.fine_tuning_job_id for one in checkpoints] == [dpo.id]
    events = list(jobs.list_events(dpo.id, limit=2))
    assert len(events) > 3
    assert {event.object for event in events} == {"fine_tuning.job.event"}
    assert {event.level for event in events} <= {"info", "warn", "error"}
    assert [event.seq for event in events] == list(range(len(events), 0, -1))

    auto = others[0].id
    until(lambda: jobs.retrieve(auto), lambda job: job.status == "queued")
    assert jobs.pause(auto).status == "paused"
    assert jobs.retrieve(auto).status == "paused"
    assert jobs.resume(auto).status == "queued"
    assert jobs.cancel(auto).status == "cancelled"
    check_errors(client, dpo.id, uploaded.id, model)


def check_errors(client: OpenAI, ended: str, file_id: str, model: str) -> None:
    jobs: Any = client.fine_tuning.jobs
    missing = raised(openai.NotFoundError, lambda: jobs.retrieve("ftjob-none"))
    assert (missing.code, missing.type) == ("not_found", "invalid_request_error")
    assert missing.request_id.startswith("req_")
    unusable = raised(
        openai.UnprocessableEntityError,
        lambda: jobs.create(model="no-such-model", training_file=file_id),
    )
    assert (unusable.code, unusable.param) == ("model_not_found", "model")
    began = time.monotonic()
    conflict = raised(openai.ConflictError, lambda: jobs.cancel(ended))
    assert conflict.code == "job_not_cancellable"
    # `x-should-retry: false`: the client does not try again after pauses.
    assert time.monotonic() - began < 5
    unknown = client.with_options(api_key="dk-test-0000000000000000000000")
    refused = raised(openai.AuthenticationError, lambda: unknown.files.list())
    assert refused.code == "invalid_api_key"
    typo = raised(
        openai.UnprocessableEntityError,
        lambda: jobs.create(model=model, training_file=file_id, extra_body={"beat": 1}),
    )
    assert typo.param == "beat"


def raised(kind: type[openai.APIStatusError], call: Callable[[], Any]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def until(read: Callable[[], Any], true: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not true(found := read()):
        assert time.monotonic() < deadline, f"it stays {found.status}: {found.error}"
        time.sleep(0.1)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.write(openai.__version__)
