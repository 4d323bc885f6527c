"""A sample that is drawn before anything is tokenised, and one that is drawn after."""

from pathlib import Path

import pytest

from core.errors import InvalidInput
from selection.profile import sampled_rows
from tests.integration.training_world import TINY_LM
from worker.ingest.canonical import (
    CanonicalRow,
    Message,
    Pair,
    Role,
    Split,
    canonical_row,
    read_canonical,
    to_line,
)
from worker.ingest.row_index import read_rows, row_places
from worker.training import sample as sample_module
from worker.training.sample import Sample, draw_sample
from worker.training.tokenize import TokenizedPair, load_tokenizer, tokenize_rows

LENGTH = 48
ROWS = 240


def row(number: int, prompt: str, chosen: str, rejected: str, split: Split) -> CanonicalRow:
    pair = Pair(
        prompt=(Message(Role.USER, prompt),), chosen=(Message(Role.ASSISTANT, chosen),),
        rejected=(Message(Role.ASSISTANT, rejected),), margin=None, source="t", meta={},
    )  # fmt: skip
    return canonical_row(pair, line=number, split=split)


def rows() -> list[CanonicalRow]:
    """Prompts of one to four pairs; of each third pair nothing is left within `LENGTH` tokens."""
    made = []
    for number in range(ROWS):
        same = "the same from the first word to the last but one " * 8 if number % 3 == 0 else ""
        split = Split.VALIDATION if number % 7 == 0 else Split.TRAIN
        prompt = f"Tell {number * number % 97} about it {split.value}."
        made.append(row(number + 1, prompt, f"{same}Yes {number}", f"{same}No {number}", split))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "canonical.jsonl"
    file.write_bytes(b"".join(map(to_line, rows())))
    return file


def drawn(path: Path, *, limit: int, seed: int = 0) -> Sample:
    return draw_sample(
        path, Split.TRAIN, limit=limit, seed=seed, tokenizer=load_tokenizer(TINY_LM),
        max_length=LENGTH,
    )  # fmt: skip


def whole(path: Path) -> tuple[TokenizedPair, ...]:
    tokenizer = load_tokenizer(TINY_LM)
    return tokenize_rows(
        read_canonical(path, Split.TRAIN), tokenizer=tokenizer, max_length=LENGTH
    ).pairs


@pytest.mark.parametrize("limit", [1, 9, 50, 100, ROWS])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_sample_of_the_tokenised_split_and_full(
    path: Path, limit: int, seed: int
) -> None:
    every = whole(path)
    found = drawn(path, limit=limit, seed=seed)
    rows = sampled_rows([pair.group_id for pair in every], limit=limit, seed=seed)
    assert found.split.pairs == tuple(every[number] for number in rows.tolist())
    assert [kept.id for kept in found.rows] == [pair.id for pair in found.split.pairs]
    assert found.seen == len(found.split.pairs) + found.split.dropped_identical
    of = list(read_canonical(path, Split.TRAIN))
    assert (found.of_pairs, found.of_prompts) == (len(of), len({r.group_id for r in of}))
    if 9 <= limit < len(every):
        assert limit - 4 < len(found.split.pairs) <= limit


def test_little_more_than_the_sample_is_tokenised(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(*args: object) -> list[CanonicalRow]:
        found = read_rows(*args)  # type: ignore[arg-type]
        read.append(len(found))
        return found

    monkeypatch.setattr(sample_module, "read_rows", counted)
    found = drawn(path, limit=60)
    assert found.seen < sum(read) <= found.seen + 20 < len(whole(path))


def test_rows_are_read_where_they_are(path: Path) -> None:
    places = row_places(path, Split.VALIDATION)
    every = list(read_canonical(path, Split.VALIDATION))
    assert read_rows(path, places[::-1]) == every[::-1]
    assert [place.group_id for place in places] == [r.group_id for r in every]


def test_a_damaged_line_is_named(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"split": "train"}\n', *lines[5:]]))
    with pytest.raises(InvalidInput, match="line 5 of the canonical file is damaged"):
        row_places(path, Split.TRAIN)
    path.write_bytes(b"".join(lines))
    places = row_places(path, Split.TRAIN)
    path.write_bytes(b"".join([*lines[:4], lines[4].replace(b'"chosen"', b'"chozen"'), *lines[5:]]))
    with pytest.raises(InvalidInput, match="line 5 of the canonical file is damaged"):
        read_rows(path, places)
