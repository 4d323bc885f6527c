"""Prompts that are nearly the same text, and the splits they lie in."""

import hashlib
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from worker.ingest.canonical import CanonicalRow, Split
from worker.ingest.similar import Similar, SimilarIndex
from worker.ingest.spool import TemporaryFiles

_PARTS = 32
# Hash of the prompt's letters and digits, hash of the prompt, its split, its line.
_RECORD = struct.Struct("<16s16sBQ")
_SPLITS = tuple(Split)
# Operators stay: 2+2 is not 2-2.
_PASSED_OVER = re.compile(r"[\s.,;:!?'\"`´’‘“”…。，！？、]+")


@dataclass
class Overlap:
    """How many prompts have a near twin, how many of those in another split, and first lines.

    A near twin differs in case, white space and punctuation only; `similar` is of wording.
    """

    prompts: int = 0
    across: int = 0
    lines: list[int] = field(default_factory=list)
    lines_across: list[int] = field(default_factory=list)
    similar: Similar = field(default_factory=Similar)


class PromptIndex(TemporaryFiles):
    """Collects prompts on disk; looks at one of 32 parts of them at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._parts = [self.file() for _ in range(_PARTS)]
        self._similar = SimilarIndex(self.file(), self.file())

    def add(self, row: CanonicalRow) -> None:
        """Add the prompt of a pair; one that was added is not counted again."""
        text = "\x00".join(message.content for message in row.prompt)
        text = _PASSED_OVER.sub(" ", text.casefold()).strip()
        key = hashlib.sha256(text.encode()).digest()[:16]
        self._parts[key[0] * _PARTS >> 8].write(
            _RECORD.pack(key, bytes.fromhex(row.group_id)[:16], _SPLITS.index(row.split), row.line)
        )
        self._similar.add(row, text)

    def overlap(self, *, keep: int) -> Overlap:
        """Count the prompts with a near twin; keep so many lines."""
        found = Overlap(similar=self._similar.similar(keep=keep))
        for part in range(_PARTS):
            for prompts in self._families(part):
                splits = {split for split, _ in prompts.values()}
                lines = [line for _, line in prompts.values()]
                found.prompts += len(prompts)
                found.lines += lines
                if len(splits) > 1:
                    found.across += len(prompts)
                    found.lines_across += lines
            # The lowest lines of all parts so far: memory stays bounded.
            found.lines = sorted(found.lines)[:keep]
            found.lines_across = sorted(found.lines_across)[:keep]
        return found

    def _families(self, part: int) -> Iterator[dict[bytes, tuple[int, int]]]:
        """Yield split and first line of the prompts that are near twins of each other."""
        file = self._parts[part]
        file.seek(0)
        families: dict[bytes, dict[bytes, tuple[int, int]]] = defaultdict(dict)
        for key, prompt, split, line in _RECORD.iter_unpack(file.read()):
            families[key].setdefault(prompt, (split, line))
        yield from (prompts for prompts in families.values() if len(prompts) > 1)
