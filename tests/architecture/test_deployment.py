"""Images, the compose file and the Makefile say what the documents promise."""

import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core.queue import QueueName
from core.settings import Mode, Settings
from deploy.worker_health import is_healthy
from models.repositories.workers import WorkerRepository
from models.session import Database
from tests.architecture.house_rules import PACKAGES

ROOT = Path(__file__).parents[2]
OURS = ("migrate", "api", "worker-gpu", "worker-cpu", "worker-all")
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<word>[^}]*))?\}")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


def substitute(text: str, values: dict[str, str]) -> str:
    """Compose's `${NAME}`, `${NAME:-default}` and `${NAME:?message}`."""

    def one(match: re.Match[str]) -> str:
        value = values.get(match["name"], "")
        if value or match["kind"] is None:
            return value
        if match["kind"] == "?":
            raise KeyError(match["word"])
        return match["word"]

    return _VARIABLE.sub(one, text)


def stages() -> dict[str, list[str]]:
    """Instructions of each build stage, its own and those it inherits."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("FROM "):
            _, parent, _, name = line.split()
            found[name] = [line, *found.get(parent, [])]
        else:
            found[name].append(line)
    return found


# ------------------------------------------------------------------ images


def test_base_image_is_named_by_a_tag() -> None:
    bases = {line.split()[1] for lines in stages().values() for line in lines if "FROM " in line}
    outside = bases - set(stages())
    assert outside == {"python:3.11-slim-bookworm"}


@pytest.mark.parametrize("target", ["api", "worker"])
def test_image_is_not_root_and_is_watched(target: str) -> None:
    lines = stages()[target]
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER kdpo"]
    assert sum(line.startswith("HEALTHCHECK ") for line in lines) == 1
    assert 'ENTRYPOINT ["kdpo"]' in lines


def test_api_image_has_no_torch_and_proves_it() -> None:
    lines = stages()["api"]
    assert not any("worker" in line for line in lines)
    assert any('python -c "import torch"' in line and "exit 1" in line for line in lines)
    assert any('python -c "import app.main, app.study_tool"' in line for line in lines)


@pytest.mark.parametrize("stage", ["api-build", "worker-build"])
def test_dependencies_come_before_the_source(stage: str) -> None:
    lines = stages()[stage]
    source = lines.index("COPY . .")
    installs = [i for i, line in enumerate(lines) if "pip install" in line and " -r " in line]
    assert installs
    assert max(installs) < source
    assert "--no-deps ." in lines[source + 1]


def test_build_context_is_an_allow_list() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    needed = {*PACKAGES, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert allowed == needed | {"deploy/worker_health.py"}


# ------------------------------------------------------------------ compose


def test_secrets_are_required(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD"):
        uses = [m for m in _VARIABLE.finditer(text) if m["name"] == name]
        assert uses
        assert all(m["kind"] == "?" and ".env.example" in m["word"] for m in uses)
        assert f"\n{name}=\n" in (ROOT / ".env.example").read_text()
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        substitute(compose["services"]["api"]["environment"]["KDPO_DB__URL"], {})


def test_only_the_api_is_published_and_only_on_loopback(compose: dict[str, Any]) -> None:
    ports = {name: s.get("ports", []) for name, s in compose["services"].items()}
    assert [name for name, published in ports.items() if published] == ["api"]
    assert substitute(ports["api"][0], {}) == "127.0.0.1:8321:8321"
    for name in ("postgres", "redis"):
        assert compose["services"][name]["networks"] == ["backend"]
    assert compose["networks"]["backend"]["internal"] is True


def test_everything_waits_for_the_migration(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name in ("api", "worker-gpu", "worker-cpu", "worker-all"):
        waits = services[name]["depends_on"]
        assert waits["migrate"]["condition"] == "service_completed_successfully"
        assert waits["redis"]["condition"] == "service_healthy"
    assert services["migrate"]["restart"] == "no"
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for name in ("postgres", "redis"):
        assert services[name]["healthcheck"]["test"]


def test_broker_keeps_what_it_acknowledged(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "--requirepass ${REDIS_PASSWORD:?" in command


def test_services_build_the_right_target_and_read_the_right_queue(compose: dict[str, Any]) -> None:
    services = compose["services"]
    targets = {name: services[name]["build"]["target"] for name in OURS}
    assert targets == {
        "migrate": "api",
        "api": "api",
        "worker-gpu": "worker",
        "worker-cpu": "worker",
        "worker-all": "worker",
    }
    queues = {services[f"worker-{queue.value}"]["command"][-1] for queue in QueueName}
    assert queues == {queue.value for queue in QueueName}
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    assert "deploy" not in services["worker-cpu"]


def test_every_queue_is_served_without_a_gpu(compose: dict[str, Any]) -> None:
    service = compose["services"]["worker-all"]
    assert service["profiles"] == ["cpu-only"]
    assert "deploy" not in service
    command, *arguments = service["command"]
    assert command == "worker"
    assert arguments == [word for queue in QueueName for word in ("--queue", queue.value)]
    text = (ROOT / "docker-compose.yml").read_text()
    for line in text.splitlines():
        assert "--scale worker-gpu=0" not in line or "--profile cpu-only" in line


def test_data_is_shared_and_kept(compose: dict[str, Any]) -> None:
    for name in OURS:
        assert compose["services"][name]["volumes"] == ["data:/data"]
    assert set(compose["volumes"]) == {"data", "postgres", "redis"}


# What a user might give to variables that compose hands on; patterns to all others.
PASSED_ON = {
    "KDPO_SOURCES__SECRETS": '{"team": "hf_x"}',
    "KDPO_SOURCES__HTTPS_HOSTS": "data.example.org,files.corp=10.2.0.0/16",
}


def test_compose_environment_makes_valid_settings(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"POSTGRES_PASSWORD": "abc", "REDIS_PASSWORD": "def"}
    for name, value in compose["services"]["api"]["environment"].items():
        passed_on = PASSED_ON.get(name, "x/*")
        monkeypatch.setenv(name, substitute(value, given) if value is not None else passed_on)
    settings = Settings()
    assert settings.mode is Mode.FULL
    assert settings.database_url == "postgresql+psycopg://kdpo:abc@postgres:5432/kdpo"
    assert settings.broker_url == "redis://:def@redis:6379/0"
    assert settings.models.hub_allow == ("x/*",)
    grace_s = int(compose["services"]["worker-gpu"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.worker.kill_grace_s


def test_worker_health_follows_the_worker_row(sqlite_url: str, tmp_path: Path) -> None:
    settings = Settings.model_validate({"data_dir": tmp_path, "db": {"url": sqlite_url}})
    assert not is_healthy(settings, "here")
    database = Database(sqlite_url)
    try:
        with database.transaction() as session:
            WorkerRepository(session).beat(
                "w1", host="here", pid=1, version="0", queues=[QueueName.CPU], draining=False
            )
    finally:
        database.dispose()
    assert is_healthy(settings, "here")
    assert not is_healthy(settings, "elsewhere")


# ------------------------------------------------------------------ installation


def test_every_dependency_is_pinned_inside_its_range() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement}: pinned to {pin}"


def test_data_files_of_packages_are_installed() -> None:
    """A template that is not package data works in a clone and is missing in an image."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, globs in patterns.items()
        for pattern in globs
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    present = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    assert present <= installed, f"not in package-data: {sorted(map(str, present - installed))}"


def test_every_make_target_has_a_help_line() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", text, re.M)[0].split())
    helped = set(re.findall(r"^([a-z-]+):.*## \S", text, re.M))
    assert phony == helped
    assert {"setup", "demo", "test", "test-fast", "lint", "fmt", "serve", "migrate"} <= phony


def test_ci_runs_the_make_targets_and_stops_at_the_first_failure() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in text
    assert re.findall(r"^step (make \S+)$", text, re.M) == ["make setup", "make lint", "make test"]
    assert "export CI=true" in text
