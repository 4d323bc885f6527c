"""The command line as users run it: exit codes, one line of error, keys that work."""

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
    assert all(name in shown for name in ("serve", "api", "worker", "migrate", "keys", "version"))


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
