"""bench.auto: what a run says of its goals, and which data it takes."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from bench import auto


def a_run(*, seconds: float, spent: float) -> dict[str, Any]:
    quotes = [
        {"at": "start", "p50": 200.0, "p90": 240.0},
        {"at": "screened", "p50": 160.0, "p90": 180.0},
    ]
    return {
        "data": "truthfulqa", "pairs": 2218, "load": 0.1, "search": {}, "seconds": seconds,
        "steps": {"search": 170, "final": 30}, "spent": spent, "quotes": quotes,
        "summary": {"trials": 41, "sentence": "Trial 7 wins."},
    }  # fmt: skip


def test_the_worse_of_both_quotes_counts() -> None:
    minutes, off = auto.goals(a_run(seconds=300.0, spent=170.0))
    assert (minutes["measured"], minutes["met"]) == (5.0, True)
    assert (off["measured"], off["worst_cell"], off["met"]) == (15.0, "start", True)
    minutes, off = auto.goals(a_run(seconds=660.0, spent=210.0))
    assert not minutes["met"]
    assert (off["measured"], off["worst_cell"], off["met"]) == (31.2, "screened", False)


def test_the_page_has_the_run_between_its_marks() -> None:
    row = a_run(seconds=300.0, spent=170.0)
    where = {"cpu": "a CPU", "cores": 2, "torch": "2"}
    block = auto.block({"environment": where, "run": row, "goals": auto.goals(row)})
    lines = block.splitlines()
    assert (lines[0], lines[-1]) == (auto.BEGIN, auto.END)
    assert "took 300 s (search 170, final 30)" in block
    assert "start: 200 s (P90 240 s); screened: 160 s (P90 180 s), and cost 170 device" in block
    assert auto.BEGIN in auto.PAGE.read_text(encoding="utf-8")


def test_a_folder_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="name a folder that has it"):
        auto.find(tmp_path)
    with gzip.open(tmp_path / auto.WANTED, "wt") as file:
        file.write('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert len(auto.find(tmp_path).rows()) == 1
