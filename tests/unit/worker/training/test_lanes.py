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

from core.spec import KernelTerm, KlSpec, ObjectiveSpec, PenaltyTerm
from objectives import HybridObjective, build_objective, fit_geometry
from tests.unit.worker.training.micro import (
    ignore_progress,
    micro_policy,
    random_pairs,
    stored_states,
    write_llama,
)
from worker.training import evaluate, reference
from worker.training import step as step_module
from worker.training.batches import Form, collate, micro_batches
from worker.training.evaluate import measure
from worker.training.lanes import WIDEST, in_lanes, lanes_of
from worker.training.model import Policy
from worker.training.reference import compute_reference
from worker.training.step import PairLoss, PairStep, TrainingData


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
    with monkeypatch.context() as patched:
        patched.setitem(config.rope_parameters, "full_attention", {"rope_type": "longrope"})
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


HMK = ObjectiveSpec(
    kernel_term=KernelTerm.model_validate({"kernel": "hmk", "gamma": 0.3}),
    divergence_term=PenaltyTerm(divergence=KlSpec(), alpha=2.0),
)


def step_of(policy: Policy, folder: Path | None) -> tuple[PairStep, HybridObjective]:
    """A step of the mixture over twelve pairs, with states of the reference where a folder is."""
    pairs = random_pairs(12)
    table = compute_reference(policy, pairs, progress=ignore_progress)
    objective = build_objective(
        HMK, geometry=fit_geometry(table.embeddings, seed=0), head=policy.head.weight
    )
    data = TrainingData(
        pairs,
        table.chosen_log_prob,
        table.rejected_log_prob,
        frozen_embeddings=table.embeddings,
        reference_states=None if folder is None else stored_states(policy, pairs, folder),
    )
    policy.reset_adapter(1)
    for parameter in policy.adapter().values():
        parameter.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return PairStep(PairLoss(policy, objective), policy, data), objective


def gradients_of(step: PairStep, objective: HybridObjective) -> dict[str, torch.Tensor]:
    """Gradients of a whole step, and its metrics; nothing is left in the parameters."""
    named = {**step.policy.adapter(), **dict(objective.named_parameters())}

    def clear() -> None:
        for parameter in named.values():
            parameter.grad = None

    metrics = step.accumulate(range(12), denominator=12, clear=clear)
    found = {name: p.grad for name, p in named.items() if p.grad is not None}
    assert found.keys() == named.keys()
    clear()
    return found | metrics


def test_a_step_in_lanes_has_the_gradients_of_one_lane(policy: Policy, tmp_path: Path) -> None:
    step, objective = step_of(policy, tmp_path)
    side_by_side = gradients_of(step, objective)
    torch.set_num_threads(1)
    alone = gradients_of(PairStep(step.loss, policy, step.data), objective)
    for name, expected in alone.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            side_by_side[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=name
        )


def test_a_step_in_lanes_is_the_same_whoever_ends_first(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits do not depend on which lane is faster: sums are in the order of the micro-batches."""
    step, objective = step_of(policy, tmp_path)
    expected = gradients_of(step, objective)
    plain, turns = step_module.score_tokens, iter(range(1000))
    together = threading.Barrier(3, timeout=30)
    used: set[int] = set()

    def late(*args: object, **kwargs: object) -> object:
        used.add(threading.get_ident())
        together.wait()
        time.sleep(0.05 if next(turns) % 3 == 0 else 0.0)
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "score_tokens", late)
    for _ in range(3):
        found = gradients_of(step, objective)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert len(used) >= 3
    assert threading.get_ident() not in used


def test_the_base_is_not_run_in_lanes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without stored states the adapter is switched off at every step, for whoever runs then."""
    step, objective = step_of(policy, None)
    threads: set[int] = set()
    plain = step_module.hidden_states

    def noted(*args: object, **kwargs: object) -> object:
        threads.add(threading.get_ident())
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "hidden_states", noted)
    gradients_of(step, objective)
    assert threads == {threading.get_ident()}


def test_an_error_of_a_micro_batch_is_the_steps(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, objective = step_of(policy, tmp_path)

    def full(*_args: object, **_kwargs: object) -> object:
        raise torch.OutOfMemoryError("no room")

    before = threading.active_count()
    with monkeypatch.context() as patched:
        patched.setattr(step_module, "score_tokens", full)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            gradients_of(step, objective)
    assert threading.active_count() == before
    gradients_of(step, objective)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("max_tokens", [1, 40, 200, 100_000])
def test_micro_batches_keep_all_lanes_busy(form: Form, max_tokens: int) -> None:
    pairs = random_pairs(30)
    groups = micro_batches(pairs, range(30), max_tokens=max_tokens, form=form, lanes=3)
    assert sorted(i for group in groups for i in group) == list(range(30))
    if max_tokens > 40:
        assert len(groups) % 3 == 0
    if max_tokens == 100_000:
        assert len(groups) == 3
        sizes = [sum(pairs[i].length for i in group) for group in groups]
        assert max(sizes) - min(sizes) <= 2 * max(pair.length for pair in pairs)
    for group in groups:
        batch = collate(pairs, group, form=form, device=torch.device("cpu"))
        assert len(group) == 1 or batch.input_ids.numel() <= max_tokens
    assert micro_batches(pairs, [4], max_tokens=40, form=form, lanes=3) == [[4]]
