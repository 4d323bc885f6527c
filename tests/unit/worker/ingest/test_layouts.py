"""Each layout on five rows: detected, converted, and the same pairs whatever the layout."""

import pytest

from core.layout_names import LayoutName
from tests.unit.worker.ingest.layout_fixtures import (
    FACTS,
    FIXTURES,
    MARGINS,
    bot,
    summary_prompt,
    user,
)
from worker.ingest.canonical import Role
from worker.ingest.layout_trl import split_point
from worker.ingest.layouts import LAYOUTS, detect

LIMITS = {"min_pairs": 5, "min_prompts": 5}
# Their prompt has a frame around the text.
FRAMED = {"summarize_from_feedback": summary_prompt}


def pairs_of(outcome):
    return [
        (row.prompt[0].content, row.chosen[0].content, row.rejected[0].content)
        for row in outcome.rows
    ]


def test_every_layout_has_a_name_and_a_fixture():
    names = [layout.name for layout in LAYOUTS]
    assert sorted(names) == sorted(LayoutName) == sorted(FIXTURES)


@pytest.mark.parametrize("name", FIXTURES)
def test_layout_is_detected_and_gives_the_pairs(run, lines, name):
    outcome = run(lines(FIXTURES[name]), **LIMITS)

    assert outcome.result.failure is None
    detected = outcome.report["detected"]
    assert detected["layout"] == name
    assert detected["confidence"] >= 0.8
    assert all(other["confidence"] < detected["confidence"] for other in detected["alternatives"])
    assert {"prompt"} < set(outcome.report["mapping"])
    frame = FRAMED.get(name, str)
    assert sorted(pairs_of(outcome)) == sorted((frame(p), c, r) for p, c, r in FACTS)
    for row in outcome.rows:
        assert [m.role for m in row.prompt] == [Role.USER]
        assert [m.role for m in row.chosen + row.rejected] == [Role.ASSISTANT] * 2
        assert row.margin == pytest.approx(MARGINS[name]) if name in MARGINS else not row.margin
        assert row.weight == 1.0
    counts = outcome.report["counts"]
    assert counts["rejected"] == 0
    assert counts["rows"] == counts["converted"] == len(FIXTURES[name])


def test_same_pairs_have_the_same_ids_and_splits_in_every_layout(run, lines):
    seen = {
        tuple(sorted((row.id, row.group_id, row.split) for row in outcome.rows))
        for outcome in (
            run(lines(rows), **LIMITS) for name, rows in FIXTURES.items() if name not in FRAMED
        )
    }
    assert len(seen) == 1


def test_confidence_and_alternatives(run, lines):
    detected = run(lines(FIXTURES["anthropic_hh"]), **LIMITS).report["detected"]
    assert detected["confidence"] == 1.0
    assert detected["alternatives"] == [{"layout": "trl_standard_implicit", "confidence": 0.8}]

    mixed = FIXTURES["trl_standard"][:4] + FIXTURES["trl_conversational"][:1]
    found = detect(mixed)
    assert (found.layout.name, found.confidence) == ("trl_standard", 0.8)
    assert found.alternatives == (("trl_conversational", 0.2),)


def test_layout_is_found_behind_rows_that_are_none(run, lines, good):
    junk = b"not json\n" * 150 + lines([{"other": 1}] * 120)
    outcome = run(junk + lines(good(20)), policy=None)
    assert outcome.report["detected"]["layout"] == "trl_standard"
    assert outcome.codes["not_json"] == 150
    assert outcome.report["counts"]["pairs"] == 20


def test_implicit_text_prompt_is_a_warning(run, lines):
    outcome = run(lines(FIXTURES["trl_standard_implicit"]), **LIMITS)
    assert outcome.result.status == "ready_with_warnings"
    assert outcome.lint("implicit_prompt")["count"] == 5


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("Sky? It is blue", "Sky? It is bright", "Sky? It is", ("blue", "bright")),
        ("Q: sky?\nA: It is blue", "Q: sky?\nA: It is red", "Q: sky?", ("It is blue", "It is red")),
        (
            "Do it.\n### Response:\nYes sir",
            "Do it.\n### Response:\nYes no",
            "Do it.",
            ("Yes sir", "Yes no"),
        ),
        ("[INST] hi [/INST] one", "[INST] hi [/INST] two", "[INST] hi", ("one", "two")),
        ("Tell me more", "Tell me", "Tell me", ("more", "")),
        ("one two", "three", "", ("one two", "three")),
    ],
)
def test_split_point(chosen, rejected, prompt, answers):
    end, start = split_point(chosen, rejected)
    assert chosen[:end].strip() == prompt
    assert (chosen[start:].lstrip(), rejected[start:].lstrip()) == answers


def test_split_point_is_fast_on_long_blank_text():
    blank = " " * 500_000
    assert split_point(blank + "x", blank + "y") == (500_000, 500_000)


def test_conversation_keeps_system_and_earlier_turns(run, lines):
    head = [{"role": "system", "content": "Be brief."}, user("Hi"), bot("Hello")]
    rows = [
        {"chosen": [*head, user(p), bot(c)], "rejected": [*head, user(p), bot(r)]}
        for p, c, r in FACTS
    ]
    outcome = run(lines(rows), **LIMITS)
    assert [m.role for m in outcome.rows[0].prompt] == ["system", "user", "assistant", "user"]


def test_prompt_repeated_in_the_answers_is_taken_off(run, lines):
    rows = [
        {"prompt": [user(p)], "chosen": [user(p), bot(c)], "rejected": [user(p), bot(r)]}
        for p, c, r in FACTS
    ]
    plain = run(lines(FIXTURES["trl_conversational"]), **LIMITS)
    repeated = run(lines(rows), **LIMITS)
    assert repeated.rows == plain.rows


def test_margin_source_meta_and_other_fields(run, lines):
    rows = [
        {"prompt": p, "chosen": c, "rejected": r, "margin": 1.5, "source": "me", "meta": {"k": 1}}
        for p, c, r in FACTS[:3]
    ]
    rows += [
        {"prompt": p, "chosen": c, "rejected": r, "score_chosen": 4, "score_rejected": 1, "x": 0}
        for p, c, r in FACTS[3:]
    ]
    outcome = run(lines(rows), **LIMITS)
    first, last = outcome.rows[0], outcome.rows[-1]
    assert (first.margin, first.source, first.meta) == (1.5, "me", {"k": 1})
    assert (last.margin, last.source, last.meta) == (3.0, "trl_standard", {})
    assert (first.weight, first.line, last.line) == (1.0, 1, 5)
    assert outcome.report["ignored_fields"] == {"x": 2}
