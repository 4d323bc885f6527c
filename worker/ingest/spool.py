"""Pairs and answers on disk until all of them are known.

Duplicates, contradictions and the order of prompts need a look at all pairs. Their hashes go to
files by the first bits of the prompt's place in the split, so that one file at a time is looked at:
memory holds one byte for each pair, and one of 32 parts of the hashes.
"""

import struct
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import orjson

from worker.ingest.canonical import (
    Answer,
    Answers,
    CanonicalRow,
    Message,
    digest,
    from_line,
    messages_from,
    to_line,
)
from worker.ingest.split import rank

_PAIR_PARTS = 32
_ANSWER_PARTS = 64
# Hash of the pair and of the pair turned round, rank of its prompt, number, margin, tie.
_RECORD = struct.Struct("<16s16s16sQd?")
_NO_MARGIN = float("-inf")


class Mark(IntEnum):
    """What became of a pair when all were known."""

    KEPT = 0
    CONFLICT = 1
    DUPLICATE = 2
    OVER_LIMIT = 3


@dataclass(frozen=True)
class _Record:
    key: bytes
    turned: bytes
    rank: bytes
    number: int
    margin: float
    tie: bool

    @property
    def comparison(self) -> bytes:
        """The same for both orders of a tie."""
        return min(self.key, self.turned) if self.tie else self.key


class TemporaryFiles:
    """Temporary files without names, closed together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def file(self) -> BinaryIO:
        """Return a new file."""
        return self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))


class PairSpool(TemporaryFiles):
    """Pairs in the order in which they were found, marked when all are known."""

    def __init__(self, folder: Path, *, seed: int, max_pairs_per_prompt: int | None) -> None:
        super().__init__(folder)
        self._seed = seed
        self._cap = max_pairs_per_prompt
        self._lines = self.file()
        self._parts = [self.file() for _ in range(_PAIR_PARTS)]
        self._prompts = [0] * _PAIR_PARTS
        self._marks = bytearray()
        self._size_bytes = 0

    def add(self, row: CanonicalRow, *, tie: bool) -> None:
        """Add one pair."""
        place = rank(row.group_id, seed=self._seed)
        self._parts[place[0] * _PAIR_PARTS >> 8].write(
            _RECORD.pack(
                bytes.fromhex(row.id),
                digest(row.prompt, row.rejected, row.chosen)[:16],
                place,
                len(self._marks),
                _NO_MARGIN if row.margin is None else row.margin,
                tie,
            )
        )
        self._marks.append(Mark.KEPT)
        self._size_bytes += self._lines.write(to_line(row))

    def settle(self) -> None:
        """Mark duplicates, pairs beyond the limit of a prompt, and contradictions.

        The first of equal pairs stays. Beyond the limit those with the largest margins stay, of
        equal ones those with the lowest hashes; both orders of a tie count as one. A pair
        contradicts when an earlier one that stays has the same answers the other way round; the two
        orders of a tie do not.
        """
        for part in range(_PAIR_PARTS):
            by_prompt: dict[bytes, dict[bytes, _Record]] = defaultdict(dict)
            for record in self._records(part):
                pairs = by_prompt[record.rank]
                if record.key in pairs:
                    self._marks[record.number] = Mark.DUPLICATE
                else:
                    pairs[record.key] = record
            self._prompts[part] = len(by_prompt)
            for pairs in by_prompt.values():
                self._settle_prompt(pairs)

    def _settle_prompt(self, pairs: dict[bytes, _Record]) -> None:
        if self._cap is not None and len(pairs) > self._cap:
            kept: set[bytes] = set()
            for record in sorted(pairs.values(), key=lambda r: (-r.margin, r.comparison)):
                if record.comparison in kept or len(kept) < self._cap:
                    kept.add(record.comparison)
                else:
                    self._marks[record.number] = Mark.OVER_LIMIT
                    del pairs[record.key]
        for record in pairs.values():
            other = pairs.get(record.turned)
            if (
                other is not None
                and other.number < record.number
                and not (record.tie and other.tie)
            ):
                self._marks[record.number] = Mark.CONFLICT

    def _records(self, part: int) -> Iterator[_Record]:
        file = self._parts[part]
        file.seek(0)
        for values in _RECORD.iter_unpack(file.read()):
            yield _Record(*values)

    def count(self, *marks: Mark) -> int:
        """How many pairs have one of these marks."""
        return sum(self._marks.count(mark) for mark in marks)

    @property
    def size_bytes(self) -> int:
        """Length of the rows of all pairs."""
        return self._size_bytes

    @property
    def prompts(self) -> int:
        """How many prompts there are; known after `settle`."""
        return sum(self._prompts)

    def rank_at(self, place: int) -> bytes:
        """Return the rank of the prompt at a place of their order, from 0."""
        for part, prompts in enumerate(self._prompts):
            if place < prompts:
                return sorted({record.rank for record in self._records(part)})[place]
            place -= prompts
        raise IndexError(f"there are {self.prompts} prompts")

    def __iter__(self) -> Iterator[tuple[CanonicalRow, Mark]]:
        self._lines.seek(0)
        for line, mark in zip(self._lines, self._marks, strict=True):
            yield from_line(line), Mark(mark)


class AnswerSpool(TemporaryFiles):
    """Single answers, until all answers to their prompts are known."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._parts: list[BinaryIO] = []
        self.count = 0

    def add(self, group: Answers) -> None:
        """Add the answers of one row."""
        if not self._parts:
            self._parts = [self.file() for _ in range(_ANSWER_PARTS)]
        part = digest(group.prompt)[0] * _ANSWER_PARTS >> 8
        self._parts[part].write(orjson.dumps(group, option=orjson.OPT_APPEND_NEWLINE))
        self.count += 1

    def groups(self) -> Iterator[Answers]:
        """Yield all answers to one prompt, for each prompt, in an order that its hash decides."""
        for file in self._parts:
            file.seek(0)
            groups: dict[tuple[Message, ...], list[Answers]] = defaultdict(list)
            for line in file:
                row = _answers(line)
                groups[row.prompt].append(row)
            for rows in groups.values():
                yield joined(rows)


def joined(rows: list[Answers]) -> Answers:
    """Return the answers of several rows to the same prompt as one group."""
    first = rows[0]
    return Answers(
        prompt=first.prompt,
        answers=tuple(answer for row in rows for answer in row.answers),
        source=first.source,
        meta=first.meta,
    )


def _answers(line: bytes) -> Answers:
    data = orjson.loads(line)
    return Answers(
        prompt=messages_from(data["prompt"]),
        answers=tuple(
            Answer(messages_from(item["messages"]), item["score"], item["line"])
            for item in data["answers"]
        ),
        source=data["source"],
        meta=data["meta"],
    )
