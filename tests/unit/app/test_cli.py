"""The command line as users run it: exit codes, one line of error, keys that work."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

import pytest
from sqlalchemy.exc import DBAPIError

from app.cli import main
from app.commands.exits import Exit, exit_of
from kdpo.errors import api_error

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


class Kdpo(Protocol):
    def __call__(self, *arguments: str, **environment: str) -> Done: ...


@pytest.fixture
def kdpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Kdpo:
    """Run the command in this process, in an empty folder and with a clean environment."""

    def run(*arguments: str, **environment: str) -> Done:
        ours = {name: value for name, value in os.environ.items() if name[:5] != "KDPO_"}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["kdpo", *arguments])
        with patch.dict(os.environ, {**ours, **environment}, clear=True):
            with pytest.raises(SystemExit) as left:
                main()
            code = left.value.code
        captured = capfd.readouterr()
        return Done(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def check_failed(done: Done, says: str, code: int = 1) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_entry_point_of_the_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "kdpo", "version"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help(kdpo: Kdpo) -> None:
    shown = kdpo("--help").stdout
    names = (
        "recommend", "tune", "evaluate", "watch", "download", "jobs", "serve", "api", "worker",
        "migrate", "doctor", "keys", "version",
    )  # fmt: skip
    assert all(f" {name} " in shown for name in names)
    assert "--install-completion" in shown


def test_the_command_loads_no_server_until_it_runs_one(tmp_path: Path) -> None:
    code = "import json, sys, app.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    server = {"fastapi", "sqlalchemy", "celery", "uvicorn", "alembic", "numpy", "torch"}
    assert not server & set(json.loads(done.stdout))


def test_completion_of_commands(kdpo: Kdpo) -> None:
    asked = {"_KDPO_COMPLETE": "complete_bash", "COMP_WORDS": "kdpo jobs ", "COMP_CWORD": "2"}
    found = kdpo("jobs", **asked).stdout.split()
    assert {"list", "get", "events", "cancel", "pause", "resume", "retry"} == set(found)


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("recommend", "nowhere.jsonl", "-m", "m"), "nowhere.jsonl", 2),
        (("tune", "ds_1", "-m", "m", "--set", "n_epochs"), "NAME=VALUE", 2),
        (("tune", "ds_1", "-m", "m", "--set", "a=1", "--set", "a=2"), "each name once", 2),
        (("tune", "ds_1", "-m", "m", "--no-wait", "-o", "x"), "--no-wait leaves before", 2),
        (("tune", "ds_1", "-m", "m", "--no-wait", "--local"), "would end", 2),
        (("recommend", "ds_1", "-m", "m", "--policy", "{"), "--policy is not JSON", 2),
        (("recommend", "ds_1", "-m", "m", "--policy", "[]"), "--policy is not an object", 2),
        (("jobs", "list", "--url", "http://127.0.0.1:1"), "cannot reach", 5),
        (("jobs", "list", "--url", "localhost"), "expected one such as http://", 2),
        (("jobs", "list"), "no server answers", 5),
        (("watch", "ftjob-1", "--local", "--url", "http://127.0.0.1:1"), "drop one", 2),
    ],
)
def test_exit_codes_of_client_commands(
    kdpo: Kdpo, arguments: tuple[str, ...], says: str, code: int
) -> None:
    check_failed(kdpo(*arguments, KDPO_API__PORT="1"), says, code=code)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 413, 415, 422, 429, 500, 503])
def test_every_refusal_has_an_exit_code_of_the_table(status: int) -> None:
    table = {
        400: 6, 401: 4, 403: 4, 404: 3, 409: 7, 412: 7, 413: 6, 415: 6, 422: 6, 429: 6, 500: 1,
        503: 5,
    }  # fmt: skip
    assert exit_of(api_error(status, {"code": "x"}, request_id=None)) == table[status]


def test_the_page_has_every_exit_code() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert {int(row) for row in re.findall(r"^\| (\d+) \|", page, re.M)} == set(Exit)


def test_doctor_says_what_to_do(kdpo: Kdpo, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = kdpo("doctor", "--json", KDPO_API__PORT=port, KDPO_BROKER__URL="redis://127.0.0.1:1")
    assert done.returncode == 1
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert {found[name]["verdict"] for name in ("python", "settings", "data folder")} == {"ok"}
    assert {found[name]["verdict"] for name in ("port", "broker")} == {"fail"}
    assert "KDPO_API__PORT" in found["port"]["advice"]
    assert all(finding["advice"] for finding in found.values() if finding["verdict"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_doctor_of_wrong_settings(kdpo: Kdpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.doctor.PROBE_S", 0.01)
    done = kdpo("doctor", KDPO_MODE="full")
    assert done.returncode == 1
    assert "KDPO_DB__URL" in done.stdout


def test_versions_and_keys_as_json(kdpo: Kdpo) -> None:
    assert set(json.loads(kdpo("version", "--json").stdout)) == {"version", "python"}
    made = json.loads(kdpo("keys", "create", "--requests-per-minute", "30", "--json").stdout)
    assert re.fullmatch(r"dk-live-[0-9A-Za-z]{22}", made["key"])
    (listed,) = json.loads(kdpo("keys", "list", "--json").stdout)
    assert listed["requests_per_minute"] == 30
    assert (listed["id"], listed["state"]) == (made["id"], "usable")
    assert json.loads(kdpo("keys", "revoke", made["id"], "--json").stdout)["state"] == "revoked"
    assert json.loads(kdpo("migrate", "--json").stdout) == {"status": "newest"}


def test_keys_are_made_listed_and_revoked(kdpo: Kdpo, tmp_path: Path) -> None:
    made = kdpo("keys", "create", "--name", "ci", "--scope", "jobs:read")
    assert re.fullmatch(r"dk-live-[0-9A-Za-z]{22}\n", made.stdout), made.stderr
    assert (tmp_path / "kdpo-data" / "kdpo.db").is_file()
    listed = kdpo("keys", "list").stdout
    assert made.stdout.strip() not in listed
    found = re.search(r"(key_\w+)", listed)
    assert found is not None
    assert "usable" in listed
    assert "jobs:read" in listed
    assert kdpo("keys", "revoke", found.group(1)).returncode == 0
    assert "revoked" in kdpo("keys", "list").stdout
    check_failed(kdpo("keys", "revoke", found.group(1)), "no usable key", code=3)


def test_data_dir_option(kdpo: Kdpo, tmp_path: Path) -> None:
    assert kdpo("migrate", "--data-dir", "here").returncode == 0
    assert (tmp_path / "here" / "kdpo.db").is_file()


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (("serve", "--model-dir", "nowhere"), {}, "nowhere is not a folder"),
        (("migrate",), {"KDPO_MODE": "full"}, "KDPO_DB__URL"),
        (("migrate",), {"KDPO_API__PORT": "x"}, "KDPO_API__PORT"),
        (("api", "--host", "0.0.0.0"), {"KDPO_AUTH__REQUIRED": "false"}, "auth is off"),  # noqa: S104
        (
            ("serve",),
            {
                "KDPO_MODE": "full",
                "KDPO_DB__URL": "postgresql://x/y",
                "KDPO_BROKER__URL": "redis://x",
            },
            "mode embedded",
        ),
    ],
)
def test_errors_of_the_user(
    kdpo: Kdpo, arguments: tuple[str, ...], environment: dict[str, str], says: str
) -> None:
    check_failed(kdpo(*arguments, **environment), says)


def test_wrong_usage_is_exit_code_2(kdpo: Kdpo) -> None:
    check_failed(kdpo("worker", "--queue", "tpu"), "tpu", code=2)


def test_taken_port_is_said_first(kdpo: Kdpo, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        check_failed(kdpo("serve", "--port", port), f"cannot listen on 127.0.0.1:{port}")
    assert not (tmp_path / "kdpo-data").exists()


def test_unreachable_database(kdpo: Kdpo) -> None:
    url = "postgresql://nobody@127.0.0.1:1/none?connect_timeout=1"
    check_failed(kdpo("migrate", KDPO_DB__URL=url), "database")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"KDPO_MODE": "full"}, "kdpo: settings: "),
        ({"KDPO_API": "{not json"}, 'kdpo: settings: error parsing value for field "api"'),
    ],
)
def test_settings_that_have_no_one_name(kdpo: Kdpo, environment: dict[str, str], line: str) -> None:
    done = kdpo("migrate", **environment)
    check_failed(done, line)
    assert "Value error" not in done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("statement", "hinted"), [("SELECT * FROM absent", True), ("SELECT absent", False)]
)
def test_only_a_missing_table_is_a_reason_to_migrate(
    kdpo: Kdpo, monkeypatch: pytest.MonkeyPatch, statement: str, hinted: bool
) -> None:
    memory = closing(sqlite3.connect(":memory:"))
    with memory as connection, pytest.raises(sqlite3.Error) as caught:
        connection.execute(statement)
    wrapped = DBAPIError.instance("SELECT", {}, caught.value, sqlite3.Error)

    def fail(_url: str) -> None:
        raise wrapped

    monkeypatch.setattr("app.serving.upgrade", fail)
    done = kdpo("migrate")
    check_failed(done, "the database refused: no such")
    assert ("kdpo migrate" in done.stderr) is hinted
