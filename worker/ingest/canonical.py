"""The canonical row: the one form of a preference pair that everything after ingest reads."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import orjson

from core.errors import InvalidInput
from worker.ingest.rows import JsonObject


class Role(StrEnum):
    """Who speaks in a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Split(StrEnum):
    """What a pair is used for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt; of a tie the order of the two says nothing.

    `ignored` names fields of the row that were not used.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float | None
    source: str
    meta: JsonObject
    ignored: tuple[str, ...] = ()
    tie: bool = False
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; a higher score is better, in units of the source. `line` is its row's."""

    messages: tuple[Message, ...]
    score: float
    line: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """Scored answers to one prompt: all of them, or those of one row of a group."""

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    source: str
    meta: JsonObject
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CanonicalRow:
    """One preference pair.

    `prompt` is never empty and ends with user or tool; `chosen` and `rejected` begin and end with
    assistant. `id` is the hash of the pair, `group_id` that of the prompt (both SHA-256, hex, `id`
    cut to 32 digits): all pairs of a group lie in one split. `margin` is how much better chosen is,
    in the units of the source. `line` is the row's line in the upload, from 1.
    """

    id: str
    line: int
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float | None
    weight: float
    group_id: str
    source: str
    meta: JsonObject
    split: Split


def digest(*parts: tuple[Message, ...]) -> bytes:
    """Return the SHA-256 of the turns; the parts are kept apart, their order matters."""
    return hashlib.sha256(orjson.dumps(parts)).digest()


def canonical_row(pair: Pair, *, line: int, split: Split) -> CanonicalRow:
    """Return the canonical row of a pair."""
    return CanonicalRow(
        id=digest(pair.prompt, pair.chosen, pair.rejected).hex()[:32],
        line=line,
        prompt=pair.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        margin=pair.margin,
        weight=pair.weight,
        group_id=digest(pair.prompt).hex(),
        source=pair.source,
        meta=pair.meta,
        split=split,
    )


def to_line(row: CanonicalRow) -> bytes:
    """Return the row as one line of JSON; the same row gives the same bytes."""
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def from_line(line: bytes) -> CanonicalRow:
    """Return the row that `to_line` wrote.

    Raises:
        ValueError, KeyError, TypeError: the line was not written by `to_line`.
    """
    data = orjson.loads(line)
    return CanonicalRow(
        **{
            **data,
            **{name: messages_from(data[name]) for name in ("prompt", "chosen", "rejected")},
            "split": Split(data["split"]),
        }
    )


def messages_from(data: list[dict[str, str]]) -> tuple[Message, ...]:
    """Return the turns that were written as JSON."""
    return tuple(Message(Role(item["role"]), item["content"]) for item in data)


def read_canonical(path: Path, split: str | None = None) -> Iterator[CanonicalRow]:
    """Iterate over the rows of a canonical file, of one split or of all, in file order.

    Raises:
        InvalidInput: `split` is unknown, or the file is damaged (code `canonical_damaged`).
    """
    if split is not None and split not in set(Split):
        raise InvalidInput(
            f"received split {split!r}, expected one of {', '.join(Split)}", param="split"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = from_line(line)
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInput(
                    f"line {number} of the canonical file is damaged",
                    code="canonical_damaged",
                    hint="ingest the upload again",
                ) from error
            if split is None or row.split == split:
                yield row
