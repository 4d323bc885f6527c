"""Goals over places, the block of a page, and the arguments that benchmarks share."""

from pathlib import Path

import pytest

from bench.options import parse, table_parser
from bench.report import publish_block, worst


@pytest.mark.parametrize(
    ("target", "where", "measured", "met"),
    [("<= 1.3", "b", 1.25, True), ("<= 1.2", "b", 1.25, False), (">= 0.6", "a", 0.5, False)],
)
def test_the_worst_place_decides(target: str, where: str, measured: float, met: bool) -> None:
    goal = worst("a goal", target, {"a": 0.5, "b": 1.2549}, digits=3)
    assert (goal["worst_cell"], goal["measured"], goal["met"]) == (where, measured, met)
    assert (goal["name"], goal["target"], goal["cells"]) == ("a goal", target, 2)


def test_a_place_is_told_in_words_and_nothing_measured_meets_nothing() -> None:
    goal = worst("a goal", "<= 2", {("x", 3): 1.0}, told=lambda key: f"{key[0]} at {key[1]}")
    assert goal["worst_cell"] == "x at 3"
    empty: dict[str, float] = {}
    assert worst("a goal", "<= 2", empty) == {
        "name": "a goal", "target": "<= 2", "measured": None, "met": False,
    }  # fmt: skip


def test_a_block_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- begin -->\n\nold\n\n<!-- end -->\n\nafter\n")
    publish_block(page, "<!-- begin -->\n\nnew\n\n<!-- end -->")
    assert page.read_text() == "before\n\n<!-- begin -->\n\nnew\n\n<!-- end -->\n\nafter\n"
    with pytest.raises(RuntimeError, match="must hold the lines"):
        publish_block(page, "<!-- other -->\n\nnew\n\n<!-- end -->")


@pytest.mark.parametrize("given", [["--limit", "3"], ["--datasets", "a"], ["--full", "--limit=0"]])
def test_arguments_that_would_be_ignored_are_refused(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *given])
    with pytest.raises(SystemExit):
        parse(table_parser("A benchmark.", table=Path("kept.jsonl")))
    assert "--limit" in capsys.readouterr().err


def test_the_kept_table_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--full", "--limit", "2"])
    options = parse(table_parser("A benchmark.", table=Path("kept.jsonl")))
    assert (options.table, options.full, options.limit) == (Path("kept.jsonl"), True, 2)
