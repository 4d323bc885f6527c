"""From scored answers to pairs, and which of the pairs are kept, by the policy."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Literal, assert_never

from core.errors import TooLarge
from core.run_spec import ComparisonPolicy
from worker.ingest.canonical import Answer, Answers, Pair, digest
from worker.ingest.checks import same_turns

# Of 450 answers; more comparisons of one prompt would drown all others.
_MAX_COMPARISONS = 100_000

Comparison = tuple[Answer, Answer]


@dataclass(frozen=True)
class Rules:
    """The policy as it holds for one layout."""

    has_margin: bool
    can_tie: bool
    seed: int
    on_tie: Literal["drop", "keep_half", "both"]
    pairing: Literal["best_worst", "adjacent", "all", "random"]
    max_pairs_per_prompt: int | None
    min_margin: float | None

    @classmethod
    def of(cls, policy: ComparisonPolicy, *, has_margin: bool, can_tie: bool, seed: int) -> "Rules":
        """Return the rules of a policy, its defaults filled in."""
        return cls(
            has_margin=has_margin,
            can_tie=can_tie,
            seed=seed,
            on_tie=policy.on_tie or "drop",
            pairing=policy.pairing or "best_worst",
            max_pairs_per_prompt=policy.max_pairs_per_prompt,
            min_margin=policy.min_margin,
        )


@dataclass
class LeftOut:
    """Comparisons that gave no pair, by reason."""

    ties: int = 0
    below_margin: int = 0
    identical: int = 0

    def __iadd__(self, other: "LeftOut") -> "LeftOut":
        self.ties += other.ties
        self.below_margin += other.below_margin
        self.identical += other.identical
        return self


@dataclass
class Kept:
    """The pairs of one row or one group, each with the lines of its two sides."""

    pairs: list[tuple[Pair, tuple[int, int]]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def lines(self) -> set[int]:
        """Lines of all answers that are in a pair."""
        return {line for _, lines in self.pairs for line in lines}


def keep(pair: Pair, rules: Rules, *, lines: tuple[int, int], into: Kept) -> None:
    """Add what the rules make of one comparison: nothing, the pair, or both its orders."""
    if pair.tie:
        match rules.on_tie:
            case "drop":
                into.left_out.ties += 1
                return
            case "keep_half":
                weight = 0.5
            case "both":
                weight = 1.0
            case _:
                assert_never(rules.on_tie)
        first = replace(pair, weight=weight)
        second = replace(first, chosen=pair.rejected, rejected=pair.chosen)
        into.pairs += [(first, lines), (second, lines[::-1])]
        return
    if rules.min_margin is not None and (pair.margin is None or pair.margin < rules.min_margin):
        into.left_out.below_margin += 1
        return
    into.pairs.append((pair, lines))


def pairs_of(group: Answers, rules: Rules) -> Kept:
    """Return the pairs of all answers to one prompt.

    Answers with equal scores are a tie where the layout knows ties, else not compared. Answers with
    equal texts are not compared.

    Raises:
        TooLarge: `too_many_comparisons`.
    """
    kept = Kept()
    for better, worse in _compared(group, rules):
        if same_turns(better.messages, worse.messages):
            kept.left_out.identical += 1
            continue
        pair = Pair(
            prompt=group.prompt,
            chosen=better.messages,
            rejected=worse.messages,
            margin=better.score - worse.score if rules.has_margin else None,
            source=group.source,
            meta=group.meta,
            ignored=(),
            tie=better.score == worse.score,
        )
        keep(pair, rules, lines=(better.line, worse.line), into=kept)
    return kept


def _compared(group: Answers, rules: Rules) -> Iterator[Comparison]:
    """Yield the comparisons that `pairing` asks for, the better answer first."""
    ordered = sorted(group.answers, key=lambda answer: -answer.score)
    if len(ordered) > 1 and not rules.can_tie and ordered[0].score == ordered[-1].score:
        return
    match rules.pairing:
        case "best_worst":
            if len(ordered) > 1:
                yield ordered[0], ordered[-1]
        case "adjacent":
            yield from pairwise(ordered)
        case "all":
            yield from _all(ordered, rules)
        case "random":
            yield from _drawn(list(_all(ordered, rules)), group, rules)
        case _:
            assert_never(rules.pairing)


def _all(ordered: Sequence[Answer], rules: Rules) -> Iterator[Comparison]:
    count = len(ordered) * (len(ordered) - 1) // 2
    if count > _MAX_COMPARISONS:
        raise TooLarge(
            f"one prompt has {len(ordered)} answers, which is {count} comparisons; at most "
            f"{_MAX_COMPARISONS} are made",
            code="too_many_comparisons",
            hint="set pairing to best_worst, or keep fewer answers to a prompt",
            param="policy",
        )
    for better, worse in combinations(ordered, 2):
        if rules.can_tie or better.score != worse.score:
            yield better, worse


def _drawn(comparisons: list[Comparison], group: Answers, rules: Rules) -> Iterator[Comparison]:
    """Draw without replacement: the lowest hashes of seed, prompt and the two answers."""
    prompt = digest(group.prompt)
    order = sorted(
        range(len(comparisons)),
        key=lambda index: hashlib.sha256(
            b"%d:" % rules.seed + prompt + digest(*(a.messages for a in comparisons[index]))
        ).digest(),
    )
    for index in order[: rules.max_pairs_per_prompt or 1]:
        yield comparisons[index]
