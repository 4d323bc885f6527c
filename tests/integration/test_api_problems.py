"""The pages that the `type` of a problem names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import _CODE_OF_STATUS
from app.problems import EXPLANATIONS
from core import errors
from core.errors import FailureCode, KdpoError
from tests.integration.api_world import World, running_api
from tests.integration.test_api import check_problem

ROOT = Path(__file__).parents[2]
# Of a job, not of a response; `error.code` of a job says them, and no problem does.
OF_JOBS = {code.value for code in FailureCode} | {"lease_lost", "cancel_requested"}
# Codes of single places in `errors`, not of problems.
OF_DETAILS = {"extra_forbidden"}


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def codes_in_the_sources() -> set[str]:
    found = set(_CODE_OF_STATUS.values())
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, KdpoError):
            found.add(kind.default_code)
    for package in ("app", "core", "models", "worker"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "code":
                    value = node.value
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        found.add(value.value)
    return found - OF_DETAILS


def test_every_code_is_explained() -> None:
    assert codes_in_the_sources() - OF_JOBS <= set(EXPLANATIONS)


def test_type_of_a_problem_is_a_page_for_everybody(world: World) -> None:
    problem = check_problem(world.get("/v1/jobs/ftjob_none"), 404, "not_found")
    page = world.client.get(problem["type"])
    assert page.status_code == 200
    assert page.json() == {
        "code": "not_found",
        "title": problem["title"],
        "explanation": EXPLANATIONS["not_found"],
    }


def test_unknown_code_is_not_found(world: World) -> None:
    check_problem(world.client.get("/problems/no_such_code"), 404, "not_found")
