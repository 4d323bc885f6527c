"""Splits by prompt: whole groups, the asked fractions, the same for the same seed."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.run_spec import DatasetPolicy, SplitPolicy
from worker.ingest.canonical import Split
from worker.ingest.split import plan_split, rank, split_sizes

groups = st.sets(st.text("0123456789abcdef", min_size=8, max_size=8), min_size=3, max_size=60)
fractions = st.floats(0.01, 0.49)


@given(groups, fractions, fractions, st.integers(0, 2**31 - 1), st.randoms())
def test_plan_gives_each_split_its_size_in_any_order(names, validation, test, seed, random):
    policy = SplitPolicy(validation=validation, test=test, seed=seed)
    ranks = [rank(name, seed=seed) for name in names]
    plan = plan_split(ranks, policy)
    counted = Counter(plan.split_of(name) for name in names)

    assert counted == plan.sizes == split_sizes(len(names), policy)
    assert min(counted.values()) >= 1
    assert len(counted) == 3
    random.shuffle(ranks)
    assert plan_split(ranks, policy) == plan


@given(st.integers(3, 100_000), fractions, fractions)
def test_sizes_are_the_fractions_rounded(prompts, validation, test):
    sizes = split_sizes(prompts, SplitPolicy(validation=validation, test=test))
    assert sum(sizes.values()) == prompts
    assert min(sizes.values()) >= 1
    if prompts >= 100:
        assert abs(sizes[Split.VALIDATION] - prompts * validation) <= 0.5 + 1e-9
        assert abs(sizes[Split.TEST] - prompts * test) <= 0.5 + 1e-9


def test_sizes_of_the_default_policy():
    assert split_sizes(1000, SplitPolicy()) == {
        Split.TRAIN: 700,
        Split.VALIDATION: 150,
        Split.TEST: 150,
    }
    assert set(split_sizes(3, SplitPolicy()).values()) == {1}


def test_fewer_than_three_prompts_cannot_be_split():
    with pytest.raises(ValueError, match="cannot split 2 prompts"):
        split_sizes(2, SplitPolicy())


def test_no_prompt_lies_in_two_splits(run, lines):
    rows = [
        {"prompt": f"Prompt {n % 40}", "chosen": f"yes {n}", "rejected": f"no {n}"}
        for n in range(200)
    ]
    outcome = run(lines(rows))
    splits = defaultdict(set)
    for row in outcome.rows:
        splits[row.prompt].add(row.split)
    assert len(splits) == 40
    assert all(len(found) == 1 for found in splits.values())
    counts = outcome.report["counts"]
    assert (counts["prompts"], counts["pairs"]) == (40, 200)
    assert counts["train"] + counts["validation"] + counts["test"] == 200
    assert counts["test"] == sum(row.split is Split.TEST for row in outcome.rows) == 30
    assert outcome.report["split"]["prompts"] == {"train": 28, "validation": 6, "test": 6}


def test_seed_changes_the_split_and_order_does_not(run, lines, good):
    rows = good(60)

    def splits(data, seed):
        policy = DatasetPolicy(split=SplitPolicy(seed=seed))
        return {row.id: row.split for row in run(lines(data), policy=policy).rows}

    assert splits(rows, 0) == splits(rows, 0) == splits(rows[::-1], 0)
    assert splits(rows, 0) != splits(rows, 1)
