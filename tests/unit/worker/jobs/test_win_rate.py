"""Win rates: what is called a difference, who is drawn, what is answered at once."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from core.profile import Estimate
from worker.ingest.canonical import CanonicalRow, Message, Role, Split
from worker.jobs.win_rate import batches, drawn, rooms, share, stored_text, win_rate
from worker.training.model import Policy


def compared(*differences: float) -> Any:
    return win_rate(np.array(differences), reward_model="judge", seed=0)


def test_ties_count_one_half() -> None:
    found = compared(*[1.0] * 6, *[0.0] * 4, *[-1.0] * 2)
    assert (found.wins, found.ties, found.losses) == (6, 4, 2)
    assert found.rate.value == pytest.approx(8 / 12)
    assert found.difference.value == pytest.approx(4 / 12)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0] * 30, "better"),
        ([-1.0] * 30, "worse"),
        ([0.0] * 30, "no significant difference"),
        ([1.0, -1.0] * 15, "no significant difference"),
        ([1.0] * 9, "no significant difference"),  # too few prompts
        ([100.0] * 12 + [-0.1] * 18, "no significant difference"),  # size does not count
    ],
)
def test_a_difference_is_called_when_the_interval_leaves_one_half(
    differences: list[float], verdict: str
) -> None:
    found = compared(*differences)
    assert found.verdict == verdict
    assert verdict in found.sentence
    assert f"of {len(differences)} held-out prompts" in found.sentence


def test_the_interval_is_one_of_a_share() -> None:
    found = compared(*[1.0] * 11, -1.0)
    assert found.rate.high == 1.0
    assert found.rate.low < found.rate.value
    assert share(Estimate(value=0.1, low=-0.2, high=0.4)).low == 0.0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        wins = np.where(rng.random(60) < 0.7, 1.0, -1.0)
        rate = win_rate(wins, reward_model="judge", seed=trial).rate
        hits += rate.low <= 0.7 <= rate.high
    # 95 % of 100, three standard errors below.
    assert hits >= 88


def row(prompt: int, pair: int) -> CanonicalRow:
    said = (Message(Role.USER, str(prompt)),)
    return CanonicalRow(
        id=f"{prompt}-{pair}", line=1, prompt=said, chosen=said, rejected=said, margin=None,
        weight=1.0, group_id=str(prompt), source="s", meta={}, split=Split.TEST,
    )  # fmt: skip


def test_a_lot_draws_prompts_and_keeps_their_order() -> None:
    rows = [row(prompt, pair) for prompt in range(40) for pair in range(3)]
    picked = drawn(rows, limit=10, seed=1)
    numbers = [int(one.group_id) for one in picked]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 10
    assert numbers != list(range(10))
    assert all(one.id.endswith("-0") for one in picked)
    assert picked == drawn(rows, limit=10, seed=1) != drawn(rows, limit=10, seed=2)
    assert [one.id for one in drawn(rows, limit=100, seed=3)] == [f"{n}-0" for n in range(40)]


def test_batches_hold_so_many_prompts_and_tokens() -> None:
    short = [[0] * 10] * 40
    assert list(batches(short, new_tokens=6)) == [(0, 16), (16, 32), (32, 40)]
    # 4 * (4000 + 96) are as many tokens as go at once.
    assert list(batches([[0] * 4000] * 9, new_tokens=96)) == [(0, 4), (4, 8), (8, 9)]
    mixed = [[0] * n for n in (10, 10, 8000, 10, 20_000, 5)]
    found = list(batches(mixed, new_tokens=100))
    assert [i for start, end in found for i in range(start, end)] == list(range(6))
    assert (4, 5) in found
    assert list(batches([], new_tokens=5)) == []


@dataclass
class Positions:
    max_positions: int | None


@pytest.mark.parametrize(
    ("positions", "max_length", "asked", "prompt", "answer"),
    [
        (None, 128, 256, 128, 256),
        (2048, 128, 256, 128, 256),
        (512, 512, 256, 256, 256),
        (512, 512, 4096, 256, 256),
        (512, 1024, 100, 412, 100),
    ],
)
def test_prompt_and_answer_share_the_models_positions(
    positions: int | None, max_length: int, asked: int, prompt: int, answer: int
) -> None:
    policy = cast(Policy, Positions(positions))
    assert rooms(policy, max_length=max_length, new_tokens=asked) == (prompt, answer)


def test_postgres_takes_the_texts() -> None:
    assert stored_text("a\0b") == "a\N{REPLACEMENT CHARACTER}b"
