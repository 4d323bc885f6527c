"""The packages keep their arrows, load cheaply, and say the same about tasks and errors."""

import importlib
import inspect
import json
import os
import site
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from core.errors import KdpoError
from core.queue import QUEUE_OF_KIND, QueueName, TaskName
from core.settings import Settings
from kdpo.errors import KdpoClientError
from tests.architecture.house_rules import PACKAGES, PRODUCT, module_name, read_sources

ROOT = Path(__file__).parents[2]
MODULES = [
    module_name(source.path)
    for source in read_sources(ROOT, PACKAGES)
    # Alembic runs env.py and the revisions; they are not modules that anybody imports.
    if not source.path.startswith(("migrations/env", "migrations/versions/"))
]
MAX_BLOB_BYTES = 6 * 1024 * 1024


def run_python(code: str, cwd: Path) -> str:
    """Run `code` with nothing in the environment but PATH, in an empty folder."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrows_between_packages_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Every event that CPython's audit hooks report for input or output; imports read code, so
# opening .py and .pyc files and listing folders are left out.
_NO_IO = """
import json, sys
done = []
def hook(event, args):
    if event == "open":
        path, mode = str(args[0]), args[1]
        if mode is not None and set(str(mode)) & set("wax+"):
            done.append(f"{event} {path} {mode}")
    elif event.split(".")[0] in ("socket", "sqlite3", "subprocess") and event not in (
        "socket.gethostname",
    ):
        done.append(f"{event} {args!r}")
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.putenv", "os.fork", "os.system"):
        done.append(f"{event} {args!r}")
sys.dont_write_bytecode = True
sys.addaudithook(hook)
import app.main, worker.celery_app
print(json.dumps({"done": done, "modules": sorted(sys.modules)}))
"""


def test_entry_points_import_without_environment_and_without_io(tmp_path: Path) -> None:
    answer = json.loads(run_python(_NO_IO, tmp_path))
    assert answer["done"] == []
    assert list(tmp_path.iterdir()) == []
    heavy = {"torch", "transformers", "peft", "optuna"} & set(answer["modules"])
    assert not heavy, f"app.main and worker.celery_app load {sorted(heavy)}"


def test_audit_sees_io(tmp_path: Path) -> None:
    planted = _NO_IO.replace(
        "import app.main, worker.celery_app", "open('x', 'w').close(); import _socket; "
        "import socket; socket.socket().close()"
    )  # fmt: skip
    done = json.loads(run_python(planted, tmp_path))["done"]
    assert [event.split()[0] for event in done] == ["open", "socket.__new__"]


@pytest.mark.parametrize("entry", ["app.main", "app.cli", "worker.main", "worker.supervisor"])
def test_processes_that_stay_up_never_load_torch(entry: str, tmp_path: Path) -> None:
    code = f"import json, sys, {entry}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code, tmp_path)))
    assert not {"torch", "transformers", "peft", "optuna", "numpy"} & loaded


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_every_package_is_installed() -> None:
    """A package that pyproject.toml does not list works in a clone and is missing in an image."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    found = {
        file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
    }
    assert found == listed


@pytest.mark.parametrize(
    ("packages", "root"),
    [(frozenset(PRODUCT) - {"kdpo"}, KdpoError), (frozenset({"kdpo"}), KdpoClientError)],
    ids=["product", "client"],
)
def test_every_error_has_the_same_root(packages: frozenset[str], root: type[Exception]) -> None:
    strangers = [
        f"{name}.{error.__qualname__}"
        for name in MODULES
        if name.partition(".")[0] in packages
        for error in vars(importlib.import_module(name)).values()
        if inspect.isclass(error)
        and issubclass(error, BaseException)
        and error.__module__ == name
        and not issubclass(error, root)
    ]
    assert not strangers, f"derive these from {root.__module__}.{root.__name__}: {strangers}"


def test_every_task_name_has_a_task(tmp_path: Path) -> None:
    from worker.celery_app import make_celery

    make_celery(Settings(data_dir=tmp_path))  # another app of the process shares no task with it
    celery = make_celery(Settings(data_dir=tmp_path))
    celery.loader.import_default_modules()
    ours = {name for name in celery.tasks if not name.startswith("celery.")}
    assert ours == {task.value for task in TaskName}


def test_every_kind_of_job_has_a_queue_that_workers_read() -> None:
    assert set(QUEUE_OF_KIND.values()) == set(QueueName)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_shadows_a_library(package: str) -> None:
    assert package not in sys.stdlib_module_names
    assert PathFinder.find_spec(package, site.getsitepackages()) is None


def test_no_large_file_in_git() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git clone")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert files
    large = [
        f"{file.relative_to(ROOT)}: {file.stat().st_size}"
        for file in files
        if file.exists() and file.stat().st_size > MAX_BLOB_BYTES
    ]
    assert not large, f"files over {MAX_BLOB_BYTES} bytes belong to a data folder: {large}"
