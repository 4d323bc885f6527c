"""Prompts of nearly the same wording across splits: what is found, and what is not."""

import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from core.settings import DataLimits
from worker.ingest import similar
from worker.ingest.canonical import CanonicalRow, Message, Pair, Role, Split, canonical_row
from worker.ingest.lint import EVAL_SIMILAR_LIMIT, lint
from worker.ingest.overlap import Overlap, PromptIndex
from worker.ingest.similar import signature
from worker.ingest.tally import Tally


def row(prompt: str, *, split: Split = Split.TRAIN, line: int = 1) -> CanonicalRow:
    pair = Pair(
        prompt=(Message(Role.USER, prompt),), chosen=(Message(Role.ASSISTANT, "yes"),),
        rejected=(Message(Role.ASSISTANT, "no"),), margin=None, source="s", meta={},
    )  # fmt: skip
    return canonical_row(pair, line=line, split=split)


def pieces(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(len(text) - 4)}


def jaccard(first: str, second: str) -> float:
    a, b = pieces(first), pieces(second)
    return len(a & b) / len(a | b)


def found_in(tmp_path, rows, keep: int = 10**6) -> similar.Similar:
    with PromptIndex(tmp_path) as index:
        for each in rows:
            index.add(each)
        return index.overlap(keep=keep).similar


def sentences(rng: random.Random, number: int) -> Iterator[tuple[str, str]]:
    """Texts, and the same with some words replaced."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(4000)]
    for _ in range(number):
        text = rng.choices(words, k=rng.choice([8, 15, 40, 120]))
        other = list(text)
        for _ in range(rng.choice([1, 1, 2, 4, 20])):
            other[rng.randrange(len(other))] = rng.choice(words)
        yield " ".join(text), " ".join(other)


def test_near_wording_is_found_and_other_wording_is_not(tmp_path):
    rows, true = [], {}
    for number, (text, other) in enumerate(sentences(random.Random(0), 1500)):
        line = 2 * number + 2
        rows += [row(text, line=line - 1), row(other, line=line, split=Split.VALIDATION)]
        true[line] = jaccard(text, other)
    lines = set(found_in(tmp_path, rows).lines)
    sure = [line for line, value in true.items() if value >= 0.87]
    far = [line for line, value in true.items() if value <= 0.65]
    assert min(len(sure), len(far)) > 200
    assert np.mean([line in lines for line in sure]) >= 0.97
    assert np.mean([line in lines for line in far]) <= 0.01
    assert np.mean([true[line] >= 0.7 for line in lines]) >= 0.99


def test_estimates_are_those_of_the_pieces():
    for text, other in sentences(random.Random(1), 100):
        estimate = float(np.mean(signature(text) == signature(other)))
        assert estimate == pytest.approx(jaccard(text, other), abs=0.25)


def test_a_long_text_is_the_same_in_parts(monkeypatch):
    text = " ".join(text for text, _ in sentences(random.Random(2), 40))
    whole = signature(text)
    monkeypatch.setattr(similar, "_AT_ONCE", 7)
    assert (signature(text) == whole).all()


def test_only_held_out_prompts_near_another_split_count(tmp_path):
    text = "Tell me in a few words how a heat pump warms a house in a cold winter"
    train, twin = row(text, line=1), row(text + " night", line=2)
    held = row(text + " day", line=3, split=Split.TEST)
    other = row("Wholly different words about a boat", line=4, split=Split.TEST)
    found = found_in(tmp_path, [train, twin, other])
    assert (found.compared, found.prompts, found.lines) == (1, 0, [])
    found = found_in(tmp_path, [train, twin, held, held, other, held])
    assert (found.compared, found.prompts, found.lines) == (2, 1, [3])
    both = [row(text, line=1, split=Split.VALIDATION), row(text + " day", line=2, split=Split.TEST)]
    assert found_in(tmp_path, both).lines == [1, 2]
    assert found_in(tmp_path, []).compared == 0


@pytest.mark.parametrize("text", ["", "a", "ü 中", "\ud800"])
def test_the_shortest_text_has_a_signature(text: str):
    assert signature(text).shape == (64,)
    assert (signature(text) == signature(text)).all()


def test_prompts_beyond_the_limit_are_not_compared_and_the_report_says_so(tmp_path, monkeypatch):
    text = "Why does the sea look blue on a bright day and grey on a dull one"
    rows = [row(text, line=1), row("Another prompt", line=2),
            row(text + " now", line=3, split=Split.TEST)]  # fmt: skip
    assert found_in(tmp_path, rows).complete
    monkeypatch.setattr(similar, "MOST_PROMPTS", 2)
    found = found_in(tmp_path, rows)
    assert (found.complete, found.prompts) == (False, 0)


@pytest.mark.parametrize(("prompts", "level"), [(0, "ok"), (1, "ok"), (2, "warn")])
def test_more_than_one_in_a_hundred_is_a_warning(prompts: int, level: str):
    found = similar.Similar(compared=100, prompts=prompts, lines=[1, 2][:prompts])
    check = next(
        c
        for c in lint(Tally(DataLimits(), overlap=Overlap(similar=found)))
        if c["check"] == "eval_similar"
    )
    assert (check["level"], check["count"], check["of"]) == (level, prompts, 100)
    assert check["threshold"] == EVAL_SIMILAR_LIMIT


def test_memory_does_not_grow_with_the_text(tmp_path):
    rng = random.Random(3)

    def peak(number: int) -> int:
        rows = (row(f"{rng.random()} of {i} " * 20, line=i) for i in range(number))
        with PromptIndex(tmp_path) as index:
            tracemalloc.start()
            for each in rows:
                index.add(each)
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return most

    small = peak(300)
    assert peak(3000) < small + 200_000
