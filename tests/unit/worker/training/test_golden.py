import json
from pathlib import Path

import pytest

from tests.unit.worker.training.golden import FILE, KEPT, STEPS, compute

UPDATE = "numbers moved; if they are meant to, run `make golden` and say why in the commit"


def test_runs_follow_the_golden_trajectory(tmp_path: Path) -> None:
    expected = json.loads(FILE.read_text(encoding="utf-8"))
    found = compute(tmp_path)
    assert found.keys() == expected.keys(), UPDATE
    for name, run in expected.items():
        assert len(run["steps"]) == STEPS
        for step, (point, golden) in enumerate(
            zip(found[name]["steps"], run["steps"], strict=True)
        ):
            for key in KEPT:
                # Log-probs of whole answers are near -100: their differences carry the rounding.
                tolerance = pytest.approx(golden[key], rel=2e-4, abs=2e-5)
                assert point[key] == tolerance, f"{name}, step {step + 1}, {key}: {UPDATE}"
        norm = pytest.approx(run["adapter_norm"], rel=1e-4)
        assert found[name]["adapter_norm"] == norm, f"{name}: {UPDATE}"
