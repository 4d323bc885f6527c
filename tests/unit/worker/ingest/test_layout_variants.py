"""What the layouts allow beside their plain form, and what they refuse."""

import copy

import pytest

from core.layout_names import LayoutName
from core.run_spec import DatasetPolicy
from tests.unit.worker.ingest.layout_fixtures import (
    FACTS,
    FIXTURES,
    arena,
    bot,
    kaggle,
    ratings,
    transcript,
    user,
)
from worker.ingest.canonical import Message, Role
from worker.ingest.choice import choose
from worker.ingest.faults import RowFault
from worker.ingest.layouts import LAYOUTS, detect

BY_NAME = {layout.name: layout for layout in LAYOUTS}
PROMPT, GOOD, BAD = FACTS[0]
SYSTEM = {"role": "system", "content": "Be brief."}


def convert(name, row):
    layout = BY_NAME[LayoutName(name)]
    assert layout.score(row) > 0.0
    return layout.convert(row)


def row_of(name, **fields):
    return {**copy.deepcopy(FIXTURES[name][0]), **fields}


def contents(messages):
    return [(m.role.value, m.content) for m in messages]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("orca", {"system": "Be brief."}),
        ("axolotl", {"system": "Be brief."}),
        ("llama_factory_alpaca", {"system": "Be brief."}),
        ("llama_factory_sharegpt", {"system": "Be brief."}),
        ("openai", {"input": {"messages": [SYSTEM, user(PROMPT)]}}),
        ("axolotl_chat", {"messages": [SYSTEM, user(PROMPT)]}),
        ("ms_swift", {"messages": [SYSTEM, user(PROMPT), bot(GOOD)]}),
        ("helpsteer3", {"context": [SYSTEM, user(PROMPT)]}),
        (
            "h4_ultrafeedback",
            {"chosen": [SYSTEM, user(PROMPT), bot(GOOD)], "rejected": [SYSTEM, user(PROMPT),
             bot(BAD)]},
        ),
        ("messages_chosen_rejected", {"messages": [SYSTEM, user(PROMPT)]}),
    ],
)  # fmt: skip
def test_system_message_is_kept(name, fields):
    pair = convert(name, row_of(name, **fields))
    assert contents(pair.prompt) == [("system", "Be brief."), ("user", PROMPT)]
    assert (contents(pair.chosen), contents(pair.rejected)) == (
        [("assistant", GOOD)],
        [("assistant", BAD)],
    )


def test_system_beside_the_plain_names_is_not_lost():
    rows = [{"system": "Be brief.", "prompt": p, "chosen": c, "rejected": r} for p, c, r in FACTS]
    found = detect(rows)
    assert found.layout.name == "axolotl"
    assert found.layout.convert(rows[0]).prompt[0] == Message(Role.SYSTEM, "Be brief.")


def test_answers_that_do_not_repeat_the_prompt_in_h4():
    pair = convert("h4_ultrafeedback", row_of("h4_ultrafeedback", chosen=[bot(GOOD)],
                                              rejected=[bot(BAD)], score_chosen=None))  # fmt: skip
    assert contents(pair.prompt) == [("user", PROMPT)]
    assert pair.margin is None


def test_ratings_with_underscores():
    row = row_of("argilla_cleaned")
    row = {name.replace("-", "_"): value for name, value in row.items()}
    assert convert("argilla_cleaned", row).margin == 2.5


def test_question_as_text_in_webgpt():
    assert convert("webgpt", row_of("webgpt", question=PROMPT)).prompt[0].content == PROMPT


def test_ratings_are_averaged_where_there_is_no_score():
    row = row_of("ultrafeedback_raw")
    for item, value in zip(row["completions"], (3, 1, 5), strict=True):
        del item["fine-grained_score"]
        item["annotations"] = ratings(value) | {"honesty": {"Rating": str(value + 1)}}
    scores = [answer.score for answer in convert("ultrafeedback_raw", row).answers]
    assert scores == [3.25, 1.25, 5.25]
    row["completions"][1]["annotations"]["honesty"]["Rating"] = "N/A"
    with pytest.raises(RowFault, match="not a number") as caught:
        convert("ultrafeedback_raw", row)
    assert caught.value.pointer == "/completions/1/annotations/honesty/Rating"


def test_arena_contents_as_lists_of_parts():
    row = arena(0, PROMPT, GOOD, BAD, content=lambda text: [{"type": "text", "text": text}])
    pair = convert("arena", row)
    assert (pair.prompt[0].content, pair.chosen[0].content) == (PROMPT, GOOD)


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)"])
def test_arena_ties(winner):
    assert convert("arena", row_of("arena", winner=winner)).tie


def test_later_turns_of_arena_need_equal_earlier_answers():
    row = arena(0, PROMPT, GOOD, BAD)
    for side in ("a", "b"):
        row[f"conversation_{side}"] += [user("Sure?"), bot(f"Yes, says {side}.")]
    with pytest.raises(RowFault, match="part before the last turn"):
        convert("arena", row)
    row["conversation_b"][1] = row["conversation_a"][1]
    assert len(convert("arena", row).prompt) == 3


def test_kaggle_cells_with_several_turns():
    row = kaggle(0, PROMPT, GOOD, BAD)
    row |= {
        "prompt": '["a", "b"]',
        "response_a": '["same", "first"]',
        "response_b": '["same", "second"]',
    }
    pair = convert("arena_kaggle", row)
    assert [m.content for m in pair.prompt] == ["a", "same", "b"]
    for cell, match in (
        ('["one"]', "1 turns and `prompt` 2"),
        ('["one", null]', "null, expected a JSON list"),
        ('["one", " "]', "an empty turn"),
        ("one", "no JSON list"),
    ):
        with pytest.raises(RowFault, match=match):
            convert("arena_kaggle", {**row, "response_b": cell})
    with pytest.raises(RowFault, match="not exactly one"):
        convert("arena_kaggle", {**row, "winner_tie": 1})


def test_nectar_with_earlier_turns_and_plain_prompts():
    text = transcript("Hi", "Hello") + "\n\nHuman: And now?\n\nAssistant:"
    prompt = convert("nectar", row_of("nectar", prompt=text)).prompt
    assert [m.content for m in prompt] == ["Hi", "Hello", "And now?"]
    assert convert("nectar", row_of("nectar", prompt=PROMPT)).prompt[0].content == PROMPT


def test_alpaca_input_and_history():
    row = row_of("llama_factory_alpaca", input="In one word.", history=[["Hi", "Hello"]])
    prompt = convert("llama_factory_alpaca", row).prompt
    assert [m.content for m in prompt] == ["Hi", "Hello", f"{PROMPT}\nIn one word."]


def test_sharegpt_tools():
    row = row_of("llama_factory_sharegpt")
    row["conversations"] += [
        {"from": "function_call", "value": '{"name": "look"}'},
        {"from": "observation", "value": "blue"},
    ]
    roles = [m.role.value for m in convert("llama_factory_sharegpt", row).prompt]
    assert roles == ["user", "assistant", "tool"]
    row["chosen"]["from"] = "robot"
    with pytest.raises(RowFault, match="`from` is not one of human"):
        convert("llama_factory_sharegpt", row)


@pytest.mark.parametrize("other", [[bot(BAD)], [user(PROMPT), bot(BAD)]])
@pytest.mark.parametrize("name", ["rejected_response", "rejected_messages"])
def test_rejected_messages_of_ms_swift(name, other):
    pair = convert("ms_swift", {"messages": [user(PROMPT), bot(GOOD)], name: other})
    assert contents(pair.rejected) == [("assistant", BAD)]


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [user(PROMPT), bot(GOOD)], "kto_tag": True}],
        [
            {
                "conversations": [{"from": "human", "value": PROMPT},
                                  {"from": "gpt", "value": GOOD}],
                "kto_tag": True,
            }
        ],
    ],
)  # fmt: skip
def test_kto_tag_beside_conversations(rows):
    [answer] = convert("kto_llama_factory", rows[0]).answers
    assert (contents(answer.messages), answer.score) == ([("assistant", GOOD)], 1.0)


def test_kto_with_messages():
    row = {"prompt": [user(PROMPT)], "completion": [bot(GOOD)], "label": False}
    assert convert("kto", row).answers[0].score == 0.0


@pytest.mark.parametrize(("name", "field"), [("kto", "label"), ("kto_llama_factory", "kto_tag"),
                                             ("kto_ms_swift", "label")])  # fmt: skip
def test_labels_as_numbers(name, field):
    for value in (1, 0, 1.0):
        [answer] = convert(name, row_of(name, **{field: value})).answers
        assert answer.score == value


def test_summaries_of_articles():
    row = row_of("summarize_from_feedback", info={"id": "1", "article": "News.", "title": "T"},
                 extra={})  # fmt: skip
    pair = convert("summarize_from_feedback", row)
    assert pair.prompt[0].content == "TITLE: T\n\nARTICLE: News.\n\nTL;DR:"
    assert pair.margin is None


@pytest.mark.parametrize("name", ["anthropic_hh", "trl_conversational", "trl_standard_implicit"])
def test_misspelled_columns_of_other_layouts(name):
    rows = [
        {("choosen" if field == "chosen" else field): value for field, value in row.items()}
        for row in FIXTURES[name]
    ]
    found = detect(rows)
    assert found.layout.name == "misspelled"
    pair, plain = (
        found.layout.convert(rows[0]),
        BY_NAME[LayoutName(name)].convert(FIXTURES[name][0]),
    )
    assert (pair.prompt, pair.chosen, pair.rejected) == (plain.prompt, plain.chosen, plain.rejected)


@pytest.mark.parametrize("name", ["misspelled", "messages_chosen_rejected"])
def test_odd_forms_are_read_with_a_warning(run, lines, name):
    outcome = run(lines(FIXTURES[name]), min_pairs=5)
    assert outcome.result.status == "ready_with_warnings"
    assert outcome.lint("layout")["level"] == "warn"


@pytest.mark.parametrize(
    ("name", "fields", "pointer"),
    [
        ("shp", {"labels": 2}, "/labels"),
        ("shp", {"labels": True}, "/labels"),
        ("shp", {"score_ratio": 0}, "/score_ratio"),
        ("helpsteer3", {"overall_preference": None}, "/overall_preference"),
        ("arena", {"winner": "nobody"}, "/winner"),
        ("pku_saferlhf", {"better_response_id": -1}, "/better_response_id"),
        ("summarize_from_feedback", {"choice": 2}, "/choice"),
        ("summarize_from_feedback", {"summaries": [{"text": "one"}]}, "/summaries"),
        ("summarize_from_feedback", {"info": {"title": "x"}}, "/info/article"),
        ("nectar", {"answers": [{"answer": "x", "rank": "1"}]}, "/answers/0/rank"),
        ("nemo_rl", {"completions": [{"rank": 0}]}, "/completions/0/completion"),
        ("nemo_rl", {"completions": ["x"]}, "/completions/0"),
        ("kto", {"label": 2}, "/label"),
        ("kto", {"label": "true"}, "/label"),
        ("kto_ms_swift", {"messages": [user("Hi")]}, "/messages"),
        ("helpsteer2", {"helpfulness": "4"}, "/helpfulness"),
        ("openai", {"input": []}, "/input"),
        ("openai", {"input": {"messages": []}}, "/input/messages"),
        ("llama_factory_alpaca", {"history": [["x"]]}, "/history/0"),
        ("webgpt", {"question": {}}, "/question/full_text"),
    ],
)
def test_faults_have_a_pointer(name, fields, pointer):
    with pytest.raises(RowFault) as caught:
        BY_NAME[LayoutName(name)].convert(row_of(name, **fields))
    assert caught.value.pointer == pointer


def test_no_layout_claims_the_rows_of_another():
    for name, rows in FIXTURES.items():
        choice = choose(rows, DatasetPolicy())
        assert choice.layout.name == name
        assert choice.mapping() == choice.layout.mapping
