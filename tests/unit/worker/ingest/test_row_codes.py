"""Every reason for which a row is rejected: code, line, JSON pointer, hint."""

import orjson
import pytest

from core.run_spec import DatasetPolicy
from tests.unit.worker.ingest.layout_fixtures import arena
from worker.ingest.faults import HINTS, RowCode

LENIENT = DatasetPolicy(max_invalid_fraction=0.5)


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def chat(**fields):
    return {"prompt": [u("q")], "chosen": [a("yes")], "rejected": [a("no")], **fields}


def standard(**fields):
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", **fields}
    return {name: value for name, value in row.items() if value is not ...}


def hh(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[turn == turn.lower()]}: {turn}" for turn in turns)


TEXT_ROWS = [standard(prompt=f"Question {n}?") for n in range(20)]
CHAT_ROWS = [chat(prompt=[u(f"Question {n}?")]) for n in range(20)]
HH_ROWS = [
    {"chosen": hh(f"Question {n}?", "yes"), "rejected": hh(f"Question {n}?", "no")}
    for n in range(20)
]
IMPLICIT_TEXT_ROWS = [
    {"chosen": f"Question {n}? yes", "rejected": f"Question {n}? no"} for n in range(20)
]
IMPLICIT_CHAT_ROWS = [
    {"chosen": [u(f"Q {n}?"), a("yes")], "rejected": [u(f"Q {n}?"), a("no")]} for n in range(20)
]
ARENA_ROWS = [arena(n, f"Question {n}?", "yes", "no") for n in range(20)]


def nested(depth):
    return b'{"prompt":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


CASES = [
    # code, good rows around it, bad line, pointer below the line
    ("not_json", TEXT_ROWS, b'{"prompt": "q", ', ""),
    ("not_json", TEXT_ROWS, b'{"prompt": NaN}', ""),
    ("not_json", TEXT_ROWS, b'{"prompt": "\\ud800"}', ""),
    ("not_json", TEXT_ROWS, b"prompt,chosen,rejected", ""),
    ("not_an_object", TEXT_ROWS, b'["q", "yes", "no"]', ""),
    ("not_an_object", TEXT_ROWS, b"null", ""),
    ("too_deep", TEXT_ROWS, nested(40), ""),
    ("too_deep", TEXT_ROWS, nested(5000), ""),
    ("duplicate_key", TEXT_ROWS, b'{"prompt":"q","chosen":"a","rejected":"b","chosen":"c"}', ""),
    ("duplicate_key", TEXT_ROWS, b'{"prompt":"q","chosen":"a","meta":{"k" : 1,"k" : 2}}', ""),
    ("invalid_utf8", TEXT_ROWS, b'{"prompt": "caf\xe9"}', ""),
    ("invalid_characters", TEXT_ROWS, b'{"prompt": "a\x00b"}', ""),
    ("invalid_characters", TEXT_ROWS, standard(chosen="a\x1b[31m"), "/chosen"),
    ("invalid_characters", CHAT_ROWS, chat(chosen=[a("\x00")]), "/chosen/0/content"),
    ("invalid_characters", TEXT_ROWS, standard(meta={"a/b~": ["\x08"]}), "/meta/a~1b~0/0"),
    ("missing_field", TEXT_ROWS, standard(rejected=...), "/rejected"),
    ("missing_field", TEXT_ROWS, standard(prompt=None), "/prompt"),
    ("missing_field", CHAT_ROWS, chat(chosen=[{"content": "x"}]), "/chosen/0/role"),
    ("missing_field", CHAT_ROWS, chat(chosen=[{"role": "assistant"}]), "/chosen/0/content"),
    ("wrong_type", TEXT_ROWS, standard(chosen=3), "/chosen"),
    ("wrong_type", TEXT_ROWS, standard(chosen=[a("x")]), "/chosen"),
    ("wrong_type", TEXT_ROWS, standard(margin="high"), "/margin"),
    ("wrong_type", TEXT_ROWS, standard(margin=True), "/margin"),
    ("wrong_type", CHAT_ROWS, chat(prompt="q"), "/prompt"),
    ("wrong_type", CHAT_ROWS, chat(chosen=["yes"]), "/chosen/0"),
    (
        "wrong_type",
        CHAT_ROWS,
        chat(chosen=[{"role": "assistant", "content": 3}]),
        "/chosen/0/content",
    ),
    ("empty_text", TEXT_ROWS, standard(chosen=" \n"), "/chosen"),
    ("empty_text", TEXT_ROWS, standard(prompt=""), "/prompt"),
    ("empty_text", CHAT_ROWS, chat(rejected=[]), "/rejected"),
    ("empty_text", CHAT_ROWS, chat(rejected=[a(" ")]), "/rejected/0/content"),
    ("empty_text", HH_ROWS, {"chosen": hh("Q", ""), "rejected": hh("Q", "x")}, "/chosen"),
    (
        "empty_text",
        IMPLICIT_TEXT_ROWS,
        {"chosen": "Tell me", "rejected": "Tell me more"},
        "/chosen",
    ),
    (
        "empty_text",
        IMPLICIT_CHAT_ROWS,
        {"chosen": [u("q")], "rejected": [u("q"), a("x")]},
        "/chosen",
    ),
    ("unknown_role", CHAT_ROWS, chat(chosen=[{"role": "gpt", "content": "x"}]), "/chosen/0/role"),
    ("unknown_role", CHAT_ROWS, chat(chosen=[{"role": ["a"], "content": "x"}]), "/chosen/0/role"),
    ("role_order", CHAT_ROWS, chat(prompt=[u("q"), a("x")]), "/prompt"),
    ("role_order", CHAT_ROWS, chat(prompt=[u("q"), u("r")]), "/prompt"),
    ("role_order", CHAT_ROWS, chat(prompt=[a("x"), u("q")]), "/prompt"),
    ("role_order", CHAT_ROWS, chat(prompt=[{"role": "system", "content": "s"}]), "/prompt"),
    ("role_order", CHAT_ROWS, chat(prompt=[u("q"), {"role": "tool", "content": "t"}]), "/prompt"),
    (
        "role_order",
        CHAT_ROWS,
        chat(prompt=[u("q"), {"role": "system", "content": "s"}, u("r")]),
        "/prompt",
    ),
    ("role_order", CHAT_ROWS, chat(chosen=[{"role": "tool", "content": "t"}]), "/chosen"),
    ("role_order", CHAT_ROWS, chat(chosen=[a("x"), a("y")]), "/chosen"),
    (
        "role_order",
        HH_ROWS,
        {"chosen": hh("Q", "R", "x"), "rejected": hh("Q", "R", "y")},
        "/chosen",
    ),
    ("role_order", HH_ROWS, {"chosen": "Once upon a time", "rejected": hh("Q", "y")}, "/chosen"),
    ("no_prompt", IMPLICIT_TEXT_ROWS, {"chosen": "yes", "rejected": "no"}, "/chosen"),
    ("no_prompt", IMPLICIT_CHAT_ROWS, {"chosen": [a("yes")], "rejected": [a("no")]}, "/chosen"),
    ("last_turn_differs", HH_ROWS, {"chosen": hh("Q", "x"), "rejected": hh("R", "x")}, "/rejected"),
    (
        "last_turn_differs",
        IMPLICIT_CHAT_ROWS,
        {"chosen": [u("q"), a("x"), u("r"), a("y")], "rejected": [u("q"), a("z")]},
        "/chosen",
    ),
    ("identical_pair", TEXT_ROWS, standard(rejected="yes "), ""),
    ("identical_pair", CHAT_ROWS, chat(rejected=[a("yes")]), ""),
    ("identical_pair", IMPLICIT_TEXT_ROWS, {"chosen": "same same", "rejected": "same same"}, ""),
    (
        "identical_pair",
        IMPLICIT_CHAT_ROWS,
        {"chosen": [u("q"), a("x")], "rejected": [u("q"), a("x")]},
        "",
    ),
    (
        "unsupported_content",
        CHAT_ROWS,
        chat(chosen=[{"role": "assistant", "content": None, "tool_calls": [{}]}]),
        "/chosen/0",
    ),
    (
        "unsupported_content",
        CHAT_ROWS,
        chat(chosen=[{"role": "assistant", "content": [{"type": "text"}]}]),
        "/chosen/0",
    ),
    (
        "unknown_value",
        ARENA_ROWS,
        {**ARENA_ROWS[0], "winner": "model_c"},
        "/winner",
    ),
]


@pytest.mark.parametrize(("code", "good", "bad", "pointer"), CASES)
def test_row_is_rejected_with_code_line_and_pointer(run, lines, code, good, bad, pointer):
    line = bad if isinstance(bad, bytes) else orjson.dumps(bad)
    outcome = run(lines(good[:7]) + b"\n" + line + b"\n" + lines(good[7:]), policy=LENIENT)

    assert outcome.result.failure is None
    assert outcome.result.num_pairs == 20
    assert outcome.codes == {code: 1}
    [error] = outcome.report["errors"]
    # Line 8 is blank: it has a number and is no row.
    assert error["examples"][0]["line"] == 9
    assert error["examples"][0]["pointer"] == "/9" + pointer
    assert error["hint"] == HINTS[RowCode(code)]
    [rejected] = outcome.rejected
    assert (rejected["line"], rejected["code"]) == (9, code)
    assert rejected["pointer"] == "/9" + pointer
    assert rejected["detail"] == error["examples"][0]["detail"] != ""
    if not isinstance(bad, bytes):
        parsed = code != "invalid_characters"
        assert rejected.get("row") == (bad if parsed else None)
    assert outcome.result.status == "ready_with_warnings"


def test_every_code_has_a_hint_and_a_case():
    assert set(HINTS) == set(RowCode)
    elsewhere = {"line_too_long", "unknown_layout", "malformed_row"}
    assert {case[0] for case in CASES} | elsewhere == set(RowCode)


def test_long_line_among_good_ones_is_one_rejected_row(run, lines):
    long_line = orjson.dumps(standard(chosen="x" * 10_000_000))
    outcome = run(lines(TEXT_ROWS[:5]) + long_line + b"\n" + lines(TEXT_ROWS[5:]), policy=LENIENT)
    assert outcome.result.failure is None
    assert outcome.result.num_pairs == 20
    assert outcome.codes == {"line_too_long": 1}
    assert outcome.rejected[0]["line"] == 6
    assert str(len(long_line)) in outcome.rejected[0]["detail"]
    assert "row" not in outcome.rejected[0]


def test_line_of_exactly_the_limit_is_read(run, lines):
    rows = [orjson.dumps(standard(prompt=f"{n:02}" + "x" * 50)) for n in range(12)]
    limit = len(rows[0])
    for end in (b"\n", b"\r\n"):
        assert run(end.join(rows) + end, max_line_bytes=limit).result.num_pairs == 12
        assert run(end.join(rows), max_line_bytes=limit).result.num_pairs == 12
    assert run(b"\n".join(rows), max_line_bytes=limit - 1).codes == {"line_too_long": 12}


def test_detail_never_repeats_the_bytes(run, lines):
    secret = b"hf_SECRETSECRETSECRET"
    outcome = run(
        lines(TEXT_ROWS) + b'{"prompt": "' + secret + b'\xff"}\n' + secret + b"\n", policy=LENIENT
    )
    assert outcome.codes == {"invalid_utf8": 1, "not_json": 1}
    assert secret.decode() not in orjson.dumps(outcome.report).decode()
    assert all(secret.decode() not in orjson.dumps(row).decode() for row in outcome.rejected)


def test_colons_and_quotes_in_texts_are_no_duplicate_keys(run, lines):
    rows = [standard(prompt=f'{n} {{"chosen": "a", "chosen" : "b"}}') for n in range(12)]
    assert run(lines(rows)).result.num_pairs == 12


def test_unknown_layout_names_the_fields(run, lines):
    outcome = run(lines([{"question": f"q{n}", "best": "x"} for n in range(12)]))
    assert outcome.report["detected"]["layout"] is None
    assert outcome.codes == {"unknown_layout": 12}
    assert "`question`, `best`" in outcome.result.failure.message


def test_field_missing_everywhere_is_named(run, lines):
    rows = [standard(prompt=f"q{n}", rejected=...) for n in range(12)]
    outcome = run(lines(rows))
    assert outcome.codes == {"missing_field": 12}
    [detail] = outcome.result.failure.errors
    assert (detail.code, detail.line, detail.pointer) == ("missing_field", 1, "/1/rejected")
    assert detail.count == 12
    assert detail.hint


def test_examples_are_limited_and_all_errors_counted(run, lines):
    bad = [standard(prompt=f"q{n}", chosen="") for n in range(50)]
    outcome = run(lines(TEXT_ROWS + bad), examples_per_code=3)
    [error] = outcome.report["errors"]
    assert error["count"] == 50
    assert [example["line"] for example in error["examples"]] == [21, 22, 23]
    assert len(outcome.rejected) == 50


def test_tool_turns_are_kept(run, lines):
    tool = {"role": "tool", "content": "42"}
    rows = [
        chat(prompt=[u(f"q{n}"), a("let me see"), tool, tool], chosen=[a("x"), tool, a("y")])
        for n in range(12)
    ]
    row = run(lines(rows)).rows[0]
    assert [m.role for m in row.prompt] == ["user", "assistant", "tool", "tool"]
    assert [m.role for m in row.chosen] == ["assistant", "tool", "assistant"]
