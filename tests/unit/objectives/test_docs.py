"""docs/maths.md names tests and code that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")


def _source(folder: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py"))


def test_every_named_test_exists() -> None:
    folders = ("tests/unit/objectives", "tests/unit/worker/training", "tests/parity")
    tests = "\n".join(_source(folder) for folder in folders)
    modules = {path.stem for folder in folders for path in (ROOT / folder).glob("test_*.py")}
    named = set(re.findall(r"\b(test_\w+)", TEXT)) - modules
    assert len(named) > 15
    assert {name for name in named if f"def {name}" not in tests} == set()


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(?:divergences|kernels)/\w+\.py`", TEXT)))
)
def test_every_named_file_exists(name: str) -> None:
    assert (ROOT / "objectives" / name.strip("`")).is_file()


def test_every_named_function_exists() -> None:
    modules = [path.stem for path in (ROOT / "objectives").rglob("*.py")] + ["MixtureKernel"]
    named = set(re.findall(rf"`(?:{'|'.join(modules)})\.(\w+)`", TEXT)) - {"py"}
    code = _source("objectives")
    assert len(named) > 10
    assert {name for name in named if not re.search(rf"(def|class) {name}\b", code)} == set()
