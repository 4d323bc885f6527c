"""Checks of the data as a whole."""

import pytest

from worker.ingest.canonical import Message, Pair, Role, Split, canonical_row
from worker.ingest.overlap import PromptIndex


def row(prompt, *, split=Split.TRAIN, line=1, chosen="yes"):
    pair = Pair(
        prompt=(Message(Role.USER, prompt),),
        chosen=(Message(Role.ASSISTANT, chosen),),
        rejected=(Message(Role.ASSISTANT, "no"),),
        margin=None,
        source="s",
        meta={},
    )
    return canonical_row(pair, line=line, split=split)


def overlap(tmp_path, *rows, keep=20):
    with PromptIndex(tmp_path) as index:
        for found in rows:
            index.add(found)
        return index.overlap(keep=keep)


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [
        ("What is it?", "what  is it", True),
        ("Don’t go…", "don't go", True),
        ("ÄPFEL", "äpfel.", True),
        ("2+2", "2-2", False),
        ("की", "का", False),
        ("Name three.", "Name four.", False),
    ],
)
def test_what_counts_as_near(tmp_path, first, second, near):
    found = overlap(tmp_path, row(first), row(second))
    assert found.prompts == (2 if near else 0)
    assert found.across == 0


def test_equal_prompts_are_one_and_splits_are_told_apart(tmp_path):
    found = overlap(
        tmp_path,
        row("Same here.", line=1),
        row("Same here.", line=2, chosen="of course"),
        row("Same here?", line=3),
        row("Other one", line=4),
        row("Other one!", line=5, split=Split.TEST),
        row("other one", line=6),
    )
    assert (found.prompts, found.across) == (5, 3)
    assert (found.lines, found.lines_across) == ([1, 3, 4, 5, 6], [4, 5, 6])


def test_lines_are_the_first_ones(tmp_path):
    rows = [row(f"q {n}{end}", line=2 * n + i + 1) for n in range(200) for i, end in
            enumerate((".", "!"))]  # fmt: skip
    found = overlap(tmp_path, *rows, keep=7)
    assert (found.prompts, found.lines) == (400, list(range(1, 8)))


def test_report_warns_of_twins_in_other_splits(run, lines, good):
    rows = good(60)
    twins = [{**row, "prompt": row["prompt"].upper()} for row in rows[:20]]
    outcome = run(lines(rows + twins))
    near, across = outcome.lint("near_duplicate"), outcome.lint("eval_overlap")
    assert (near["level"], near["count"], near["of"]) == ("warn", 40, 80)
    splits = {}
    for found in outcome.rows:
        splits.setdefault(found.prompt[0].content.lower(), set()).add(found.split)
    assert across["count"] == 2 * sum(len(found) == 2 for found in splits.values()) > 0
    assert set(across["lines"]) <= {found.line for found in outcome.rows}


def test_few_near_duplicates_are_counted_without_a_warning(run, lines, good):
    outcome = run(lines([*good(300), {**good(1)[0], "prompt": good(1)[0]["prompt"] + "?"}]))
    assert outcome.lint("near_duplicate")["count"] == 2
    assert outcome.lint("near_duplicate")["level"] == "ok"


def test_answers_that_begin_with_the_prompt(run, lines, good):
    rows = [
        {"prompt": f"Please add one to {n}.", "chosen": f"Please add one to {n}. {n + 1}",
         "rejected": "no"}
        for n in range(5)
    ]  # fmt: skip
    outcome = run(lines([*rows, *good(40)]))
    check = outcome.lint("prompt_leak")
    assert (check["level"], check["count"], check["lines"]) == ("warn", 5, [1, 2, 3, 4, 5])
    short = [{**row, "prompt": f"{n}?", "chosen": f"{n}? yes"} for n, row in enumerate(rows)]
    assert run(lines([*short, *good(40)])).lint("prompt_leak")["count"] == 0
