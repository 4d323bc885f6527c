"""Files of any size out of few rows, and what the rows of a measurement say about the goals."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench import recommend_report
from bench.recommend import SAMPLE, WANTED, Sending, Source, enlarged, find, write
from bench.recommend_report import (
    BEGIN,
    END,
    SIZE,
    around,
    beside_reference,
    goals,
    growing,
    report,
    table,
)
from bench.train_report import Table

ROWS = [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {
        "prompt": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "So."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
]


def measured(pairs: int, *, reference: float = 10.0, **changed: float) -> dict[str, Any]:
    seconds = {
        "ready": 1.0, "provisional": 4.0, "recommendation": 16.0, "job": 15.0, "job: model": 0.5,
        "job: tokenize": 1.0, "job: reference": reference, "job: metrics": 1.5, "job: rank": 0.0,
        "job: store": 0.25, **changed,
    }  # fmt: skip
    return {
        "kind": "run", "data": "made-up", "pairs": pairs, "train_pairs": pairs, "load": 0.5,
        "sampled_pairs": min(pairs, 2000), "seconds": seconds,
        "peak_bytes": {"validation": 80_000_000, "recommendation": 700_000_000},
    }  # fmt: skip


def test_repeated_rows_have_prompts_of_their_own_and_the_same_answers() -> None:
    made = list(enlarged(ROWS, 5))
    assert made[:2] == ROWS
    assert len({json.dumps(row["prompt"]) for row in made}) == 5
    assert made[4]["prompt"] == "Why? (asked again, 2)"
    assert made[3]["prompt"][0] == ROWS[1]["prompt"][0]
    assert made[3]["prompt"][1]["content"] == "Why? (asked again, 1)"
    assert [row["chosen"] for row in made] == [ROWS[i % 2]["chosen"] for i in range(5)]
    assert list(enlarged(ROWS, 1)) == ROWS[:1]


def test_the_shipped_sample_becomes_a_file_of_distinct_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    sha256 = write(Source("sample", SAMPLE), 1300, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 1300
    assert len({(r["prompt"], r["chosen"], r["rejected"]) for r in rows}) == 1300
    assert write(Source("sample", SAMPLE), 1300, path) == sha256


def test_an_upload_ends_when_its_file_was_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    with Sending(path) as file:
        opened = file.last_read
        parts = [file.read(4), file.read(4), file.read(4)]
        assert parts == [b"abcd", b"ef", b""]
        assert file.last_read > opened


def test_a_named_folder_must_have_the_data(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=WANTED):
        find(tmp_path)
    with gzip.open(tmp_path / WANTED, "wt") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    source = find(tmp_path)
    assert (source.name, source.rows()) == ("hh-harmless", ROWS[:1])


def test_what_no_part_accounts_for_is_process_and_queue() -> None:
    row = measured(SIZE)
    assert around(row) == pytest.approx(15.0 - 0.5 - 1.0 - 10.0 - 1.5 - 0.25)
    assert beside_reference(row) == pytest.approx(6.0)
    assert growing(row) == pytest.approx(2.0)


def test_goals_are_of_the_newest_row_of_a_size() -> None:
    rows = [measured(SIZE), measured(SIZE, reference=12.0), measured(1000)]
    in_all, beside, growth = goals(rows)
    assert (in_all["measured"], in_all["met"]) == (16.0, True)
    assert (beside["measured"], beside["met"]) == (4.0, True)
    assert (growth["measured"], growth["met"]) == (None, False)
    assert not goals([measured(SIZE)])[1]["met"]


def test_growth_is_of_seconds_a_pair() -> None:
    few = measured(10_000)
    linear = measured(100_000, **{"ready": 12.0, "job: tokenize": 10.0})
    assert goals([few, linear])[2] == {
        "name": "validation and tokenising, seconds a pair among 100,000 / among 10,000",
        "target": "<= 1.2", "measured": 1.1, "met": True, "worst_cell": "made-up", "cells": 1,
    }  # fmt: skip
    squared = measured(100_000, **{"ready": 100.0, "job: tokenize": 100.0})
    assert not goals([few, squared])[2]["met"]


def test_a_small_job_has_no_provisional_answer() -> None:
    (line,) = table([measured(60) | {"pairs": 60}]).splitlines()[2:]
    assert line.startswith("| made-up | 60 | 60 | 60 | 1.00 | 1.75 | 0.50 | 1.00 | – | 10.00 |")
    assert line.count("|") == table([]).splitlines()[0].count("|")
    assert table([]).splitlines()[1].count("|") == line.count("|")


def test_only_kept_rows_go_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, summary = tmp_path / "page.md", tmp_path / "summary.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(recommend_report, "PAGE", page)
    monkeypatch.setattr(recommend_report, "SUMMARY", summary)
    kept = Table(tmp_path / "cells.jsonl")
    report(kept, now=[measured(SIZE)], publish=True)
    assert "old" in page.read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["now"][0]["measured"] == 16.0
    about = {"cpu": "CPU", "cores": 2, "torch": "2", "transformers": "5", "python": "3.11"}
    kept.append({"environment": about})
    kept.append(measured(SIZE))
    report(kept, now=[], publish=True)
    assert "| made-up | 2,300 |" in page.read_text()
    assert page.read_text().startswith("before")
    assert page.read_text().endswith("after\n")
    assert json.loads(summary.read_text())["goals"][0]["met"]
