"""What a model's tokenizer makes of the pairs: counts, what truncation cuts, what the model sees.

Needs a tokenizer and no weights. Jobs that tokenise anyway collect on the way (`TokenLook`);
validation draws pairs (`TokenSample`).
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from core.data_report import (
    Part,
    PreviewPair,
    Refusals,
    Rendered,
    Segment,
    TokenReport,
    TokenStatistics,
    Truncation,
)
from core.errors import RunAborted
from core.settings import MIB
from worker.ingest.canonical import CanonicalRow
from worker.ingest.preview import canonical_preview
from worker.ingest.rows import JsonObject
from worker.training.tokenize import (
    BATCH_ROWS,
    EncodedRow,
    RenderedRow,
    encode_rendered,
    render_row,
)

# Share of the pairs that may lose tokens without a warning.
TRUNCATION_LIMIT = 0.05
# Above either, validation tokenises a sample: that many pairs, or that much text, on average.
SAMPLE_PAIRS = 5000
SAMPLE_BYTES = 32 * MIB
_FIRST = 3
_TRUNCATED = 2
_LINES = 20
_HALF_SHOWN = 1000
_ID_DIGITS = 15


@dataclass(frozen=True)
class Limit:
    """The longest sequence of a job: its `max_length`, or the model's positions if fewer."""

    max_length: int
    positions: int | None

    @property
    def tokens(self) -> int:
        """Tokens that fit."""
        return min(self.max_length, self.positions or self.max_length)

    @property
    def is_of_model(self) -> bool:
        """Whether it is the model that sets it."""
        return self.tokens < self.max_length


class TokenLook:
    """Counts the tokens of pairs as they come; memory holds three numbers for each and 5 pairs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, limit: Limit) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._limit = limit
        self._lengths = {part: array("I") for part in ("prompt", "chosen", "rejected")}
        self._lines: list[int] = []
        self._truncated = self._prompts = self._responses = self._dropped = 0
        self._first: list[tuple[CanonicalRow, EncodedRow]] = []
        self._cut: list[tuple[CanonicalRow, EncodedRow]] = []

    @property
    def measured(self) -> int:
        """Pairs that were counted."""
        return len(self._lengths["prompt"])

    def see(self, row: CanonicalRow, whole: EncodedRow) -> None:
        """Count one pair."""
        left = whole.fitted(self._limit.tokens, bos=self._tokenizer.bos_token_id)
        for part, ids in (
            ("prompt", whole.prompt), ("chosen", whole.chosen), ("rejected", whole.rejected),
        ):  # fmt: skip
            self._lengths[part].append(len(ids))
        prompts = len(left.prompt) < len(whole.prompt)
        responses = (len(left.chosen) < len(whole.chosen)) + (
            len(left.rejected) < len(whole.rejected)
        )
        dropped = whole.is_empty or left.chosen == left.rejected
        self._prompts += prompts
        self._responses += responses
        self._dropped += dropped
        self._truncated += bool(prompts or responses)
        if (prompts or responses or dropped) and len(self._lines) < _LINES:
            self._lines.append(row.line)
        if not self.show(row, whole) and (prompts or responses) and len(self._cut) < _TRUNCATED:
            self._cut.append((row, whole))

    def show(self, row: CanonicalRow, whole: EncodedRow) -> bool:
        """Keep one of the first pairs for the preview; say whether it is one."""
        if len(self._first) < _FIRST and all(row.id != kept.id for kept, _ in self._first):
            self._first.append((row, whole))
        return any(row.id == kept.id for kept, _ in self._first)

    def report(
        self,
        *,
        pairs: int,
        rule: str,
        refusals: Refusals | None = None,
        raw: Mapping[int, JsonObject] | None = None,
    ) -> TokenReport:
        """Return the report; needs a counted pair.

        `pairs` is the number that the counted ones stand for, `rule` says how they were drawn,
        `raw` has rows of the upload by their lines.
        """
        shown = [("first", *pair) for pair in self._first]
        shown += [("truncated", *pair) for pair in self._cut]
        return TokenReport(
            tokens=self._statistics(pairs=pairs, rule=rule),
            truncation=self._truncation(),
            refusals=refusals,
            preview=tuple(
                PreviewPair(
                    why=why,
                    raw=(raw or {}).get(row.line),
                    canonical=canonical_preview(row),
                    rendered=self._rendered(whole),
                )
                for why, row, whole in shown
            ),
        )

    def _statistics(self, *, pairs: int, rule: str) -> TokenStatistics:
        measured = self.measured
        assert measured, "a report needs a pair"
        prompts = sorted(self._lengths["prompt"])
        answers = sorted(self._lengths["chosen"] + self._lengths["rejected"])
        total = sum(prompts) + sum(answers)
        return TokenStatistics(
            tokenizer=self._name,
            pairs=pairs,
            measured_pairs=measured,
            rule=rule,
            total=round(total * pairs / measured) if measured < pairs else total,
            is_estimate=measured < pairs,
            prompt_p50=nearest_rank(prompts, 0.5),
            prompt_p95=nearest_rank(prompts, 0.95),
            prompt_max=prompts[-1],
            completion_p50=nearest_rank(answers, 0.5),
            completion_p95=nearest_rank(answers, 0.95),
            completion_max=answers[-1],
            max=max(
                prompt + max(sides)
                for prompt, *sides in zip(*self._lengths.values(), strict=True)
            ),
        )  # fmt: skip

    def _truncation(self) -> Truncation:
        of, at = self.measured, self._limit.tokens
        share = self._truncated / of
        detail = f"every pair fits into {at} tokens"
        if self._truncated:
            detail = (
                f"{self._prompts} prompts lose their beginning and {self._responses} answers their "
                f"end to fit into {at} tokens"
            )
        if self._dropped:
            detail += f"; {self._dropped} pairs cannot be trained on: what is left of an answer is "
            detail += "empty or the same as of the other"
        return Truncation(
            level="warn" if share > TRUNCATION_LIMIT or self._dropped else "ok",
            value=round(share, 6),
            threshold=TRUNCATION_LIMIT,
            at=at,
            at_is="model" if self._limit.is_of_model else "max_length",
            count=self._truncated,
            of=of,
            prompts=self._prompts,
            responses=self._responses,
            dropped=self._dropped,
            detail=detail,
            lines=tuple(self._lines),
        )

    def _rendered(self, whole: EncodedRow) -> Rendered:
        bos = self._tokenizer.bos_token_id
        left = whole.fitted(self._limit.tokens, bos=bos)
        pieces: list[tuple[Part, bool, list[int]]] = []
        cut = len(whole.prompt) - len(left.prompt)
        # A leading BOS stays in front of what is cut.
        head = int(cut > 0 and len(left.prompt) > 1 and whole.prompt[0] == bos)
        pieces.append(("prompt", True, whole.prompt[:head]))
        pieces.append(("prompt", False, whole.prompt[head : head + cut]))
        pieces.append(("prompt", True, whole.prompt[head + cut :]))
        pieces.append(("chosen", True, left.chosen))
        pieces.append(("chosen", False, whole.chosen[len(left.chosen) :]))
        pieces.append(("rejected", True, left.rejected))
        pieces.append(("rejected", False, whole.rejected[len(left.rejected) :]))
        pieces = [piece for piece in pieces if piece[2]]
        texts = [self._text(ids) for _, _, ids in pieces]
        ends = list(accumulate(len(text) for text, _ in texts))
        return Rendered(
            text="".join(text for text, _ in texts),
            segments=tuple(
                Segment(
                    part=part, kept=kept, start=end - len(text), end=end, tokens=len(ids),
                    shortened=shortened,
                )
                for (part, kept, ids), (text, shortened), end in zip(
                    pieces, texts, ends, strict=True
                )
            ),
        )  # fmt: skip

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        if len(text) <= 2 * _HALF_SHOWN:
            return text, False
        return f"{text[:_HALF_SHOWN]}…{text[-_HALF_SHOWN:]}", True


class TokenSample:
    """Tokenises a share of the pairs that validation passes by, and the first for the preview.

    All of them up to 5,000 pairs and 32 MiB of rows; above, each with the same probability, by its
    id, so that this much is drawn on average. The same pairs are drawn whatever their order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, limit: Limit) -> None:
        self._tokenizer = tokenizer
        self._look = TokenLook(tokenizer, name=name, limit=limit)
        self._pairs = 0
        self._share = 1.0
        self._seen = 0
        self._refused: list[tuple[int, str]] = []
        self._num_refused = self._drawn = 0
        self._waiting: list[tuple[CanonicalRow, RenderedRow, bool]] = []

    def begin(self, *, pairs: int, size_bytes: int) -> None:
        """Say how many pairs will pass by, and how long their rows are together."""
        self._pairs = pairs
        self._share = min(1.0, SAMPLE_PAIRS / max(pairs, 1), SAMPLE_BYTES / max(size_bytes, 1))

    def see(self, row: CanonicalRow) -> None:
        """Take a pair, or let it pass."""
        self._seen += 1
        is_drawn = int(row.id[:_ID_DIGITS], 16) < self._share * 16**_ID_DIGITS
        if not is_drawn and self._seen > _FIRST:
            return
        self._drawn += is_drawn
        try:
            texts = render_row(row, self._tokenizer)
        except RunAborted as error:
            self._num_refused += is_drawn
            if is_drawn and len(self._refused) < _LINES:
                self._refused.append((row.line, error.message))
            return
        self._waiting.append((row, texts, is_drawn))
        if len(self._waiting) >= BATCH_ROWS:
            self._encode()

    def _encode(self) -> None:
        """Count the pairs that wait: the tokenizer gets many texts at once."""
        encoded = encode_rendered([texts for _, texts, _ in self._waiting], self._tokenizer)
        for (row, _, is_drawn), whole in zip(self._waiting, encoded, strict=True):
            self._look.show(row, whole)
            if is_drawn:
                self._look.see(row, whole)
        self._waiting.clear()

    def report(self, raw: Mapping[int, JsonObject]) -> TokenReport | None:
        """Return the report, or None when no pair could be tokenised."""
        if self._waiting:
            self._encode()
        if not self._look.measured:
            return None
        return self._look.report(
            pairs=self._pairs, rule=self._rule(), refusals=self.refusals(), raw=raw
        )

    def refusals(self) -> Refusals | None:
        """Return what the chat template has refused, if anything."""
        if not self._num_refused:
            return None
        return Refusals(
            count=self._num_refused,
            of=self._drawn,
            detail=self._refused[0][1],
            lines=tuple(line for line, _ in self._refused),
        )

    def _rule(self) -> str:
        if self._share >= 1.0:
            return "all pairs"
        return (
            f"each pair with probability {self._share:.4g}, by its id: about {SAMPLE_PAIRS} pairs "
            f"or {SAMPLE_BYTES // MIB} MiB of rows"
        )


def nearest_rank(ordered: Sequence[int], share: float) -> int:
    """Return the smallest value with at least that share of all at or below it; not of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
