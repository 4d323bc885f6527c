"""What the commands of a server do; this file loads all of it, the client's commands do not."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from sqlalchemy.exc import DBAPIError

from app.deps import DEFAULT_OWNER
from app.embedded import Supervisor, worker_command, worker_commands
from app.keys import Scope, make_key
from app.main import create_app
from app.server import Protocol, Server, keep_freed_memory
from core.errors import InvalidInput, Unavailable
from core.logs import configure_logging
from core.queue import QueueName
from core.settings import Mode, Settings
from models.migrate import upgrade
from models.repositories.owners import OwnerRepository
from models.session import Database, is_table_missing

GRACEFUL_S = 10
# A worker stops its runner within `worker.kill_grace_s`; then it writes down how that ended.
EXIT_MARGIN_S = 10.0
COMMAND_KEY = "one command"
SETTINGS_HINT = "environment variables KDPO_* are the settings"


@dataclass(frozen=True)
class AddedKey:
    """A key that has just been made."""

    id: str
    secret: str


@contextmanager
def told_faults() -> Iterator[None]:
    """Turn what settings and databases raise into errors that say what to do.

    Raises:
        InvalidInput: a setting is wrong.
        Unavailable: the database refuses.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = "KDPO_" + "__".join(str(part).upper() for part in first["loc"])
        # A check over several settings has no place of its own; its message names them.
        where = f"setting {name}" if first["loc"] else "settings"
        said = first["msg"].removeprefix("Value error, ")
        raise InvalidInput(f"{where}: {said}", hint=SETTINGS_HINT) from error
    except SettingsError as error:
        raise InvalidInput(f"settings: {error}", hint=SETTINGS_HINT) from error
    except DBAPIError as error:
        hint = "run `kdpo migrate` first" if is_table_missing(error) else None
        raise Unavailable(f"the database refused: {error.orig}", hint=hint) from error


def serve(settings: Settings, *, workers: bool, parent_pipe: bool) -> None:
    """Run API and workers in one folder; with `parent_pipe`, until standard input ends.

    Raises:
        InvalidInput: the mode is not embedded.
        Unavailable: the port is taken.
    """
    if settings.mode is not Mode.EMBEDDED:
        raise InvalidInput(
            f"`kdpo serve` runs mode embedded, KDPO_MODE is {settings.mode.value}",
            hint="run `kdpo migrate`, `kdpo api` and `kdpo worker --queue …` instead",
        )
    with listening(settings) as listener:
        upgrade(settings.database_url)
        console = Console(highlight=False, soft_wrap=True)
        _announce(console, settings, listener)
        supervisor = Supervisor(worker_commands() if workers else {})
        with _terminable():
            if parent_pipe:
                threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()
            supervisor.start()
            try:
                _run(settings, listener)
            finally:
                supervisor.stop(grace_s=settings.worker.kill_grace_s + EXIT_MARGIN_S)


def api(settings: Settings) -> None:
    """Run the API only.

    Raises:
        Unavailable: the port is taken.
    """
    with listening(settings) as listener, _terminable():
        _run(settings, listener)


def worker(queues: list[QueueName]) -> None:
    """Become a worker."""
    command = worker_command(*queues, parent_pipe=False)
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


def migrate(settings: Settings) -> None:
    """Bring the database to the newest revision."""
    upgrade(settings.database_url)


def settings_of(
    *,
    data_dir: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    model_dirs: list[Path] | None = None,
) -> Settings:
    """Return the settings; options go to the environment first, so that children see them too.

    Raises:
        InvalidInput: a setting is wrong, or a folder is none.
    """
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
    with told_faults():
        return Settings()


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """Open the database for one command; an embedded one is made where it is missing."""
    if settings.mode is Mode.EMBEDDED:
        upgrade(settings.database_url)
    database = Database(settings.database_url, pool_size=1)
    try:
        yield database
    finally:
        database.dispose()


def add_key(
    database: Database,
    settings: Settings,
    *,
    name: str,
    owner: str,
    scopes: list[Scope],
    expires: float | None = None,
    requests_per_minute: int | None = None,
) -> AddedKey:
    """Make a key; its secret is kept nowhere."""
    key = make_key(settings.environment)
    with database.transaction() as session:
        owners = OwnerRepository(session)
        row = owners.add_key(
            owner_id=owners.ensure(owner).id,
            name=name,
            prefix=key.prefix,
            secret_sha256=key.sha256,
            scopes=[scope.value for scope in scopes],
            expires_at=expires,
            requests_per_minute=requests_per_minute,
        )
        return AddedKey(row.id, key.secret)


@dataclass(frozen=True)
class KeyRow:
    """A key as lists show it."""

    id: str
    prefix: str
    name: str
    scopes: list[str]
    last_used_at: float | None
    expires_at: float | None
    requests_per_minute: int | None
    state: str


def key_rows(settings: Settings) -> list[KeyRow]:
    """Return all keys, oldest first; without those that a single command has had."""
    with told_faults(), open_database(settings) as database, database.reading() as session:
        rows = OwnerRepository(session).list_keys()
    return [
        KeyRow(
            row.id, row.prefix, row.name, list(row.scopes), row.last_used_at, row.expires_at,
            row.requests_per_minute, _state(row.revoked_at, row.expires_at),
        )
        for row in rows
        if row.revoked_at is None or row.name != COMMAND_KEY
    ]  # fmt: skip


def revoke(settings: Settings, key_id: str) -> bool:
    """Make a key useless; False when there is no such usable key."""
    with told_faults(), open_database(settings) as database, database.transaction() as session:
        return OwnerRepository(session).revoke_key(key_id)


def _state(revoked_at: float | None, expires_at: float | None) -> str:
    if revoked_at is not None:
        return "revoked"
    return "expired" if expires_at is not None and expires_at <= time.time() else "usable"


def _announce(console: Console, settings: Settings, listener: socket.socket) -> None:
    """Say where the API is, and print the first key if there is none yet."""
    console.print(f"kdpo listens on {_url(settings, listener)}, its data are in {settings.root}")
    sys.stdout.flush()
    if not settings.auth.required:
        return
    with open_database(settings) as database:
        with database.reading() as session:
            has_keys = OwnerRepository(session).count_keys() > 0
        if not has_keys:
            first = add_key(
                database, settings, name="first key", owner=DEFAULT_OWNER, scopes=list(Scope)
            )
            console.print("first API key, shown only now:")
            sys.stdout.write(f"{first.secret}\n")
            sys.stdout.flush()


def _url(settings: Settings, listener: socket.socket) -> str:
    host = settings.api.host
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """Bind before anything starts, so that a taken port is the first thing to be said."""
    host, port = settings.api.host, settings.api.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off for sockets that name TCP; else an answer in two parts
    # waits 40 ms for the client's acknowledgement of the first.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
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
    keep_freed_memory()
    api = create_app(settings)
    config = uvicorn.Config(
        api,
        http=Protocol,
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


def _leave_with_parent() -> None:
    """Stop as by SIGTERM when the command that started this server ends, however it ends."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as words:
        while words.read(1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
