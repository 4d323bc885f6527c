"""The pairs of a split that a recommendation measures, drawn before anything is tokenised."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from selection.profile import prompt_order
from worker.ingest.canonical import CanonicalRow, Split
from worker.ingest.row_index import RowPlace, read_rows, row_places
from worker.training.tokenize import (
    BATCH_ROWS,
    EncodedRow,
    TokenizedSplit,
    cut_rows,
    encoded,
)

# No more than this of pairs are tokenised in vain where a sample ends.
_LEAST_ROWS = 16

_Prompt = list[tuple[RowPlace, CanonicalRow, EncodedRow]]


@dataclass(frozen=True)
class Sample:
    """Pairs drawn from `of_pairs` of `of_prompts` prompts: their rows, and what is left of them.

    `seen` rows were looked at: those of the pairs, and those passed over as of no use.
    """

    rows: tuple[CanonicalRow, ...]
    split: TokenizedSplit
    seen: int
    of_pairs: int
    of_prompts: int


def draw_sample(
    path: Path,
    split: Split,
    *,
    limit: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_row: Callable[[CanonicalRow, EncodedRow], None] | None = None,
) -> Sample:
    """Draw whole prompts of a split that have up to `limit` usable pairs, in file order.

    Prompts are taken in `prompt_order` until the next one would pass the limit; a pair that
    `tokenize_rows` would drop does not count, and a prompt with no other is passed over. So the
    sample is `sampled_rows` of the tokenised split, at the cost of tokenising little more than it.
    `on_row` gets the rows that were looked at, as `tokenize_rows` gives them.

    Raises:
        InvalidInput: the file is damaged.
        RunAborted: the template refuses a conversation (`dataset_invalid`), naming the row.
    """
    places: dict[str, list[RowPlace]] = defaultdict(list)
    for place in row_places(path, split):
        places[place.group_id].append(place)
    bos = tokenizer.bos_token_id
    seen: _Prompt = []
    pairs = prompts = 0
    for prompt in _in_order(path, places, limit=limit, seed=seed, tokenizer=tokenizer):
        usable = sum(whole.is_usable(max_length, bos=bos) for _, _, whole in prompt)
        if usable and prompts >= 2 and pairs + usable > limit:
            break
        seen += prompt
        pairs += usable
        prompts += usable > 0
    seen.sort(key=lambda item: item[0].start)
    found = cut_rows(
        ((row, whole) for _, row, whole in seen), max_length=max_length, bos=bos, on_row=on_row
    )
    kept = {pair.id for pair in found.pairs}
    return Sample(
        rows=tuple(row for _, row, _ in seen if row.id in kept),
        split=found,
        seen=len(seen),
        of_pairs=sum(map(len, places.values())),
        of_prompts=len(places),
    )


def _in_order(
    path: Path,
    places: dict[str, list[RowPlace]],
    *,
    limit: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[_Prompt]:
    """Yield the encoded rows of one prompt after another, a batch of prompts being read ahead."""
    order = prompt_order(places, seed=seed)
    read = start = 0
    while start < len(order):
        wanted = min(BATCH_ROWS, max(_LEAST_ROWS, limit - read))
        batch: list[list[RowPlace]] = []
        while start < len(order) and sum(map(len, batch)) < wanted:
            batch.append(places[order[start]])
            start += 1
        flat = list(chain.from_iterable(batch))
        read += len(flat)
        rows = zip(flat, encoded(read_rows(path, flat), tokenizer), strict=True)
        for prompt in batch:
            yield [(place, row, whole) for place, (row, whole) in islice(rows, len(prompt))]
