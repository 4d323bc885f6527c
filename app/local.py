"""A server for the time of one command, and a key for it: what is in the data folder is enough."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx

from app.deps import DEFAULT_OWNER
from app.keys import Scope
from app.serving import COMMAND_KEY, EXIT_MARGIN_S, add_key, open_database, settings_of
from core.errors import InvalidInput, Unavailable
from core.settings import Mode, Settings
from models.repositories.owners import OwnerRepository

KEY_LIVES_S = 30 * 86_400.0
START_S = 120.0
POLL_S = 0.1
LOG_NAME = "local-server.log"
_URL = re.compile(rb"kdpo listens on (http://\S+),")


def local_settings(data_dir: Path | None) -> Settings:
    """Return the settings of this machine's server."""
    return settings_of(data_dir=data_dir)


def has_data(settings: Settings) -> bool:
    """Whether the data folder has the database of an embedded server."""
    return settings.mode is Mode.EMBEDDED and (settings.root / "kdpo.db").is_file()


@contextmanager
def temporary_key(settings: Settings, *, first: bool = False) -> Iterator[str | None]:
    """Make a key for one command; it is revoked at its end.

    Whoever may write the database may make keys, so this gives nobody a new right. There is none
    where keys are not asked for, or where the database is not at hand; `first` makes one.
    """
    at_hand = first or settings.mode is Mode.FULL or has_data(settings)
    if not settings.auth.required or not at_hand:
        yield None
        return
    with open_database(settings) as database:
        key = add_key(
            database,
            settings,
            name=COMMAND_KEY,
            owner=DEFAULT_OWNER,
            scopes=[Scope.ADMIN],
            expires=time.time() + KEY_LIVES_S,
        )
    try:
        yield key.secret
    finally:
        with open_database(settings) as database, database.transaction() as session:
            OwnerRepository(session).revoke_key(key.id)


@contextmanager
def server(settings: Settings, *, workers: bool) -> Iterator[str]:
    """Run `kdpo serve` on a free port and yield its address; it ends with this process.

    Make a key first: a server that finds none prints one to its log.

    Raises:
        Unavailable: the server did not start.
    """
    log = settings.root / LOG_NAME
    # -P: the folder that kdpo is called from must not be searched for modules.
    command = [
        *(sys.executable, "-P", "-m", "app", "serve", "--port", "0", "--host", "127.0.0.1"),
        *("--data-dir", str(settings.root), "--parent-pipe"),
        *([] if workers else ["--no-workers"]),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        yield _ready(process, log, workers=workers)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(settings.worker.kill_grace_s + 2 * EXIT_MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def check_can_serve(settings: Settings, *, workers: bool) -> None:
    """Make sure that this installation can run a server of its own.

    Raises:
        InvalidInput: it has no workers, or the mode is not embedded.
    """
    if settings.mode is not Mode.EMBEDDED:
        raise InvalidInput(
            f"no server answers, and one of its own runs mode embedded: KDPO_MODE is "
            f"{settings.mode.value}",
            hint="start the server (`kdpo api`, `kdpo worker`), or name one with --url",
        )
    if workers and find_spec("torch") is None:
        raise InvalidInput(
            "no server answers, and this installation has no torch to be one",
            hint="pip install 'kdpo[worker]', or name a server with --url",
        )


def _ready(process: subprocess.Popen[bytes], log: Path, *, workers: bool) -> str:
    """Wait until the server answers, and its workers are there."""
    deadline = time.monotonic() + START_S
    path = "/readyz" if workers else "/healthz"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Unavailable(
                f"the local server ended at once: {_last_line(log)}", hint=f"see {log}"
            )
        found = _URL.search(log.read_bytes())
        if found is not None and _answers(url := found.group(1).decode(), path):
            return url
        time.sleep(POLL_S)
    raise Unavailable(f"the local server was not ready within {START_S:.0f} s", hint=f"see {log}")


def _answers(url: str, path: str) -> bool:
    try:
        return httpx.get(f"{url}{path}", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"
