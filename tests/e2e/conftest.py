import gzip
from pathlib import Path

import pytest

from tests.e2e.service import EXAMPLES, Service


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """The first 100 pairs of the shipped sample."""
    target = tmp_path / "small.jsonl"
    with gzip.open(EXAMPLES / "data/truthfulqa-600.jsonl.gz", "rt", encoding="utf-8") as lines:
        target.write_text("".join(next(lines) for _ in range(100)), encoding="utf-8")
    return target


@pytest.fixture(params=[pytest.param("embedded", marks=pytest.mark.soak), "full"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Service:
    """A service that is not started yet, on both setups; `make demo` is on the embedded one."""
    if request.param == "embedded":
        return Service.embedded(tmp_path)
    return Service.full(
        tmp_path,
        database=request.getfixturevalue("empty_postgres_url"),
        broker=request.getfixturevalue("redis_url"),
    )
