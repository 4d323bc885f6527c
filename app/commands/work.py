"""`kdpo recommend` and `kdpo tune`: what people come for."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands.connect import ApiKey, AsJson, Connection, DataDir, Local, Url, connected
from app.commands.exits import Exit, leave
from app.commands.fetch import bring
from app.commands.show import (
    err,
    job_bar,
    out,
    print_json,
    show_outcome,
    show_recommendation,
)
from kdpo.types import Job
from kdpo.workflows import as_file

Data = Annotated[str, typer.Argument(help="A file with preference pairs, or a dataset (ds_…).")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Base model: a folder, or a name the server knows.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed repeats the run.")]
PolicyText = Annotated[
    str | None,
    typer.Option("--policy", help="How rows become pairs, as JSON (docs/datasets.md)."),
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0.001, help="Stop waiting after so many seconds.")
]


def recommend(
    data: Data,
    model: Model,
    seed: Seed = 0,
    policy: PolicyText = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Rows of the table.")] = 10,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    local: Local = False,
    data_dir: DataDir = None,
) -> None:
    """Say which kernel and divergence fit your data under a model, and why.

    Without a server on this machine one is started for the time of the command.
    """
    read_policy = _policy(policy)
    as_file(data)
    with connected(url, api_key, local=local, data_dir=data_dir, works=True) as here:
        _say_own(here)
        with job_bar("recommendation") as bar:
            found = here.client.recommend(
                data,
                model=here.model(model),
                seed=seed,
                policy=read_policy,
                timeout_s=timeout,
                on_progress=bar.told,
                on_upload=bar.uploaded,
            )
    if as_json:
        print_json(found)
        return
    show_recommendation(found, top=top)
    out().print(
        f"\nrecommendation {found.id}, dataset {found.dataset_id}; to prove and train it:\n"
        f"  kdpo tune {found.dataset_id} --model {model}",
        soft_wrap=True,
    )


def tune(
    data: Data,
    model: Model,
    method: Annotated[str, typer.Option("--method", help="auto, kernel_dpo or dpo.")] = "auto",
    kernel: Annotated[str | None, typer.Option("--kernel", help="Of kernel_dpo.")] = None,
    divergence: Annotated[str | None, typer.Option("--divergence", help="Of kernel_dpo.")] = None,
    max_trials: Annotated[
        int | None, typer.Option("--max-trials", min=2, help="Of the search of auto.")
    ] = None,
    gpu_seconds: Annotated[
        float | None, typer.Option("--gpu-seconds", min=0.001, help="Of the search of auto.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyperparameter, e.g. --set n_epochs=2; may be given again."),
    ] = None,
    seed: Seed = 0,
    suffix: Annotated[str | None, typer.Option("--suffix", help="Part of the name.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Download the checkpoint to this folder.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for its end.")] = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    local: Local = False,
    data_dir: DataDir = None,
) -> None:
    """Fine-tune a model: search, train the winner and plain DPO, compare them.

    Without a server on this machine one is started for the time of the command; a job that it
    leaves goes on with `kdpo watch`.
    """
    if output is not None and not wait:
        leave(Exit.USAGE, "--output downloads when the job has ended, and --no-wait leaves before")
    hyperparameters = _settings(setting or [])
    limits = {"max_trials": max_trials, "gpu_seconds": gpu_seconds}
    search = {name: value for name, value in limits.items() if value is not None}
    as_file(data)
    with ExitStack() as stack:
        here = stack.enter_context(
            connected(url, api_key, local=local, data_dir=data_dir, works=True, stays=not wait)
        )
        _say_own(here)
        bar = stack.enter_context(job_bar("fine-tuning"))
        job = here.client.fine_tune(
            data,
            model=here.model(model),
            method=method,
            kernel=kernel,
            divergence=divergence,
            search=search or None,
            seed=seed,
            suffix=suffix,
            on_upload=bar.uploaded,
            **hyperparameters,
        )
        if wait:
            err().print(f"job {job.id}", style="dim")
            try:
                job = here.client.wait(job, timeout_s=timeout, on_progress=bar.told)
            except KeyboardInterrupt:
                err().print(f"the job goes on without you; follow it: kdpo watch {job.id}")
                raise
        if output is not None:
            bring(here.client, job, output)
    _tell(job, output, as_json=as_json)


def _tell(job: Job, output: Path | None, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    if not job.ended:
        out().print(f"job {job.id} is {job.status}; follow it with: kdpo watch {job.id}")
        return
    show_outcome(job)
    place = f"it lies in {output}" if output else f"kdpo download {job.checkpoint_id} FOLDER"
    out().print(f"job {job.id}, checkpoint {job.checkpoint_id}; {place}", soft_wrap=True)


def _say_own(here: Connection) -> None:
    if here.ends_with_command:
        err().print("no server was named and none runs here: started one for this command")


def _policy(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        policy = json.loads(text)
    except ValueError as error:
        leave(Exit.USAGE, f"--policy is not JSON: {error}", """e.g. '{"on_invalid": "fail"}'""")
    if not isinstance(policy, dict):
        leave(Exit.USAGE, "--policy is not an object", """e.g. '{"on_invalid": "fail"}'""")
    return policy


def _settings(texts: list[str]) -> dict[str, Any]:
    """Return `name=value` texts as hyperparameters; what is no JSON is a word."""
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier() or name in found:
            leave(Exit.USAGE, f"--set {text!r}: expected NAME=VALUE, each name once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
