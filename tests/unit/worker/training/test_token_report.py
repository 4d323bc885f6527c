"""What the tokenizer sees: counts, what truncation cuts, the text with its boundaries."""

from tests.integration.training_world import TINY_LM
from worker.ingest.canonical import CanonicalRow, Message, Pair, Role, Split, canonical_row
from worker.training.token_report import Limit, TokenLook, TokenSample, nearest_rank
from worker.training.tokenize import encode_row, load_tokenizer, tokenize_rows


def row(number: int, prompt: str, chosen: str, rejected: str) -> CanonicalRow:
    pair = Pair(
        prompt=(Message(Role.USER, prompt),), chosen=(Message(Role.ASSISTANT, chosen),),
        rejected=(Message(Role.ASSISTANT, rejected),), margin=None, source="t", meta={},
    )  # fmt: skip
    return canonical_row(pair, line=number, split=Split.TRAIN)


def rows(count: int) -> list[CanonicalRow]:
    return [row(n, f"What is {n}?", f"It is {n}.", f"Not {n}, I think.") for n in range(1, count)]


def test_counts_are_those_of_the_encoded_rows() -> None:
    tokenizer = load_tokenizer(TINY_LM)
    look = TokenLook(tokenizer, name="tiny-lm", limit=Limit(512, None))
    data = rows(12)
    split = tokenize_rows(data, tokenizer=tokenizer, max_length=512, on_row=look.see)
    report = look.report(pairs=look.measured, rule="all")
    answers = sorted(len(ids) for p in split.pairs for ids in (p.chosen, p.rejected))
    prompts = [len(p.prompt) for p in split.pairs]
    assert report.tokens.total == sum(answers) + sum(prompts)
    assert report.tokens.max == max(p.length for p in split.pairs)
    assert report.tokens.completion_p50 == answers[10]
    assert (report.truncation.level, report.truncation.count) == ("ok", 0)
    for shown, pair in zip(report.preview, split.pairs, strict=False):
        assert shown.rendered is not None
        text, parts = shown.rendered.text, shown.rendered.segments
        assert [part.part for part in parts] == ["prompt", "chosen", "rejected"]
        assert text[parts[0].start : parts[0].end] == tokenizer.decode(list(pair.prompt))
        assert text[parts[2].start : parts[2].end] == tokenizer.decode(list(pair.rejected))


def test_what_is_cut_is_marked_where_it_is() -> None:
    tokenizer = load_tokenizer(TINY_LM)
    limit = Limit(1024, 64)
    look = TokenLook(tokenizer, name="tiny-lm", limit=limit)
    long = row(7, "one two three four five six seven " * 20, "yes " * 80, "no")
    for item in (*rows(5), long):
        look.see(item, encode_row(item, tokenizer))
    report = look.report(pairs=5, rule="all")
    found = report.truncation
    assert (found.level, found.at, found.at_is, found.value) == ("warn", 64, "model", 0.2)
    assert (found.prompts, found.responses, found.lines) == (1, 1, (7,))
    shown = report.preview[-1]
    assert shown.why == "truncated"
    assert shown.rendered is not None
    kept = [s.tokens for s in shown.rendered.segments if s.kept and s.part in ("prompt", "chosen")]
    assert sum(kept) == 64
    cut = [(s.part, s.kept) for s in shown.rendered.segments]
    assert cut == [
        ("prompt", False), ("prompt", True), ("chosen", True), ("chosen", False),
        ("rejected", True),
    ]  # fmt: skip


def test_a_sample_is_drawn_by_id_and_stands_for_all() -> None:
    tokenizer = load_tokenizer(TINY_LM)
    data = rows(301)
    found = []
    for order in (data, data[::-1]):
        sample = TokenSample(tokenizer, name="tiny-lm", limit=Limit(512, None))
        sample.begin(pairs=50_000, size_bytes=1000)
        for item in order:
            sample.see(item)
        report = sample.report({})
        assert report is not None
        found.append(report.tokens)
    assert found[0] == found[1]
    assert 10 <= found[0].measured_pairs <= 60
    assert found[0].is_estimate
    assert "probability 0.1" in found[0].rule


def test_conversations_that_the_template_refuses_are_counted() -> None:
    tokenizer = load_tokenizer(TINY_LM)
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    sample = TokenSample(tokenizer, name="tiny-lm", limit=Limit(512, None))
    sample.begin(pairs=4, size_bytes=100)
    for item in rows(5):
        sample.see(item)
    refusals = sample.refusals()
    assert sample.report({}) is None
    assert refusals is not None
    assert (refusals.count, refusals.of, refusals.lines) == (4, 4, (1, 2, 3, 4))
    assert "no users" in refusals.detail


def test_percentiles_are_nearest_rank() -> None:
    assert [nearest_rank([1, 2, 3, 4], share) for share in (0.5, 0.95)] == [2, 4]
    assert nearest_rank([5], 0.5) == 5
