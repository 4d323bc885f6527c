"""Which server a command talks to: one that was named, one on this machine, or one of its own."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import httpx
import typer

from app.commands.exits import Exit, leave
from kdpo.client import Client
from kdpo.errors import UnexpectedAnswer
from kdpo.transport import KEY_VARIABLE, LOOPBACK, URL_VARIABLE

DEFAULT_PORT = "8321"
LOOK_S = 2.0
# A server that was there once may be restarted meanwhile: these tries take half a minute.
PATIENCE = 8

Url = Annotated[
    str | None,
    typer.Option("--url", help=f"Address of the server; default: {URL_VARIABLE}, or this machine."),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help=f"Key; better in {KEY_VARIABLE}, where nobody sees it."),
]
Local = Annotated[
    bool, typer.Option("--local", help="Start a server of its own, whatever runs already.")
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of database and artifacts.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Connection:
    """A client, and whether its server is on this machine and goes when the command ends."""

    client: Client
    on_this_machine: bool
    ends_with_command: bool

    def model(self, name: str) -> str:
        """Return a model's name as the server understands it: a folder here as a whole path."""
        folder = Path(name).expanduser()
        return str(folder.absolute()) if self.on_this_machine and folder.is_dir() else name


@contextmanager
def connected(
    url: str | None,
    api_key: str | None,
    *,
    local: bool = False,
    data_dir: Path | None = None,
    works: bool = False,
    stays: bool = False,
) -> Iterator[Connection]:
    """Connect to the server that is meant.

    A server that was named is used as it is. Otherwise the one on this machine is used, with a key
    that is made for the command when none was given. Where none runs, one is started until the
    command ends: with workers when `works`, and else only to read what is in the data folder. What
    needs a server that `stays` gets none that ends.
    """
    named = url or os.environ.get(URL_VARIABLE)
    key = api_key or os.environ.get(KEY_VARIABLE)
    if named and local:
        leave(
            Exit.USAGE,
            f"--local starts a server and an address was given: {named}",
            f"drop one of the two (the address can come from {URL_VARIABLE})",
        )
    if named:
        _greet(named)
        with Client(named, key, max_retries=PATIENCE) as client:
            is_here = httpx.URL(client.base_url).host in LOOPBACK
            yield Connection(client, is_here, ends_with_command=False)
        return
    default = f"http://127.0.0.1:{os.environ.get('KDPO_API__PORT', DEFAULT_PORT)}"
    runs = not local and _is_kdpo(default)
    with ExitStack() as stack:
        # Only a command without a server of its own and without a key needs what follows, which
        # loads the server's code.
        at = default
        if not (runs and key):
            from app import local as own

            settings = own.local_settings(data_dir)
            if runs:
                key = stack.enter_context(own.temporary_key(settings))
            elif stays:
                _leaves_no_server()
            elif works or own.has_data(settings):
                own.check_can_serve(settings, workers=works)
                key = stack.enter_context(own.temporary_key(settings, first=True))
                at = stack.enter_context(own.server(settings, workers=works))
            else:
                _nobody(default, settings.root)
        client = stack.enter_context(Client(at, key, max_retries=PATIENCE))
        yield Connection(client, on_this_machine=True, ends_with_command=not runs)


def _greet(url: str) -> None:
    """Make sure that a kdpo server is there, without the patience that a running one deserves.

    Raises:
        ConnectionFailed: nobody answers.
        UnexpectedAnswer: somebody else does.
    """
    with Client(url, max_retries=1) as client:
        said = client.request("GET", "/version")
    if not isinstance(said, dict) or said.get("name") != "kdpo":
        raise UnexpectedAnswer(
            f"{url} is no kdpo server: it says {str(said)[:100]}",
            hint=f"set --url or {URL_VARIABLE} to one",
        )


def _is_kdpo(url: str) -> bool:
    """Whether a kdpo server answers there."""
    try:
        answer = httpx.get(f"{url}/version", timeout=LOOK_S, trust_env=False)
        return answer.is_success and answer.json().get("name") == "kdpo"
    except (httpx.HTTPError, ValueError):
        return False


def _leaves_no_server() -> NoReturn:
    leave(
        Exit.USAGE,
        "--no-wait leaves the job to a server, and one of this command's own would end",
        "start one with `kdpo serve`, or wait",
    )


def _nobody(url: str, root: Path) -> NoReturn:
    leave(
        Exit.UNREACHABLE,
        f"no server answers at {url}, and there are no data in {root}",
        f"`kdpo serve` starts one; {URL_VARIABLE} or --url names another, --data-dir a folder",
    )
