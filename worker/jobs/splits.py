"""The pairs of a job: a split, tokenised whole or as far as a recommendation measures it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from core.data_report import TokenReport
from core.errors import FailureCode, RunAborted
from worker.ingest.canonical import CanonicalRow, Split, read_canonical
from worker.training.sample import draw_sample
from worker.training.token_report import Limit, TokenLook
from worker.training.tokenize import TokenizedPair, TokenizedSplit, tokenize_rows


@dataclass(frozen=True)
class LoadedSplit:
    """Pairs and their rows; `of_pairs` and `of_prompts` are those of the whole split.

    `rule` says which of them these are, `warnings` what was cut and dropped.
    """

    pairs: tuple[TokenizedPair, ...]
    rows: tuple[CanonicalRow, ...]
    of_pairs: int
    of_prompts: int
    rule: str
    look: TokenLook
    warnings: tuple[str, ...]

    def report(self) -> TokenReport:
        """What the tokenizer makes of the pairs."""
        return self.look.report(pairs=self.of_pairs, rule=self.rule)


@dataclass(frozen=True)
class SplitLoader:
    """Reads and tokenises splits of one canonical file for one model, called `name`."""

    path: Path
    tokenizer: PreTrainedTokenizerBase
    name: str
    limit: Limit

    def whole(self, split: Split) -> LoadedSplit:
        """Load all of a split.

        Raises:
            RunAborted: nothing of it is left (`dataset_invalid`).
        """
        look = TokenLook(self.tokenizer, name=self.name, limit=self.limit)
        rows = list(read_canonical(self.path, split))
        found = tokenize_rows(
            rows, tokenizer=self.tokenizer, max_length=self.limit.tokens, on_row=look.see
        )
        kept = {pair.id for pair in found.pairs}
        return LoadedSplit(
            pairs=_some(found, split),
            rows=tuple(row for row in rows if row.id in kept),
            of_pairs=len(rows),
            of_prompts=len({row.group_id for row in rows}),
            rule=f"all pairs of the {_named(split)} split",
            look=look,
            warnings=tuple(f"{split.value}: {sentence}" for sentence in found.warnings()),
        )

    def sample(self, split: Split, *, limit: int, seed: int) -> LoadedSplit:
        """Load what `draw_sample` draws of a split, and little more.

        Raises:
            RunAborted: nothing of it is left (`dataset_invalid`).
        """
        look = TokenLook(self.tokenizer, name=self.name, limit=self.limit)
        drawn = draw_sample(
            self.path, split, limit=limit, seed=seed, tokenizer=self.tokenizer,
            max_length=self.limit.tokens, on_row=look.see,
        )  # fmt: skip
        is_whole = drawn.seen == drawn.of_pairs
        of = "" if is_whole else f", {drawn.seen} of {drawn.of_pairs} pairs"
        return LoadedSplit(
            pairs=_some(drawn.split, split),
            rows=drawn.rows,
            of_pairs=drawn.of_pairs,
            of_prompts=drawn.of_prompts,
            rule=f"all pairs of the {_named(split)} split" if is_whole else (
                f"prompts of the {_named(split)} split in an order drawn from seed {seed}, with "
                f"all their pairs, up to {limit} usable pairs"
            ),
            look=look,
            warnings=tuple(f"{split.value}{of}: {told}" for told in drawn.split.warnings()),
        )  # fmt: skip


def _named(split: Split) -> str:
    return "training" if split is Split.TRAIN else split.value


def _some(found: TokenizedSplit, split: Split) -> tuple[TokenizedPair, ...]:
    if not found.pairs:
        raise RunAborted(
            f"the {split.value} split has no pair that this model can use",
            failure=FailureCode.DATASET_INVALID,
            hint="; ".join(found.warnings()) or "upload more data",
        )
    return found.pairs
