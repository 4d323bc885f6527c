"""`kdpo jobs …` and `kdpo watch`: what runs, what happened to it, and how to steer it."""

import json
from typing import Annotated, Literal

import typer

from app.commands.connect import ApiKey, AsJson, DataDir, Local, Url, connected
from app.commands.show import err, job_bar, out, print_json, show_outcome, table, when
from kdpo.client import Client
from kdpo.types import Event, Job
from kdpo.watching import verdict

jobs = typer.Typer(help="List, look at and steer jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="The id of a job, e.g. ftjob-… or rec_….")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")]


@jobs.command("list")
def list_jobs(
    kind: Annotated[
        str | None, typer.Option("--kind", help="E.g. training, evaluation, export.")
    ] = None,
    status: Annotated[str | None, typer.Option("--status", help="E.g. running.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """List jobs, newest first."""
    with connected(url, api_key, data_dir=data_dir) as here:
        found = list(here.client.jobs.list(kind=kind, status=status, limit=limit))
    if as_json:
        print_json(found)
        return
    rows = [
        (job.id, job.kind, job.status, _progress(job), job.model, when(job.created_at))
        for job in found
    ]
    out().print(table("id", "kind", "status", "progress", "model", "created", rows=rows))


@jobs.command("get")
def get_job(
    job: JobId,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Show one job."""
    with connected(url, api_key, data_dir=data_dir) as here:
        found = here.client.jobs.get(job)
    _show(found, as_json=as_json)


@jobs.command("events")
def list_events(
    job: JobId,
    limit: Limit = 100,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Show what has happened to a job, the last events, oldest first."""
    with connected(url, api_key, data_dir=data_dir) as here:
        found = list(here.client.jobs.events(job, order="desc", limit=limit))[::-1]
    if as_json:
        print_json(found)
        return
    rows = [(e.seq, when(e.created_at), e.type, e.message) for e in found]
    out().print(table("seq", "at", "type", "message", rows=rows))


def _steering(verb: Literal["cancel", "pause", "resume", "retry"], help_text: str) -> None:
    """Add a command that changes a job's state."""

    def steer(
        job: JobId,
        as_json: AsJson = False,
        url: Url = None,
        api_key: ApiKey = None,
        data_dir: DataDir = None,
    ) -> None:
        with connected(url, api_key, data_dir=data_dir) as here:
            found = _steered(here.client, verb, job)
        if as_json:
            print_json(found)
        else:
            out().print(f"{found.id} is {found.status}")

    jobs.command(verb, help=help_text)(steer)


def _steered(client: Client, verb: Literal["cancel", "pause", "resume", "retry"], job: str) -> Job:
    match verb:
        case "cancel":
            return client.jobs.cancel(job)
        case "pause":
            return client.jobs.pause(job)
        case "resume":
            return client.jobs.resume(job)
        case "retry":
            return client.jobs.retry(job)


_steering("cancel", "Cancel a job: at once when it waits, at its next step when it runs.")
_steering("pause", "Pause a job; it keeps what it has done.")
_steering("resume", "Let a paused job go on where it was.")
_steering("retry", "Try a failed job again, from the last step that it finished.")


def watch(
    job: JobId,
    after: Annotated[
        int | None, typer.Option("--after", min=0, help="Tell events behind this number first.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.001, help="Stop after so many seconds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    local: Local = False,
    data_dir: DataDir = None,
) -> None:
    """Follow a job to its end; the exit code says how it ended.

    Without a server on this machine one is started, and an unfinished job goes on.
    """
    with (
        connected(url, api_key, local=local, data_dir=data_dir, works=True) as here,
        job_bar(job) as bar,
    ):
        last: Job | None = None
        for update in here.client.watch(job, after=after, timeout_s=timeout):
            last = update.job
            if as_json:
                print_json(update, one_line=True)
                continue
            if update.event is not None:
                _say(update.event)
            bar.told(update.job)
    if last is None:
        return
    verdict(last)
    if not as_json:
        show_outcome(last)
        out().print(f"{last.id} has {last.status}")


def _say(event: Event) -> None:
    style = "red" if event.level == "error" else None
    err().print(f"{event.seq:>5} {event.type:<24} {event.message}", style=style)


def _show(job: Job, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    rows: list[tuple[str, object]] = [
        ("id", job.id), ("kind", job.kind), ("status", job.status), ("phase", job.phase),
        ("progress", _progress(job)), ("attempt", job.attempt),
        ("attention", ", ".join(job.attention)), ("model", job.model), ("dataset", job.dataset_id),
        ("created", when(job.created_at)), ("started", when(job.started_at)),
        ("finished", when(job.finished_at)),
        ("steps", ", ".join(f"{step.name} {step.status}" for step in job.steps)),
        ("checkpoint", job.checkpoint_id), ("metadata", json.dumps(job.metadata)),
    ]  # fmt: skip
    if job.error is not None:
        rows += [("error", f"{job.error.message} ({job.error.code})"), ("hint", job.error.hint)]
    shown = [(name, value) for name, value in rows if value not in (None, "", "{}")]
    out().print(table("", "", rows=shown))


def _progress(job: Job) -> str:
    if job.progress is None or job.ended:
        return ""
    eta = "" if job.progress.eta_seconds is None else f", {job.progress.eta_seconds:.0f} s left"
    return f"{job.progress.fraction:.0%}{eta}"
