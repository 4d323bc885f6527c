"""One way to ingest bytes in a test, and rows to make them from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from core.run_spec import DatasetPolicy
from core.settings import DataLimits
from worker.ingest.canonical import CanonicalRow, read_canonical
from worker.ingest.pipeline import CANONICAL_NAME, REJECTED_NAME, IngestResult, ingest


@dataclass(frozen=True)
class Outcome:
    result: IngestResult
    rows: list[CanonicalRow]
    rejected: list[dict]
    out_dir: Path
    progress: list[tuple[int, int]]

    @property
    def report(self) -> dict:
        return self.result.report

    @property
    def codes(self) -> dict[str, int]:
        return {error["code"]: error["count"] for error in self.report["errors"]}

    def lint(self, check: str) -> dict:
        return next(entry for entry in self.report["lint"] if entry["check"] == check)


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path) -> Run:
    def ingest_bytes(
        data: bytes | Path,
        *,
        policy: DatasetPolicy | None = None,
        **limits: float,
    ) -> Outcome:
        source = data if isinstance(data, Path) else tmp_path / "upload"
        if isinstance(data, bytes):
            source.write_bytes(data)
        out_dir = tmp_path / "out"
        progress: list[tuple[int, int]] = []
        result = ingest(
            source,
            out_dir=out_dir,
            dataset_id="ds_test",
            policy=policy or DatasetPolicy(),
            limits=DataLimits(**limits),
            on_progress=lambda done, total: progress.append((done, total)),
        )
        canonical = out_dir / CANONICAL_NAME
        return Outcome(
            result=result,
            rows=list(read_canonical(canonical)) if canonical.exists() else [],
            rejected=[orjson.loads(x) for x in (out_dir / REJECTED_NAME).read_bytes().splitlines()],
            out_dir=out_dir,
            progress=progress,
        )

    return ingest_bytes


def good_row(number: int) -> dict:
    return {
        "prompt": f"What is {number} plus {number}?",
        "chosen": f"It is {2 * number}.",
        "rejected": f"Is it {2 * number}?",
    }


def jsonl(rows: list[object]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


@pytest.fixture
def good() -> Callable[[int], list[dict]]:
    return lambda count: [good_row(number) for number in range(count)]


@pytest.fixture
def lines() -> Callable[[list[object]], bytes]:
    return jsonl
