"""docs/maths.md names tests and code that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")


def _source(folder: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py"))


def test_every_named_test_exists() -> None:
    tests = _source("tests/unit/objectives")
    modules = {path.stem for path in (ROOT / "tests/unit/objectives").glob("test_*.py")}
    named = set(re.findall(r"\b(test_\w+)", TEXT)) - modules
    assert len(named) > 15
    assert {name for name in named if f"def {name}" not in tests} == set()


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(?:divergences|kernels)/\w+\.py`", TEXT)))
)
def test_every_named_file_exists(name: str) -> None:
    assert (ROOT / "objectives" / name.strip("`")).is_file()


def test_every_named_function_exists() -> None:
    named = re.findall(
        r"`(?:hybrid|geometry|numerics|power|symmetric|wasserstein|MixtureKernel)\.(\w+)`", TEXT
    )
    code = _source("objectives")
    assert len(named) > 10
    assert {name for name in named if not re.search(rf"(def|class) {name}\b", code)} == set()
