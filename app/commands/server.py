"""`kdpo serve`, `api`, `worker`, `migrate` and `doctor`: this machine as a server."""

from pathlib import Path
from typing import Annotated

import typer

from app.commands.connect import AsJson, DataDir
from app.commands.exits import Exit
from app.commands.show import err, out, print_json, table
from core.queue import QueueName

# Where they are used, what loads the server's code is imported: help and completion need it not.
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Port; 0: any.")]
ModelDirs = Annotated[
    list[Path] | None,
    typer.Option("--model-dir", help="Folder with base models; may be given again."),
]


def serve(
    data_dir: DataDir = None,
    host: Host = None,
    port: Port = None,
    model_dir: ModelDirs = None,
    workers: Annotated[bool, typer.Option("--workers/--no-workers", hidden=True)] = True,
    parent_pipe: Annotated[bool, typer.Option("--parent-pipe", hidden=True)] = False,
) -> None:
    """Run everything on this machine: database file, API, and one worker for each queue."""
    from app import serving

    settings = serving.settings_of(data_dir=data_dir, host=host, port=port, model_dirs=model_dir)
    with serving.told_faults():
        serving.serve(settings, workers=workers, parent_pipe=parent_pipe)


def api(data_dir: DataDir = None, host: Host = None, port: Port = None) -> None:
    """Run the API only; the database must be migrated, workers run elsewhere."""
    from app import serving

    settings = serving.settings_of(data_dir=data_dir, host=host, port=port)
    with serving.told_faults():
        serving.api(settings)


def worker(
    queue: Annotated[
        list[QueueName], typer.Option("--queue", help="Which jobs to work on; may be given again.")
    ],
    data_dir: DataDir = None,
) -> None:
    """Run one worker in place of this process."""
    from app import serving

    serving.settings_of(data_dir=data_dir)
    serving.worker(queue)


def migrate(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Bring the database to the newest revision."""
    from app import serving

    settings = serving.settings_of(data_dir=data_dir)
    with serving.told_faults():
        serving.migrate(settings)
    if as_json:
        print_json({"status": "newest"})
    else:
        err().print("the database is at the newest revision")


def doctor(
    as_json: AsJson = False,
    data_dir: DataDir = None,
    model_dir: ModelDirs = None,
) -> None:
    """Look at everything that a server needs here, and say what to do about what is missing."""
    from app import doctor as checks
    from app import serving

    findings = checks.examine(lambda: serving.settings_of(data_dir=data_dir, model_dirs=model_dir))
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        rows = [
            (finding.verdict.value, finding.name, finding.found, finding.advice)
            for finding in findings
        ]
        out().print(table("", "what", "found", "what to do", rows=rows))
    if any(finding.verdict is checks.Verdict.FAIL for finding in findings):
        raise typer.Exit(Exit.FAILED)
