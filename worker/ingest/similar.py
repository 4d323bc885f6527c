"""Held-out prompts whose wording is nearly that of a prompt in another split: MinHash.

Each prompt becomes 64 minima of hashes of its pieces of five characters, in one pass over the text
(one permutation hashing, Li, Owen & Zhang 2012; empty bins by rotation, Shrivastava & Li 2014); the
share of equal minima estimates the Jaccard similarity of the pieces (Broder 1997). Prompts that
agree in one of eight bands of four minima are compared: 98.5 % of those with similarity 0.8.
"""

import os
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from worker.ingest.canonical import CanonicalRow, Split

SIMILAR = 0.8
MOST_PROMPTS = 1_000_000
_PIECE = 5
_BINS, _BANDS = 64, 8
_AT_ONCE = 1 << 16  # characters, or prompts
_SPLITS = tuple(Split)
_ABOUT = np.dtype([("group", "<u8"), ("line", "<u8"), ("split", "u1")])
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                     0x27D4EB2F165667C5, 0x85EBCA77C2B2AE63], np.uint64)  # fmt: skip
_EMPTY = np.uint64(2**64 - 1)

Words = NDArray[np.uint64]


@dataclass
class Similar:
    """How many held-out prompts were compared, how many have a near twin, and first lines."""

    compared: int = 0
    prompts: int = 0
    lines: list[int] = field(default_factory=list)
    complete: bool = True


def signature(text: str) -> NDArray[np.uint16]:
    """The minima of a text's pieces, (64,); a text shorter than a piece is one."""
    codes = np.frombuffer(text.ljust(_PIECE).encode("utf-32-le", "surrogatepass"), "<u4")
    least = np.full(_BINS, _EMPTY)
    for start in range(0, codes.size - _PIECE + 1, _AT_ONCE):
        part = codes[start : start + _AT_ONCE + _PIECE - 1].astype(np.uint64)
        size = part.size - _PIECE + 1
        mixed = np.zeros(size, np.uint64)
        for place, factor in enumerate(_FACTORS):
            mixed = (mixed ^ (part[place : place + size] * factor)) * _FACTORS[0]
            mixed ^= mixed >> np.uint64(29)
        np.minimum.at(least, mixed >> np.uint64(58), mixed & np.uint64(2**58 - 1))
    filled, bins = np.flatnonzero(least != _EMPTY), np.arange(_BINS)
    nearest = filled[np.searchsorted(filled, bins) % filled.size]
    least = least[nearest] + ((nearest - bins) % _BINS).astype(np.uint64) * _FACTORS[1]
    minima: NDArray[np.uint16] = least.astype(np.uint16)
    return minima


class SimilarIndex:
    """Collects signatures of prompts in two files: 145 bytes each, of a million at most."""

    def __init__(self, signatures: BinaryIO, about: BinaryIO) -> None:
        self._signatures, self._about = signatures, about
        self._number, self._last, self._complete = 0, b"", True

    def add(self, row: CanonicalRow, text: str) -> None:
        """Add the prompt of a pair, `text` without punctuation; runs of one prompt add it once."""
        group = bytes.fromhex(row.group_id)[:8]
        if group == self._last:
            return
        if self._number >= MOST_PROMPTS:
            self._complete = False
            return
        self._last, self._number = group, self._number + 1
        self._signatures.write(signature(text).tobytes())
        about = (int.from_bytes(group, "little"), row.line, _SPLITS.index(row.split))
        self._about.write(np.array(about, _ABOUT).tobytes())

    def similar(self, *, keep: int) -> Similar:
        """Count the held-out prompts with a near twin in another split; keep so many lines."""
        self._signatures.flush()
        self._about.seek(0)
        about = np.frombuffer(self._about.read(), _ABOUT)
        held_out = about["split"] != _SPLITS.index(Split.TRAIN)
        found = np.zeros(about.size, bool)
        if held_out.any():
            for band in range(_BANDS):
                self._compare(band, about["split"], held_out, found)
        groups, first = np.unique(about["group"][found], return_index=True)
        lines = np.sort(about["line"][found][first])[:keep].tolist()
        compared = np.unique(about["group"][held_out]).size
        return Similar(compared, groups.size, lines, self._complete)

    def _compare(
        self, band: int, splits: NDArray[np.uint8], held_out: NDArray[np.bool_],
        found: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        """Mark held-out prompts that are like one beside them, in the order of a band's minima."""
        keys, after = self._column(band), self._column((band + 1) % _BANDS)
        order = np.lexsort((after, keys))
        keys, place = keys[order], np.arange(order.size)
        for split in range(len(_SPLITS)):
            there = splits[order] == split
            before = np.maximum.accumulate(np.where(there, place, -1))
            behind = np.minimum.accumulate(np.where(there, place, place.size)[::-1])[::-1]
            asks = held_out[order] & ~there
            for other in (before, behind):
                near = asks & (other >= 0) & (other < place.size) & ~found[order]
                at = place[near]
                at = at[keys[at] == keys[other[at]]]
                for start in range(0, at.size, _AT_ONCE):
                    some = at[start : start + _AT_ONCE]
                    alike = self._rows(order[some]) == self._rows(order[other[some]])
                    found[order[some[alike.mean(axis=1) >= SIMILAR]]] = True

    def _column(self, band: int) -> Words:
        """The four minima of a band as one number, of all prompts."""
        parts = [np.zeros(0, np.uint64)]
        self._signatures.seek(0)
        while block := self._signatures.read(2 * _BINS * _AT_ONCE):
            parts.append(np.frombuffer(block, np.uint64).reshape(-1, _BINS // 4)[:, band])
        return np.concatenate(parts)

    def _rows(self, numbers: NDArray[np.int64]) -> NDArray[np.uint16]:
        handle, size = self._signatures.fileno(), 2 * _BINS
        rows = b"".join(os.pread(handle, size, size * number) for number in numbers.tolist())
        return np.frombuffer(rows, np.uint16).reshape(-1, _BINS)
