"""Looks at what a server needs on this machine: each thing with a verdict and what to do."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from app.queue import CeleryQueue
from core.errors import KdpoError
from core.settings import Mode, Settings
from models.migrate import is_newest
from models.repositories.owners import OwnerRepository
from models.session import Database

GIB = 1024**3
MIN_FREE_BYTES = GIB
GOOD_FREE_BYTES = 20 * GIB
GOOD_MEMORY_BYTES = 4 * GIB
MIN_PYTHON = (3, 11)
PROBE_S = 300.0
WORKER_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
INSTALL_HINT = "pip install 'kdpo[worker]'"
# What an `import torch` that hangs or crashes would do to this process is kept out of it.
_DEVICES = """
import json, torch
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
found = [{"name": card.name, "bytes": card.total_memory} for card in cards]
print(json.dumps({"devices": found, "threads": torch.get_num_threads()}))
"""


class Verdict(StrEnum):
    """How a thing is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine(make_settings: Callable[[], Settings]) -> list[Finding]:
    """Return what was found; settings that are wrong are the last finding."""
    found = [_python(), *_packages(), _devices(), _memory()]
    try:
        settings = make_settings()
    except KdpoError as error:
        return [*found, Finding("settings", Verdict.FAIL, error.message, error.hint or "")]
    return [
        *found,
        Finding("settings", Verdict.OK, f"mode {settings.mode.value}"),
        _folder(settings),
        _disk(settings),
        *_database(settings),
        _broker(settings),
        _models(settings),
        _port(settings),
    ]


def _python() -> Finding:
    said = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return Finding("python", Verdict.FAIL, said, "install Python 3.11 or newer")
    return Finding("python", Verdict.OK, said)


def _packages() -> Iterator[Finding]:
    for name in WORKER_PACKAGES:
        try:
            yield Finding(name, Verdict.OK, version(name))
        except PackageNotFoundError:
            advice = f"for workers: {INSTALL_HINT}; API and client go without"
            yield Finding(name, Verdict.WARN, "is not installed", advice)


def _devices() -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _DEVICES],
            capture_output=True, text=True, timeout=PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        said = f"torch has not answered within {PROBE_S:.0f} s"
        return Finding("devices", Verdict.FAIL, said, "is a GPU driver stuck? see `nvidia-smi`")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Finding("devices", Verdict.WARN, last, f"for workers: {INSTALL_HINT}")
    answer = json.loads(done.stdout)
    if not answer["devices"]:
        said = f"no GPU; the CPU with {answer['threads']} threads"
        advice = "fine for small models; for others a torch with CUDA and a driver"
        return Finding("devices", Verdict.WARN, said, advice)
    said = ", ".join(f"{d['name']} {d['bytes'] / GIB:.0f} GiB" for d in answer["devices"])
    return Finding("devices", Verdict.OK, said)


def _memory() -> Finding:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size < GOOD_MEMORY_BYTES:
        advice = "a model and its optimizer may not fit; choose a small one"
        return Finding("memory", Verdict.WARN, f"{size / GIB:.1f} GiB", advice)
    return Finding("memory", Verdict.OK, f"{size / GIB:.1f} GiB")


def _folder(settings: Settings) -> Finding:
    place = _existing(settings.root)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding("data folder", Verdict.OK, f"{settings.root} can be written")
    except OSError as error:
        said = f"{place}: {error.strerror}"
        advice = "give this user the right to write there, or set KDPO_DATA_DIR"
        return Finding("data folder", Verdict.FAIL, said, advice)


def _disk(settings: Settings) -> Finding:
    free = shutil.disk_usage(_existing(settings.root)).free
    said = f"{free / GIB:.1f} GiB free"
    advice = "free some, or set KDPO_DATA_DIR to another disk; jobs pause when it is full"
    if free < MIN_FREE_BYTES:
        return Finding("disk", Verdict.FAIL, said, advice)
    if free < GOOD_FREE_BYTES:
        return Finding("disk", Verdict.WARN, said, advice)
    return Finding("disk", Verdict.OK, said)


def _database(settings: Settings) -> Iterator[Finding]:
    shown = make_url(settings.database_url).render_as_string(hide_password=True)
    embedded = settings.mode is Mode.EMBEDDED
    if embedded and settings.db.url is None and not (settings.root / "kdpo.db").exists():
        yield Finding("database", Verdict.OK, "none yet; `kdpo serve` makes it")
        return
    try:
        newest = is_newest(settings.database_url)
        yield Finding(
            "database",
            Verdict.OK if newest or embedded else Verdict.FAIL,
            f"{shown} answers{'' if newest else ', at an older revision'}",
            "" if newest else "kdpo migrate (`kdpo serve` does it by itself)",
        )
        if newest and settings.auth.required:
            yield _keys(settings)
    except (SQLAlchemyError, KdpoError, OSError) as error:
        said = str(getattr(error, "orig", error)).strip().splitlines()
        advice = "is it running, and is KDPO_DB__URL right?"
        yield Finding("database", Verdict.FAIL, f"{shown}: {said[0] if said else error!r}", advice)


def _keys(settings: Settings) -> Finding:
    database = Database(settings.database_url, pool_size=1)
    try:
        with database.reading() as session:
            count = OwnerRepository(session).count_keys()
    finally:
        database.dispose()
    if count == 0:
        return Finding("API keys", Verdict.WARN, "none", "kdpo keys create")
    return Finding("API keys", Verdict.OK, f"{count} usable")


def _broker(settings: Settings) -> Finding:
    if settings.broker.url is None:
        return Finding("broker", Verdict.OK, f"files in {settings.broker_dir}")
    queue = CeleryQueue(settings)
    try:
        queue.check()
    except KdpoError as error:
        advice = error.hint or "is it running, and is KDPO_BROKER__URL right?"
        return Finding("broker", Verdict.FAIL, error.message, advice)
    finally:
        queue.close()
    return Finding("broker", Verdict.OK, "answers")


def _models(settings: Settings) -> Finding:
    names = sorted(
        path.parent.name
        for folder in settings.model_dirs
        if folder.is_dir()
        for path in folder.glob("*/config.json")
    )
    ways = ["hub ids"] if settings.models.hub_enabled else []
    ways += ["paths on this machine"] if settings.local_paths_allowed else []
    said = f"{len(names)} by name{': ' if names else ''}{', '.join(names[:5])}"
    if ways:
        return Finding("models", Verdict.OK, f"{said}; {' and '.join(ways)} as well")
    if names:
        return Finding("models", Verdict.OK, said)
    advice = "set KDPO_MODELS__DIRS, or allow the hub: KDPO_MODELS__HUB_ENABLED=true"
    return Finding("models", Verdict.FAIL, "no model can be named", advice)


def _port(settings: Settings) -> Finding:
    host, port = settings.api.host, settings.api.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return _taken(f"{host}:{port}", error)
    return Finding("port", Verdict.OK, f"{host}:{port} is free")


def _taken(place: str, error: OSError) -> Finding:
    try:
        answer = httpx.get(f"http://{place}/version", timeout=5, trust_env=False).json()
        if answer.get("name") == "kdpo":
            return Finding("port", Verdict.OK, f"kdpo {answer['version']} listens on {place}")
    except (httpx.HTTPError, ValueError):
        pass
    said = f"{place}: {error.strerror}"
    return Finding("port", Verdict.FAIL, said, "stop what listens there, or set KDPO_API__PORT")


def _existing(path: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
