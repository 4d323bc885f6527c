"""The command `kdpo`: serve, api, worker, migrate, keys, version."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
import uvicorn
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import DBAPIError

from app.deps import DEFAULT_OWNER
from app.embedded import Supervisor, worker_command, worker_commands
from app.keys import Scope, make_key
from app.main import create_app
from app.server import Server
from core.errors import InvalidInput, KdpoError, NotFound, Unavailable
from core.logs import configure_logging
from core.queue import QueueName
from core.settings import Mode, Settings
from models.migrate import upgrade
from models.repositories.owners import OwnerRepository
from models.session import Database, is_table_missing

GRACEFUL_S = 10
# A worker stops its runner within `worker.kill_grace_s`; then it writes down how that ended.
EXIT_MARGIN_S = 10.0
FAILURE = 1
SETTINGS_HINT = "environment variables KDPO_* are the settings"

app = typer.Typer(
    name="kdpo",
    help="Preference alignment that picks its kernel and divergence from your data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of database and artifacts.")
]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Port; 0: any.")]
ModelDirs = Annotated[
    list[Path] | None,
    typer.Option("--model-dir", help="Folder with base models; may be given again."),
]


def main() -> NoReturn:
    """Run the command; errors of the user are one line on stderr and an exit code."""
    try:
        app()
    except KdpoError as error:
        _fail(error.message, error.hint)
    except ValidationError as error:
        first = error.errors()[0]
        name = "KDPO_" + "__".join(str(part).upper() for part in first["loc"])
        # A check over several settings has no place of its own; its message names them.
        where = f"setting {name}" if first["loc"] else "settings"
        _fail(f"{where}: {first['msg'].removeprefix('Value error, ')}", SETTINGS_HINT)
    except SettingsError as error:
        _fail(f"settings: {error}", SETTINGS_HINT)
    except DBAPIError as error:
        hint = "run `kdpo migrate` first" if is_table_missing(error) else None
        _fail(f"the database refused: {error.orig}", hint)
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), None)
    sys.exit(0)


@app.command()
def serve(
    data_dir: DataDir = None,
    host: Host = None,
    port: Port = None,
    model_dir: ModelDirs = None,
) -> None:
    """Run everything on this machine: database file, API, and one worker for each queue."""
    settings = _settings(data_dir=data_dir, host=host, port=port, model_dirs=model_dir)
    if settings.mode is not Mode.EMBEDDED:
        raise InvalidInput(
            f"`kdpo serve` runs mode embedded, KDPO_MODE is {settings.mode.value}",
            hint="run `kdpo migrate`, `kdpo api` and `kdpo worker --queue …` instead",
        )
    with _listener(settings) as listener:
        upgrade(settings.database_url)
        console = Console(highlight=False, soft_wrap=True)
        _announce(console, settings, listener)
        supervisor = Supervisor(worker_commands())
        with _terminable():
            supervisor.start()
            try:
                _run(settings, listener)
            finally:
                supervisor.stop(grace_s=settings.worker.kill_grace_s + EXIT_MARGIN_S)


@app.command()
def api(data_dir: DataDir = None, host: Host = None, port: Port = None) -> None:
    """Run the API only; the database must be migrated, workers run elsewhere."""
    settings = _settings(data_dir=data_dir, host=host, port=port)
    with _listener(settings) as listener, _terminable():
        _run(settings, listener)


@app.command()
def worker(
    queue: Annotated[
        list[QueueName], typer.Option("--queue", help="Which jobs to work on; may be given again.")
    ],
    data_dir: DataDir = None,
) -> None:
    """Run one worker in place of this process."""
    _settings(data_dir=data_dir)
    command = worker_command(*queue, parent_pipe=False)
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


@app.command()
def migrate(data_dir: DataDir = None) -> None:
    """Bring the database to the newest revision."""
    settings = _settings(data_dir=data_dir)
    upgrade(settings.database_url)
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        "the database is at the newest revision"
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(package_version("kdpo"))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "cli",
    owner: Annotated[str, typer.Option("--owner", help="Whose objects it sees.")] = DEFAULT_OWNER,
    scope: Annotated[
        list[Scope] | None, typer.Option("--scope", help="May be given again; default: all.")
    ] = None,
    expires_days: Annotated[float | None, typer.Option("--expires-days", min=0.001)] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it; it is shown only now."""
    settings = _settings(data_dir=data_dir)
    expires = None if expires_days is None else time.time() + expires_days * 86400
    with _database(settings) as database:
        secret = _add_key(
            database, settings, name=name, owner=owner, scopes=scope or list(Scope), expires=expires
        )
    print(secret)


@keys.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List all keys by their first characters."""
    with _database(_settings(data_dir=data_dir)) as database, database.reading() as session:
        rows = OwnerRepository(session).list_keys()
    table = Table("id", "key", "name", "scopes", "last used", "expires", "state", box=None)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for row in rows:
        state = "usable" if row.revoked_at is None else "revoked"
        if state == "usable" and row.expires_at is not None and row.expires_at <= time.time():
            state = "expired"
        scopes = [Scope.ADMIN.value] if Scope.ADMIN in row.scopes else row.scopes
        table.add_row(
            row.id, f"{row.prefix}…", row.name, " ".join(scopes), _when(row.last_used_at),
            _when(row.expires_at), state,
        )  # fmt: skip
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(table)


@keys.command("revoke")
def revoke_key(key_id: str, data_dir: DataDir = None) -> None:
    """Make a key useless at once."""
    with _database(_settings(data_dir=data_dir)) as database, database.transaction() as session:
        if not OwnerRepository(session).revoke_key(key_id):
            raise NotFound(f"no usable key {key_id!r}", hint="`kdpo keys list` shows the ids")
    _say(f"{key_id} is revoked")


def _settings(
    *,
    data_dir: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    model_dirs: list[Path] | None = None,
) -> Settings:
    """Return the settings; options go to the environment first, so that children see them too."""
    overrides = {
        "KDPO_DATA_DIR": None if data_dir is None else str(data_dir.expanduser().absolute()),
        "KDPO_API__HOST": host,
        "KDPO_API__PORT": None if port is None else str(port),
    }
    os.environ.update({name: value for name, value in overrides.items() if value is not None})
    if model_dirs:
        for folder in model_dirs:
            if not folder.is_dir():
                raise InvalidInput(f"--model-dir {folder} is not a folder")
        given = [str(folder.expanduser().absolute()) for folder in model_dirs]
        before = [os.environ["KDPO_MODELS__DIRS"]] if os.environ.get("KDPO_MODELS__DIRS") else []
        os.environ["KDPO_MODELS__DIRS"] = ":".join([*given, *before])
    return Settings()


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    if settings.mode is Mode.EMBEDDED:
        upgrade(settings.database_url)
    database = Database(settings.database_url, pool_size=1)
    try:
        yield database
    finally:
        database.dispose()


def _add_key(
    database: Database,
    settings: Settings,
    *,
    name: str,
    owner: str,
    scopes: list[Scope],
    expires: float | None = None,
) -> str:
    key = make_key(settings.environment)
    with database.transaction() as session:
        owners = OwnerRepository(session)
        owners.add_key(
            owner_id=owners.ensure(owner).id,
            name=name,
            prefix=key.prefix,
            secret_sha256=key.sha256,
            scopes=[scope.value for scope in scopes],
            expires_at=expires,
        )
    return key.secret


def _announce(console: Console, settings: Settings, listener: socket.socket) -> None:
    """Say where the API is, and print the first key if there is none yet."""
    console.print(f"kdpo listens on {_url(settings, listener)}, its data are in {settings.root}")
    if not settings.auth.required:
        return
    with _database(settings) as database:
        with database.reading() as session:
            has_keys = OwnerRepository(session).count_keys() > 0
        if not has_keys:
            secret = _add_key(
                database, settings, name="first key", owner=DEFAULT_OWNER, scopes=list(Scope)
            )
            console.print("first API key, shown only now:")
            print(secret, flush=True)


def _url(settings: Settings, listener: socket.socket) -> str:
    host = settings.api.host
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


@contextmanager
def _listener(settings: Settings) -> Iterator[socket.socket]:
    """Bind before anything starts, so that a taken port is the first thing to be said."""
    host, port = settings.api.host, settings.api.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {host}:{port}: {error.strerror}",
                hint="stop what listens there, or choose another port with --port",
            ) from error
        yield listener


def _run(settings: Settings, listener: socket.socket) -> None:
    configure_logging(settings.log_level)
    api = create_app(settings)
    config = uvicorn.Config(
        api,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_S,
    )
    Server(api, config).run(sockets=[listener])


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack: uvicorn sends it again when it has closed its connections."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0 if number == signal.SIGTERM else 128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _when(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(" ", "minutes")


def _say(message: str) -> None:
    sys.stderr.write(f"kdpo: {message}\n")


def _fail(message: str, hint: str | None) -> NoReturn:
    sys.stderr.write(f"kdpo: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.exit(FAILURE)
