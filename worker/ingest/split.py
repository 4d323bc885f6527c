"""Train, validation and test by prompt: all pairs of a prompt lie in one split."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.run_spec import SplitPolicy
from worker.ingest.canonical import Split


def rank(group_id: str, *, seed: int) -> bytes:
    """Return the place of a prompt in the order of the seed: 16 bytes of a hash."""
    return hashlib.sha256(f"{seed}:{group_id}".encode()).digest()[:16]


def split_sizes(prompts: int, policy: SplitPolicy) -> dict[Split, int]:
    """Return how many prompts go where: the fractions, rounded, and at least one each.

    Domain: prompts >= 3.
    """
    if prompts < len(Split):
        raise ValueError(f"cannot split {prompts} prompts into {len(Split)} parts")
    test = max(1, math.floor(prompts * policy.test + 0.5))
    validation = max(1, math.floor(prompts * policy.validation + 0.5))
    while test + validation >= prompts:
        if test > validation:
            test -= 1
        else:
            validation -= 1
    return {
        Split.TRAIN: prompts - test - validation,
        Split.VALIDATION: validation,
        Split.TEST: test,
    }


@dataclass(frozen=True)
class SplitPlan:
    """Which prompts are held out: the lowest ranks are test, the next ones validation."""

    seed: int
    last_test: bytes
    last_validation: bytes
    sizes: dict[Split, int]

    def split_of(self, group_id: str) -> Split:
        """Return the split of a prompt; needs no table of prompts."""
        place = rank(group_id, seed=self.seed)
        if place <= self.last_test:
            return Split.TEST
        if place <= self.last_validation:
            return Split.VALIDATION
        return Split.TRAIN


def plan_split(ranks: Iterable[bytes], policy: SplitPolicy) -> SplitPlan:
    """Return the plan for a set of distinct ranks of prompts.

    It depends on the seed and on which prompts there are, not on their order or number of pairs.
    Domain: at least 3 ranks.
    """
    ordered = sorted(ranks)
    return plan_by_place(len(ordered), ordered.__getitem__, policy)


def plan_by_place(prompts: int, rank_at: Callable[[int], bytes], policy: SplitPolicy) -> SplitPlan:
    """Return the plan where only single places of the order are looked up, from 0.

    Domain: prompts >= 3.
    """
    sizes = split_sizes(prompts, policy)
    return SplitPlan(
        seed=policy.seed,
        last_test=rank_at(sizes[Split.TEST] - 1),
        last_validation=rank_at(sizes[Split.TEST] + sizes[Split.VALIDATION] - 1),
        sizes=sizes,
    )
