import math
from itertools import product
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy
from core.run_spec import TrainSpec
from core.spec import (
    DivergenceName,
    KernelName,
    KernelTerm,
    KlSpec,
    LinkTerm,
    MixtureKernelSpec,
    ObjectiveSpec,
    PenaltyTerm,
)
from tests.unit.worker.training.micro import Bench, MemoryStore, Recorder, stored_states
from worker.training import run, step
from worker.training.resolve import TrainPlan, auto_learning_rate, resolve_plan

PLAIN = ObjectiveSpec(beta=0.5)
PENALTY: TypeAdapter[PenaltyTerm] = TypeAdapter(PenaltyTerm)
HMK = ObjectiveSpec(
    beta=0.5,
    kernel_term=KernelTerm(kernel=MixtureKernelSpec(), gamma=0.3),
    divergence_term=PENALTY.validate_python({"divergence": "jensen_shannon", "alpha": 2.0}),
)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_fresh_adapter_is_the_reference(bench: Bench) -> None:
    recorder = Recorder()
    bench.train(PLAIN, hooks=recorder, total_steps=1)
    first = recorder.points[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert first["grad_norm"] > 0
    names = {
        "loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected", "rewards/chosen",
        "rewards/rejected", "rewards/margins", "rewards/accuracies", "epoch", "num_tokens",
    }  # fmt: skip
    assert set(first) == names


def test_a_reference_of_other_weights_is_refused(bench: Bench) -> None:
    table = bench.table
    shifted = table.chosen_log_prob - 1.0
    try:
        object.__setattr__(table, "chosen_log_prob", shifted)
        with pytest.raises(RunAborted, match=r"mean margin 1\.0000, expected 0") as caught:
            bench.train(PLAIN, hooks=Recorder())
    finally:
        object.__setattr__(table, "chosen_log_prob", shifted + 1.0)
    assert caught.value.failure is FailureCode.INTERNAL


def test_training_separates_chosen_from_rejected(bench: Bench) -> None:
    recorder = Recorder()
    outcome = bench.train(PLAIN, hooks=recorder, total_steps=30, learning_rate=0.02)
    assert outcome.ended_by is EndedBy.BUDGET
    assert (outcome.steps, outcome.pairs_seen) == (30, 150)
    assert recorder.points[30]["loss"] < 0.3
    assert recorder.points[30]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("spec", [PLAIN, HMK], ids=["dpo", "hmk"])
@pytest.mark.parametrize("stop_at", [0, 1, 3, 5])
def test_stopped_and_resumed_equals_uninterrupted(
    bench: Bench, spec: ObjectiveSpec, stop_at: int
) -> None:
    whole = Recorder()
    outcome = bench.train(spec, hooks=whole)
    expected = bench.weights()
    store, first, second = MemoryStore(), Recorder(stop_at), Recorder()
    with pytest.raises(InterruptedError):
        bench.train(spec, hooks=first, store=store)
    assert store.saved is not None
    assert store.saved.step == stop_at
    bench.train(PLAIN, hooks=Recorder(), total_steps=2, seed=99)  # another run in between
    resumed = bench.train(spec, hooks=second, store=store)
    assert_same(bench.weights(), expected)
    assert {**first.points, **second.points} == whole.points
    assert min(second.points) == stop_at + 1
    assert resumed.mixture_weights == outcome.mixture_weights
    assert (resumed.steps, resumed.pairs_seen) == (outcome.steps, outcome.pairs_seen)


def test_killed_in_the_middle_of_a_metrics_window(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "METRIC_POINTS", 2)
    whole = Recorder()
    bench.train(PLAIN, hooks=whole)
    assert sorted(whole.points) == [3, 6]
    store, second = MemoryStore(), Recorder()
    with pytest.raises(InterruptedError):
        bench.train(PLAIN, hooks=Recorder(stop_at=2), store=store)
    bench.train(PLAIN, hooks=second, store=store)
    assert second.points == whole.points


def test_a_finished_run_is_restored_without_training(bench: Bench) -> None:
    store = MemoryStore()
    outcome = bench.train(HMK, hooks=Recorder(), store=store)
    expected = bench.weights()
    again = Recorder()
    restored = bench.train(HMK, hooks=again, store=store)
    assert again.points == {}
    assert_same(bench.weights(), expected)
    assert restored.mixture_weights == outcome.mixture_weights
    assert store.saved is not None
    assert restored.seconds >= store.saved.seconds > 0


def test_runs_do_not_depend_on_what_ran_before(bench: Bench) -> None:
    first = Recorder()
    bench.train(HMK, hooks=first)
    expected = bench.weights()
    bench.train(PLAIN, hooks=Recorder(), learning_rate=0.05)
    second = Recorder()
    bench.train(HMK, hooks=second)
    assert_same(bench.weights(), expected)
    assert first.points == second.points


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_micro_batches_do_not_change_the_result(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    whole, parts = Recorder(), Recorder()
    bench.train(HMK, hooks=whole, total_steps=1)
    monkeypatch.setitem(step.MICRO_TOKENS, "cpu", 40 // micro)
    bench.train(HMK, hooks=parts, total_steps=1)
    # Margins of a fresh adapter are rounding noise, and so is their sign.
    noise = "rewards/accuracies"
    for name in whole.points[1].keys() - {noise}:
        found = parts.points[1][name]
        assert found == pytest.approx(whole.points[1][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(("kernel", "divergence"), list(product(KernelName, DivergenceName)))
def test_every_pair_trains_and_stays_finite(
    bench: Bench, kernel: KernelName, divergence: DivergenceName
) -> None:
    spec = ObjectiveSpec(
        kernel_term=KernelTerm.model_validate({"kernel": kernel.value, "gamma": 0.3}),
        divergence_term=PENALTY.validate_python({"divergence": divergence.value, "alpha": 2.0}),
    )
    recorder = Recorder()
    outcome = bench.train(spec, hooks=recorder, total_steps=2, warmup_steps=0)
    assert outcome.ended_by is EndedBy.BUDGET, outcome.message
    assert all(math.isfinite(v) for point in recorder.points.values() for v in point.values())
    assert recorder.points[1]["divergence/token"] == pytest.approx(0.0, abs=1e-5)
    assert recorder.points[2]["divergence/token"] > 0
    assert all(bool(torch.isfinite(p).all()) for p in bench.weights().values())


def test_stored_reference_states_change_nothing_but_the_time(bench: Bench, tmp_path: Path) -> None:
    spec = ObjectiveSpec(divergence_term=PenaltyTerm(divergence=KlSpec(), alpha=3.0))
    states = stored_states(bench.policy, bench.pairs, tmp_path)
    curves, weights = [], []
    for kept in (None, states):
        recorder = Recorder()
        bench.train(spec, hooks=recorder, states=kept)
        curves.append([values["loss"] for values in recorder.points.values()])
        weights.append(bench.weights())
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=1e-4)


def test_links_and_frozen_embeddings_train(bench: Bench) -> None:
    spec = ObjectiveSpec(
        kernel_term=KernelTerm.model_validate({"kernel": "rbf", "embedding": "encoder"}),
        divergence_term=LinkTerm.model_validate({"divergence": "hellinger"}),
    )
    recorder = Recorder()
    outcome = bench.train(spec, hooks=recorder, total_steps=2)
    assert outcome.ended_by is EndedBy.BUDGET
    assert math.isfinite(recorder.points[2]["loss"])


def test_learned_mixture_weights_move_at_their_own_rate(bench: Bench) -> None:
    recorder = Recorder()
    outcome = bench.train(HMK, hooks=recorder, total_steps=8)
    assert outcome.mixture_weights is not None
    assert outcome.mixture_weights["tau_local"] != pytest.approx(0.5, abs=1e-3)
    for group in (("tau_local", "tau_global"), ("rbf", "polynomial"), ("spectral", "mahalanobis")):
        assert sum(outcome.mixture_weights[name] for name in group) == pytest.approx(1.0)
    curve = [recorder.points[step]["hmk/tau_local"] for step in sorted(recorder.points)]
    assert curve[0] == pytest.approx(0.5)
    assert len(set(curve)) == len(curve)


def test_what_is_not_finite_ends_the_run_and_is_named(bench: Bench) -> None:
    store = MemoryStore(every_step=True)
    outcome = bench.train(PLAIN, hooks=Recorder(), store=store, learning_rate=1e30, warmup_steps=0)
    assert outcome.ended_by is EndedBy.NAN
    assert "not finite at step 2" in outcome.message
    assert "pair" in outcome.message
    assert store.saved is not None
    assert store.saved.step == 1, "nothing is saved after the step that went wrong"


class SmallDevice:
    """Makes the model run out of memory beyond `limit` tokens at once."""

    def __init__(self, bench: Bench, limit: int) -> None:
        self.limit = limit
        self.refused: list[int] = []
        self._hook = bench.policy.causal.base_model.register_forward_pre_hook(
            self._check, with_kwargs=True
        )

    def _check(self, _module: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        tokens = inputs["input_ids"].numel()
        if tokens > self.limit:
            self.refused.append(tokens)
            raise torch.OutOfMemoryError(f"{tokens} tokens")

    def __enter__(self) -> "SmallDevice":
        return self

    def __exit__(self, *_error: object) -> None:
        self._hook.remove()


def test_out_of_memory_halves_micro_batches_and_changes_no_mathematics(bench: Bench) -> None:
    whole, small = Recorder(), Recorder()
    bench.train(HMK, hooks=whole, total_steps=3)
    with SmallDevice(bench, limit=30) as device:
        outcome = bench.train(HMK, hooks=small, total_steps=3)
    assert outcome.ended_by is EndedBy.BUDGET, outcome.message
    assert device.refused, "the first step met the limit"
    assert len(device.refused) <= 3, "what did not fit is not tried again at every step"
    for step_number, expected in whole.points.items():
        for name in expected.keys() - {"rewards/accuracies"}:
            found = small.points[step_number][name]
            assert found == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_a_pair_that_does_not_fit_ends_the_run_and_says_so(bench: Bench) -> None:
    with SmallDevice(bench, limit=5):
        outcome = bench.train(PLAIN, hooks=Recorder())
    assert outcome.ended_by is EndedBy.OOM
    assert "step 1 ran out of device memory with one pair at a time" in outcome.message


def test_rates_warm_up_and_fall_linearly() -> None:
    plan = TrainPlan(
        learning_rate=1.0, total_steps=10, warmup_steps=2, schedule="linear", batch_size=2,
        weight_decay=0.0, max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    rates = [plan.rate(step) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == pytest.approx([1 - i / 8 for i in range(8)])


def test_auto_is_resolved_against_model_and_data() -> None:
    assert auto_learning_rate(192) == pytest.approx(0.35 / 192)
    assert auto_learning_rate(10) == 5e-3
    plan = resolve_plan(TrainSpec(), num_pairs=420, hidden_size=192, seed=1)
    assert (plan.total_steps, plan.warmup_steps, plan.batch_size) == (26, 3, 16)
    short = resolve_plan(
        TrainSpec(n_epochs=0.5, max_steps=4, schedule="constant"), num_pairs=9, hidden_size=64,
        seed=1, learning_rate=0.01,
    )  # fmt: skip
    assert (short.total_steps, short.warmup_steps, short.batch_size) == (1, 0, 9)
    assert (short.schedule, short.learning_rate) == ("constant", 0.01)
