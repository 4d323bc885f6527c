"""Which answers are compared, which comparisons are kept, and options that would be ignored."""

import itertools

import pytest
from pydantic import ValidationError

from core.errors import Category
from core.run_spec import DatasetPolicy
from tests.unit.worker.ingest.layout_fixtures import FACTS, FIXTURES, bot, nectar, user
from worker.ingest import pairing
from worker.ingest.canonical import Answer, Answers, Message, Role
from worker.ingest.pairing import Rules, pairs_of

LIMITS = {"min_pairs": 3, "min_prompts": 3}


def texts(row):
    return row.prompt[-1].content, row.chosen[-1].content, row.rejected[-1].content


def group(*scores):
    prompt = (Message(Role.USER, "q"),)
    answers = tuple(
        Answer((Message(Role.ASSISTANT, f"a{n}"),), score, line=n + 1)
        for n, score in enumerate(scores)
    )
    return Answers(prompt, answers, source="s", meta={})


def rules(can_tie=True, has_margin=True, seed=0, **options):
    return Rules.of(DatasetPolicy(**options), has_margin=has_margin, can_tie=can_tie, seed=seed)


def names(kept):
    return [(p.chosen[0].content, p.rejected[0].content, p.margin) for p, _ in kept.pairs]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("best_worst", [("a1", "a0", 4.0)]),
        ("adjacent", [("a1", "a2", 1.0), ("a2", "a3", 2.0), ("a3", "a0", 1.0)]),
        (
            "all",
            [
                ("a1", "a2", 1.0),
                ("a1", "a3", 3.0),
                ("a1", "a0", 4.0),
                ("a2", "a3", 2.0),
                ("a2", "a0", 3.0),
                ("a3", "a0", 1.0),
            ],
        ),
    ],
)
def test_pairing(asked, expected):
    assert names(pairs_of(group(1.0, 5.0, 4.0, 2.0), rules(pairing=asked))) == expected


def test_random_pairing_is_a_draw_that_the_seed_decides():
    answers = group(*range(6))
    drawn = {
        seed: names(pairs_of(answers, rules(pairing="random", seed=seed))) for seed in range(40)
    }
    assert all(len(pairs) == 1 for pairs in drawn.values())
    assert len({pairs[0][:2] for pairs in drawn.values()}) > 8
    assert drawn[3] == names(pairs_of(answers, rules(pairing="random", seed=3)))
    more = names(pairs_of(answers, rules(pairing="random", max_pairs_per_prompt=4, seed=3)))
    assert len({pair[:2] for pair in more}) == 4
    assert more[0] == drawn[3][0]


def test_ties_and_margins():
    answers = group(2.0, 2.0, 1.0)
    dropped = pairs_of(answers, rules(pairing="all"))
    assert len(dropped.pairs) == 2
    assert dropped.left_out.ties == 1
    for on_tie, weight in (("keep_half", 0.5), ("both", 1.0)):
        kept = pairs_of(answers, rules(pairing="all", on_tie=on_tie)).pairs
        ties = [pair for pair, _ in kept if pair.tie]
        assert [(p.chosen[0].content, p.rejected[0].content) for p in ties] == [
            ("a0", "a1"),
            ("a1", "a0"),
        ]
        assert [p.weight for p in ties] == [weight] * 2
        assert [p.weight for p, _ in kept if not p.tie] == [1.0] * 2
    none = pairs_of(answers, rules(pairing="all", min_margin=1.5))
    assert (none.pairs, none.left_out.below_margin, none.left_out.ties) == ([], 2, 1)


def test_equal_labels_and_equal_texts_are_not_compared():
    labels = rules(can_tie=False, has_margin=False, pairing="all")
    kept = pairs_of(group(1.0, 1.0, 0.0), labels)
    assert names(kept) == [("a0", "a2", None), ("a1", "a2", None)]
    assert not pairs_of(group(1.0, 1.0), rules(can_tie=False)).pairs
    assert not pairs_of(group(1.0), rules()).pairs
    prompt, (answer, *_) = group(1.0).prompt, group(1.0).answers
    twin = Answers(prompt, (answer, Answer(answer.messages, 0.0)), source="s", meta={})
    assert pairs_of(twin, rules()).left_out.identical == 1


def test_too_many_comparisons_of_one_prompt(run, lines, monkeypatch):
    monkeypatch.setattr(pairing, "_MAX_COMPARISONS", 2)
    policy = DatasetPolicy(pairing="all")
    failure = run(lines(FIXTURES["nectar"]), policy=policy, **LIMITS).result.failure
    assert (failure.code, failure.category) == ("too_many_comparisons", Category.TOO_LARGE)
    assert "3 answers, which is 3 comparisons" in failure.message


def test_ranked_lists_by_policy(run, lines):
    best = run(lines(FIXTURES["nectar"]), **LIMITS)
    assert best.result.num_pairs == 5
    every = run(lines(FIXTURES["nectar"]), policy=DatasetPolicy(pairing="all"), **LIMITS)
    assert every.result.num_pairs == 15
    assert {row.margin for row in every.rows} == {1.0, 2.0}
    capped = DatasetPolicy(pairing="all", max_pairs_per_prompt=1)
    outcome = run(lines(FIXTURES["nectar"]), policy=capped, **LIMITS)
    assert [texts(r) for r in outcome.rows] == [texts(r) for r in best.rows]
    assert outcome.report["counts"]["over_limit"] == 10
    strong = run(
        lines(FIXTURES["nectar"]), policy=DatasetPolicy(pairing="all", min_margin=2.0), **LIMITS
    )
    assert strong.result.num_pairs == 5
    assert strong.report["counts"]["below_margin"] == 10


def test_ties_of_rows_by_policy(run, lines):
    rows = [dict(row) for row in FIXTURES["arena"]]
    rows[1]["winner"] = "tie"
    rows[2]["winner"] = "tie (bothbad)"
    dropped = run(lines(rows), **LIMITS)
    counts = dropped.report["counts"]
    assert (counts["pairs"], counts["ties_dropped"], counts["without_pair"]) == (3, 2, 2)
    assert counts["rows"] == counts["converted"] + counts["without_pair"]
    for on_tie, weight in (("keep_half", 0.5), ("both", 1.0)):
        kept = run(lines(rows), policy=DatasetPolicy(on_tie=on_tie), **LIMITS)
        assert kept.result.num_pairs == 7
        assert [row.weight for row in kept.rows if row.line in (2, 3)] == [weight] * 4
        assert kept.lint("label_conflict")["count"] == 0
        ties = [texts(row) for row in kept.rows if row.line == 2]
        assert sorted(ties) == sorted({(p, *sides) for p, c, r in [FACTS[1]]
                                       for sides in ((c, r), (r, c))})  # fmt: skip


def test_neighbours_are_one_group_until_the_prompt_changes(run, lines):
    rows = FIXTURES["helpsteer2"]
    middle = {**rows[0], "response": "Between.", "helpfulness": 2}
    outcome = run(
        lines([rows[0], middle, *rows[1:]]), policy=DatasetPolicy(pairing="all"), **LIMITS
    )
    assert outcome.result.num_pairs == 4 + 3
    apart = run(lines([*rows[::2], *rows[1::2]]), **LIMITS)
    counts = apart.report["counts"]
    assert apart.result.failure.code == "too_few_pairs"
    assert "10 rows are answers without a counterpart" in apart.result.failure.message
    assert (counts["unpaired"], counts["without_pair"], counts["converted"]) == (10, 10, 0)


def test_labelled_answers_are_paired_wherever_they_are(run, lines):
    rows = [
        {"prompt": p, "completion": f"{p} {label} {n}", "label": label}
        for label, (p, _, _), n in itertools.product((True, False), FACTS, range(2))
    ]
    alone = {"prompt": "Nobody else asks.", "completion": "Yes.", "label": True}
    outcome = run(lines([*rows, alone]), policy=DatasetPolicy(pairing="all"), **LIMITS)
    assert outcome.result.num_pairs == 4 * len(FACTS)
    assert all(" True " in c and " False " in r for _, c, r in map(texts, outcome.rows))
    assert all(row.margin is None and row.line <= 10 for row in outcome.rows)
    counts = outcome.report["counts"]
    assert (counts["converted"], counts["unpaired"]) == (20, 1)
    shuffled = run(lines([alone, *reversed(rows)]), policy=DatasetPolicy(pairing="all"), **LIMITS)
    assert {row.id for row in shuffled.rows} == {row.id for row in outcome.rows}
    one = run(lines(rows), **LIMITS)
    assert one.result.num_pairs == len(FACTS)


def test_pairs_of_a_prompt_are_limited_in_every_layout(run, lines):
    rows = [
        {"prompt": p, "chosen": f"{c} {n}", "rejected": r, "margin": n}
        for n in range(4)
        for p, c, r in FACTS
    ]
    outcome = run(lines(rows), policy=DatasetPolicy(max_pairs_per_prompt=2), **LIMITS)
    assert sorted(row.margin for row in outcome.rows) == [2.0] * 5 + [3.0] * 5
    counts = outcome.report["counts"]
    assert (counts["pairs"], counts["over_limit"], counts["converted"]) == (10, 10, 20)


def test_both_orders_of_a_tie_count_as_one(run, lines):
    rows = [
        {**nectar(p, c, r), "answers": [{"answer": f"{c} {n}", "rank": 1} for n in range(4)]}
        for p, c, r in FACTS
    ]
    policy = DatasetPolicy(pairing="all", on_tie="both", max_pairs_per_prompt=2)
    outcome = run(lines(rows), policy=policy, **LIMITS)
    assert outcome.result.num_pairs == 2 * 2 * len(FACTS)
    sides = {texts(row) for row in outcome.rows}
    assert {(p, r, c) for p, c, r in sides} == sides


def test_verdict_of_safety(run, lines):
    better = run(lines(FIXTURES["pku_saferlhf"]), **LIMITS)
    policy = DatasetPolicy(target="safer")
    safer = run(lines(FIXTURES["pku_saferlhf"]), policy=policy, **LIMITS)
    assert [(p, r, c) for p, c, r in map(texts, safer.rows)] == [texts(r) for r in better.rows]
    assert safer.report["ignored_fields"]["better_response_id"] == 5


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("trl_standard", {"pairing": "all"}, "pairing 'all' would be ignored"),
        ("trl_standard", {"on_tie": "drop"}, "on_tie 'drop' would be ignored"),
        ("trl_standard", {"target": "safer"}, "target 'safer' would be ignored"),
        ("stack_exchange", {"min_margin": 0.5}, "min_margin 0.5 would be ignored"),
        ("arena", {"pairing": "random"}, "its rows are pairs already"),
        ("kto", {"pairing": "adjacent"}, "good or bad and have no order"),
        ("kto", {"min_margin": 1.0}, "it has no margins"),
    ],
)
def test_options_that_would_be_ignored_are_refused(run, lines, name, options, match):
    outcome = run(lines(FIXTURES[name]), policy=DatasetPolicy(**options), **LIMITS)
    failure = outcome.result.failure
    assert (outcome.result.status, failure.code) == ("invalid", "option_ignored")
    assert match in failure.message
    assert f"layout `{name}`" in failure.message
    assert failure.hint.startswith(f"drop {next(iter(options))}; it is for ")
    assert outcome.report["complete"] is False


def test_options_that_exclude_each_other():
    with pytest.raises(ValidationError, match="min_margin leaves out all ties"):
        DatasetPolicy(min_margin=1.0, on_tie="both")
    with pytest.raises(ValidationError, match="takes a for more than one field"):
        DatasetPolicy(column_mapping={"prompt": "a", "chosen": "a"})
    with pytest.raises(ValidationError, match="trl_standard"):
        DatasetPolicy(layout="nonsense")


ODD = [{"frage": p, "gut": c, "schlecht": r, "x": 1} for p, c, r in FACTS]
MAPPING = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}


def test_mapped_columns_give_the_pairs_of_the_plain_ones(run, lines):
    outcome = run(lines(ODD), policy=DatasetPolicy(column_mapping=MAPPING), **LIMITS)
    plain = run(lines(FIXTURES["trl_standard"]), **LIMITS)
    assert [row.id for row in outcome.rows] == [row.id for row in plain.rows]
    assert outcome.report["detected"]["layout"] == "trl_standard"
    assert outcome.report["mapping"] == MAPPING
    assert outcome.report["ignored_fields"] == {"x": 5}


def test_mapping_with_a_layout_and_faults_in_columns_of_the_file(run, lines):
    rows = [
        {"q": p, "answer": a, "ok": ok} for p, c, r in FACTS for a, ok in ((c, 1 > 0), (r, 1 < 0))
    ]
    mapping = {"prompt": "q", "completion": "answer", "label": "ok"}
    policy = DatasetPolicy(layout="kto", column_mapping=mapping, max_invalid_fraction=0.5)
    bad = {"q": "?", "answer": " ", "ok": True}
    outcome = run(lines([*rows, bad]), policy=policy, **LIMITS)
    assert outcome.result.num_pairs == 5
    assert outcome.rejected == [
        {
            "line": 11,
            "code": "empty_text",
            "pointer": "/11/answer",
            "detail": "`completion` is empty",
            "row": bad,
        }
    ]


def test_a_named_layout_overrides_the_detected_one(run, lines):
    policy = DatasetPolicy(layout="trl_standard_implicit")
    outcome = run(lines(FIXTURES["anthropic_hh"]), policy=policy, **LIMITS)
    assert outcome.report["detected"]["layout"] == "trl_standard_implicit"
    assert outcome.report["detected"]["alternatives"] == [
        {"layout": "anthropic_hh", "confidence": 1.0}
    ]
    assert outcome.result.num_pairs == 5


@pytest.mark.parametrize(
    ("rows", "options", "code", "parts"),
    [
        (
            FIXTURES["trl_standard"],
            {"layout": "helpsteer3"},
            "unusable_layout",
            (
                "layout `helpsteer3`",
                "received `prompt`, `chosen`, `rejected`",
                "expected `context`",
            ),
        ),
        (
            ODD,
            {"column_mapping": {"prompt": "question"}},
            "unusable_mapping",
            ("names `question`, which none of the first 5 rows has", "they have `frage`, `gut`"),
        ),
        (
            ODD,
            {"column_mapping": {"prompt": "frage"}},
            "unusable_mapping",
            ("after column_mapping", "expected for example `prompt`, `chosen`, `rejected`"),
        ),
        (
            ODD,
            {"column_mapping": {**MAPPING, "category": "x"}},
            "unusable_mapping",
            ("names `category`, which layout `trl_standard` does not read",),
        ),
    ],
)
def test_unusable_mappings_are_refused(run, lines, rows, options, code, parts):
    outcome = run(lines(rows), policy=DatasetPolicy(**options), **LIMITS)
    failure = outcome.result.failure
    assert (failure.code, outcome.result.status) == (code, "invalid")
    assert failure.hint
    for part in parts:
        assert part in failure.message


def test_policy_refusals_do_not_depend_on_leading_junk(run, lines):
    junk = b"not json\n" * 150
    policy = DatasetPolicy(layout="nectar", pairing="all", max_invalid_fraction=0.99)
    rows = [nectar(f"{p} {n}", c, r) for n in range(10) for p, c, r in FACTS]
    outcome = run(junk + lines(rows), policy=policy, **LIMITS)
    assert outcome.result.num_pairs == 150
    failure = run(junk + lines(FIXTURES["trl_standard"]), policy=policy, **LIMITS).result.failure
    assert failure.code == "unusable_layout"


def test_messages_as_implicit_and_explicit_prompts_agree(run, lines):
    explicit = [
        {"prompt": [user("Hi"), bot("Hello"), user(p)], "chosen": [bot(c)], "rejected": [bot(r)]}
        for p, c, r in FACTS
    ]
    implicit = [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in explicit
    ]
    ids = [[row.id for row in run(lines(rows), **LIMITS).rows] for rows in (explicit, implicit)]
    assert ids[0] == ids[1]
