"""Batches side by side: in order, with the same numbers, and nothing left running."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.worker.training.micro import (
    ignore_progress,
    micro_policy,
    random_pairs,
    stored_states,
    write_llama,
)
from worker.training import evaluate, reference
from worker.training.evaluate import measure
from worker.training.lanes import WIDEST, in_lanes, lanes_of
from worker.training.model import Policy
from worker.training.reference import compute_reference


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return micro_policy(write_llama(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("lanes", [1, 3])
def test_results_come_in_the_order_of_the_items(lanes: int) -> None:
    def late_first(number: int) -> tuple[int, bool]:
        time.sleep(0.02 if number % 3 == 0 else 0.0)
        return number, torch.is_grad_enabled()

    assert list(in_lanes(range(20), late_first, lanes=lanes)) == [(n, False) for n in range(20)]
    assert torch.is_grad_enabled()
    assert list(in_lanes([], late_first, lanes=lanes)) == []


def test_lanes_work_at_the_same_time_with_one_thread_each() -> None:
    together = threading.Barrier(3, timeout=30)

    def meet(_number: int) -> int:
        together.wait()
        return torch.get_num_threads()

    assert list(in_lanes(range(6), meet, lanes=3)) == [1] * 6
    assert torch.get_num_threads() == 3
    began: list[int] = []
    thread = threading.Thread(target=lambda: began.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert began == [3]


def test_who_leaves_early_leaves_nothing_running() -> None:
    done: list[int] = []
    before = threading.active_count()
    with closing(in_lanes(range(50), done.append, lanes=2)) as results:
        next(results)
    assert threading.active_count() == before
    assert len(done) < 50
    assert torch.get_num_threads() == 3


def test_an_error_of_a_lane_is_the_callers() -> None:
    def fails(number: int) -> int:
        if number == 4:
            raise ZeroDivisionError("4")
        return number

    found: list[int] = []
    with pytest.raises(ZeroDivisionError, match="4"):
        found.extend(in_lanes(range(9), fails, lanes=3))
    assert found == [0, 1, 2, 3]
    assert torch.get_num_threads() == 3


def test_narrow_models_on_a_cpu_have_lanes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lanes_of(policy) == 3
    assert lanes_of(replace(policy, device=torch.device("cuda"))) == 1
    config = policy.causal.config
    with monkeypatch.context() as patched:
        patched.setitem(config.rope_parameters, "rope_type", "dynamic")
        assert lanes_of(policy) == 1
    monkeypatch.setattr(policy.head, "in_features", WIDEST + 1)
    assert lanes_of(policy) == 1


def test_numbers_are_those_of_one_batch_after_another(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (reference, evaluate):
        monkeypatch.setattr(module, "FORWARD_TOKENS", 64)
    pairs = random_pairs(24)
    policy.reset_adapter(1)
    for parameter in policy.adapter().values():
        parameter.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    tables, scores = [], []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        assert lanes_of(policy) == threads
        tables.append(compute_reference(policy, pairs, progress=ignore_progress).tensors())
        states = stored_states(policy, pairs, tmp_path / str(threads))
        scores.append(measure(policy, pairs, reference=states, progress=ignore_progress))
    for name, side_by_side in tables[0].items():
        torch.testing.assert_close(side_by_side, tables[1][name], rtol=1e-6, atol=1e-6)
    assert np.abs(scores[0].margins).min() > 0.0
    np.testing.assert_allclose(scores[0].margins, scores[1].margins, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores[0].kl_sum, scores[1].kl_sum, rtol=1e-5, atol=1e-6)
