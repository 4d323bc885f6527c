"""The command `kdpo`; what only a server needs is loaded by the commands that run one."""

import platform
import sys
from importlib.metadata import version as package_version
from typing import NoReturn

import typer

from app.commands import evaluate, fetch, jobs, server, work
from app.commands.connect import AsJson
from app.commands.exits import Exit, exit_of_own, leave, leave_with
from app.commands.keys import keys
from app.commands.show import print_json
from core.errors import KdpoError
from kdpo.errors import KdpoClientError

USE, RUN = "Use", "Run a server"

app = typer.Typer(
    name="kdpo",
    help="Preference alignment that picks its kernel and divergence from your data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(rich_help_panel=USE)(work.recommend)
app.command(rich_help_panel=USE)(work.tune)
app.command(rich_help_panel=USE)(evaluate.evaluate)
app.command(rich_help_panel=USE)(jobs.watch)
app.command(rich_help_panel=USE)(fetch.download)
app.add_typer(jobs.jobs, name="jobs", rich_help_panel=USE)
app.command(rich_help_panel=RUN)(server.serve)
app.command(rich_help_panel=RUN)(server.api)
app.command(rich_help_panel=RUN)(server.worker)
app.command(rich_help_panel=RUN)(server.migrate)
app.command(rich_help_panel=RUN)(server.doctor)
app.add_typer(keys, name="keys", rich_help_panel=RUN)


def main() -> NoReturn:
    """Run the command; errors of the user are one line on stderr and an exit code."""
    try:
        app(prog_name="kdpo")
    except KdpoClientError as error:
        leave_with(error)
    except KdpoError as error:
        leave(exit_of_own(error), error.message, error.hint)
    except OSError as error:
        said = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        leave(Exit.FAILED, said)
    sys.exit(Exit.DONE)


@app.command(rich_help_panel=RUN)
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    found = package_version("kdpo")
    if as_json:
        print_json({"version": found, "python": platform.python_version()})
    else:
        typer.echo(found)
