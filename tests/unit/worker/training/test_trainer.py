"""Final runs: the trial's steps under transformers' Trainer, exact resume, scores on validation."""

import gc
import math
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy
from core.run_spec import TrainSpec
from core.spec import KernelTerm, MixtureKernelSpec, ObjectiveSpec, PenaltyTerm
from tests.unit.worker.training.micro import (
    Bench,
    MemoryStore,
    Recorder,
    micro_policy,
    random_pairs,
    stored_states,
)
from worker.training.checkpoint import SavedState
from worker.training.evaluate import TrialScore, measure, trial_score
from worker.training.reference import Progress
from worker.training.resolve import auto_learning_rate, resolve_plan
from worker.training.run import RunOutcome, TrainingRun
from worker.training.states import ReferenceStates
from worker.training.trainer import Validate, check_trackers, train_final

PLAIN = ObjectiveSpec(beta=0.5)
HMK = ObjectiveSpec(
    beta=0.5,
    kernel_term=KernelTerm(kernel=MixtureKernelSpec(), gamma=0.3),
    divergence_term=PenaltyTerm.model_validate(
        {"divergence": {"type": "jensen_shannon"}, "alpha": 2.0}
    ),
)


@pytest.fixture(scope="module")
def full(llama_folder: Path) -> Bench:
    return Bench(micro_policy(llama_folder, adaptation="full"), random_pairs(12))


@pytest.fixture(scope="module")
def states(full: Bench, tmp_path_factory: pytest.TempPathFactory) -> ReferenceStates:
    full.policy.reset_adapter(0)
    return stored_states(full.policy, full.pairs, tmp_path_factory.mktemp("store"))


def validation(bench: Bench, states: ReferenceStates | None = None) -> Validate:
    """Score the policy on the pairs that it is trained on, which is fine for what is tested."""

    def validate(progress: Progress) -> TrialScore:
        return trial_score(measure(bench.policy, bench.pairs, reference=states, progress=progress))

    return validate


def final(
    run: TrainingRun,
    folder: Path,
    *,
    hooks: Recorder,
    store: MemoryStore | None = None,
    validate: Validate | None = None,
) -> RunOutcome:
    return train_final(run, hooks=hooks, folder=folder, store=store, validate=validate)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("spec", [PLAIN, HMK], ids=["dpo", "hmk"])
def test_a_trial_is_the_first_steps_of_the_final_run(
    bench: Bench, tmp_path: Path, spec: ObjectiveSpec
) -> None:
    trial, run = Recorder(), Recorder()
    train = TrainSpec(n_epochs=2.5, batch_size=5, learning_rate=5e-3, weight_decay=0.01)
    resolve = partial(resolve_plan, train, num_pairs=12, hidden_size=32, seed=3)
    short, whole_plan = resolve(stop_after=4).as_dict(), resolve().as_dict()
    assert (short["stop_after"], whole_plan["total_steps"]) == (4, 6)
    bench.train(spec, hooks=trial, **short)
    weights = bench.weights()
    whole = bench.run(spec, **whole_plan)
    store = MemoryStore()
    hooks = Recorder(stop_at=4)
    with pytest.raises(InterruptedError):
        final(whole, tmp_path, hooks=hooks, store=store)
    assert hooks.points == trial.points
    assert_same(bench.weights(), weights)
    final(bench.run(spec, **whole_plan), tmp_path, hooks=run)
    assert {step: run.points[step] for step in trial.points} == trial.points
    assert sorted(run.points) == [1, 2, 3, 4, 5, 6]


def test_the_curve_of_the_plan_and_its_own_counters(bench: Bench, tmp_path: Path) -> None:
    hooks = Recorder()
    run = bench.run(PLAIN, total_steps=5, warmup_steps=2)
    final(run, tmp_path, hooks=hooks)
    rates = [values["learning_rate"] / 5e-3 for values in hooks.points.values()]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3])
    assert [values["epoch"] for values in hooks.points.values()] == pytest.approx(
        [5 * step / 12 for step in range(1, 6)]
    )
    tokens = [values["num_tokens"] for values in hooks.points.values()]
    sizes = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in bench.pairs]
    drawn = [sum(sizes[i] for i in run.order.pairs_of(step)) for step in range(5)]
    assert tokens == [sum(drawn[: n + 1]) for n in range(5)]
    first = hooks.points[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("stop_at", [0, 1, 2, 5])
def test_stopped_and_resumed_equals_uninterrupted(
    bench: Bench, tmp_path: Path, stop_at: int
) -> None:
    plan = {"eval_steps": 2, "learning_rate": 0.05}
    whole, last = Recorder(), MemoryStore()
    outcome = final(
        bench.run(HMK, **plan), tmp_path, hooks=whole, store=last, validate=validation(bench)
    )
    expected = bench.weights()
    assert [s for s, v in whole.points.items() if "eval_log_loss" in v] == [2, 4, 6]
    store, first, second = MemoryStore(), Recorder(stop_at), Recorder()
    with pytest.raises(InterruptedError):
        final(
            bench.run(HMK, **plan), tmp_path, hooks=first, store=store, validate=validation(bench)
        )
    assert store.saved is not None
    assert store.saved.step == stop_at
    bench.train(PLAIN, hooks=Recorder(), total_steps=2, seed=99)  # another run in between
    resumed = final(
        bench.run(HMK, **plan), tmp_path, hooks=second, store=store, validate=validation(bench)
    )
    assert {**first.points, **second.points} == whole.points
    assert_same(bench.weights(), expected)
    assert replace(resumed, seconds=0.0) == replace(outcome, seconds=0.0)
    assert last.saved is not None
    assert_same(store.saved.tensors, last.saved.tensors)
    assert store.saved.watch == last.saved.watch


def test_random_numbers_go_on_where_they_were(bench: Bench, tmp_path: Path) -> None:
    class Draws(Recorder):
        """Draws a number at every step, as a model with dropout would."""

        def __init__(self, stop_at: int | None = None) -> None:
            super().__init__(stop_at)
            self.drawn: list[float] = []

        def stepped(self, step: int, total: int) -> None:
            super().stepped(step, total)
            self.drawn.append(float(torch.rand(())))

    whole, first, second, store = Draws(), Draws(3), Draws(), MemoryStore()
    final(bench.run(PLAIN), tmp_path, hooks=whole)
    with pytest.raises(InterruptedError):
        final(bench.run(PLAIN), tmp_path, hooks=first, store=store)
    torch.rand(7)
    final(bench.run(PLAIN), tmp_path, hooks=second, store=store)
    assert first.drawn + second.drawn == whole.drawn


class _StopInValidation(Recorder):
    """Asks to stop when progress is reported for the second time at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._at, self._seen = step, 0

    def stepped(self, step: int, total: int) -> None:
        super().stepped(step, total)
        self._seen += step == self._at

    def stopping(self) -> bool:
        return self._seen > 1

    def raise_if_stopped(self) -> None:
        raise InterruptedError("stopped by the test")


@pytest.mark.parametrize("step", [3, 6])
def test_stopped_while_it_is_scored_it_begins_with_the_score(
    bench: Bench, tmp_path: Path, step: int
) -> None:
    whole = Recorder()
    final(bench.run(PLAIN, eval_steps=3), tmp_path, hooks=whole, validate=validation(bench))
    expected = bench.weights()
    store, first, second = MemoryStore(), _StopInValidation(step), Recorder()
    with pytest.raises(InterruptedError):
        final(
            bench.run(PLAIN, eval_steps=3), tmp_path, hooks=first, store=store,
            validate=validation(bench),
        )  # fmt: skip
    assert sorted(first.points) == list(range(1, step))
    final(
        bench.run(PLAIN, eval_steps=3), tmp_path, hooks=second, store=store,
        validate=validation(bench),
    )  # fmt: skip
    assert {**first.points, **second.points} == whole.points
    assert_same(bench.weights(), expected)


def scripted(losses: list[float]) -> Validate:
    """Scores as given, one after another."""
    left = iter(losses)

    def validate(_progress: Progress) -> TrialScore:
        return TrialScore(
            losses=None,  # type: ignore[arg-type]  # not read
            log_loss=next(left), standard_error=0.0, accuracy=0.5, drift=0.0,
            chosen_displacement=0.0,
        )  # fmt: skip

    return validate


def test_patience_ends_a_run_and_the_best_weights_stay(bench: Bench, tmp_path: Path) -> None:
    final(bench.run(PLAIN, schedule="constant", total_steps=2), tmp_path, hooks=Recorder())
    best = bench.weights()
    hooks, store = Recorder(), MemoryStore()
    plan = {"schedule": "constant", "total_steps": 20, "eval_steps": 1, "patience": 2}
    outcome = final(
        bench.run(PLAIN, **plan), tmp_path, hooks=hooks, store=store,
        validate=scripted([0.7, 0.5, 0.6, 0.5, 0.1]),
    )  # fmt: skip
    assert (outcome.ended_by, outcome.steps, outcome.best_step) == (EndedBy.BUDGET, 4, 2)
    assert_same(bench.weights(), best)
    assert store.saved is not None
    last = {n.removeprefix("adapter."): t for n, t in store.saved.tensors.items() if n[0] == "a"}
    assert any(not torch.equal(last[name], best[name]) for name in best)
    again = final(
        bench.run(PLAIN, **plan), tmp_path, hooks=Recorder(), store=store, validate=scripted([])
    )
    assert_same(bench.weights(), best)
    assert (again.steps, again.best_step) == (4, 2)


def test_a_run_that_was_over_when_it_was_killed_takes_no_more_steps(
    bench: Bench, tmp_path: Path
) -> None:
    class Dies(MemoryStore):
        """Dies when the end is to be saved."""

        def save(self, state: SavedState) -> None:
            if state.ended:
                raise InterruptedError
            super().save(state)

    plan = {"schedule": "constant", "total_steps": 20, "eval_steps": 2, "patience": 1}
    killed = Dies(every_step=True)
    with pytest.raises(InterruptedError):
        final(
            bench.run(PLAIN, **plan), tmp_path, hooks=Recorder(), store=killed,
            validate=scripted([0.5, 0.6]),
        )  # fmt: skip
    store, hooks = MemoryStore(), Recorder()
    store.saved = killed.saved
    outcome = final(
        bench.run(PLAIN, **plan), tmp_path, hooks=hooks, store=store, validate=scripted([])
    )
    assert (outcome.steps, outcome.best_step, hooks.points) == (4, 2, {})
    assert store.saved is not None
    assert store.saved.ended


def test_a_score_that_is_not_finite_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    outcome = final(
        bench.run(PLAIN, eval_steps=2), tmp_path, hooks=Recorder(),
        validate=scripted([0.5, math.nan]),
    )  # fmt: skip
    assert outcome.ended_by is EndedBy.NAN
    assert outcome.message == "log-probs on validation are not finite after step 4"


def test_a_run_that_diverges_names_step_and_pairs(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(PLAIN, learning_rate=1e18, schedule="constant", max_grad_norm=100.0)
    outcome = final(run, tmp_path, hooks=Recorder())
    assert outcome.ended_by is EndedBy.NAN
    assert "loss or gradient is not finite at step 2; pairs pair" in outcome.message


class TestFull:
    def test_the_first_step_is_the_reference_and_all_weights_move(
        self, full: Bench, states: ReferenceStates, tmp_path: Path
    ) -> None:
        hooks = Recorder()
        run = full.run(HMK, states=states)
        before = full.weights()
        outcome = final(run, tmp_path, hooks=hooks)
        assert outcome.ended_by is EndedBy.BUDGET
        assert hooks.points[1]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert hooks.points[1]["divergence/token"] == pytest.approx(0.0, abs=1e-5)
        assert hooks.points[6]["divergence/token"] > 0
        after = full.weights()
        assert all(not torch.equal(before[name], after[name]) for name in before)

    def test_gradients_are_those_of_the_plain_loss(
        self, full: Bench, states: ReferenceStates
    ) -> None:
        """Against two forwards with transformers' own logits."""
        run = full.run(PLAIN)
        policy, pair = full.policy, full.pairs[0]

        def log_prob(answer: tuple[int, ...]) -> torch.Tensor:
            ids = torch.tensor([pair.prompt + answer])
            logits = policy.causal(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            start = len(pair.prompt) - 1
            return logits[0, torch.arange(start, start + len(answer)), list(answer)].sum()

        run.pair_step.accumulate([0], denominator=1, clear=policy.model.zero_grad)
        found = {n: p.grad.clone() for n, p in policy.adapter().items() if p.grad is not None}
        policy.model.zero_grad()
        margin = log_prob(pair.chosen) - log_prob(pair.rejected)
        margin = margin - (full.table.chosen_log_prob[0] - full.table.rejected_log_prob[0])
        (-torch.nn.functional.logsigmoid(0.5 * margin)).backward()
        assert found.keys() == policy.adapter().keys()
        for name, parameter in policy.adapter().items():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)

    def test_stopped_and_resumed_equals_uninterrupted(
        self, full: Bench, states: ReferenceStates, tmp_path: Path
    ) -> None:
        whole, store, second = Recorder(), MemoryStore(), Recorder()
        validate = validation(full, states)
        final(full.run(HMK, states=states, eval_steps=2), tmp_path, hooks=whole, validate=validate)
        expected = full.weights()
        with pytest.raises(InterruptedError):
            final(
                full.run(HMK, states=states, eval_steps=2), tmp_path, hooks=Recorder(3),
                store=store, validate=validate,
            )  # fmt: skip
        final(
            full.run(HMK, states=states, eval_steps=2), tmp_path, hooks=second, store=store,
            validate=validate,
        )  # fmt: skip
        assert second.points == {s: v for s, v in whole.points.items() if s > 3}
        assert_same(full.weights(), expected)

    def test_the_reference_is_what_the_folder_says_whatever_was_trained(
        self, full: Bench, states: ReferenceStates, tmp_path: Path
    ) -> None:
        full.policy.reset_adapter(0)
        base = full.weights()
        final(full.run(PLAIN, learning_rate=0.05), tmp_path, hooks=Recorder())
        trained = full.weights()
        with full.policy.as_reference():
            assert_same(full.weights(), base)
        assert_same(full.weights(), trained)
        measured = measure(
            full.policy, full.pairs, reference=states, progress=lambda _done, _total: None
        )
        assert measured.drift > 0
        assert measured.margins.mean() > 0
        full.policy.reset_adapter(0)
        fresh = measure(
            full.policy, full.pairs, reference=states, progress=lambda _done, _total: None
        )
        assert float(abs(fresh.margins).max()) == 0.0
        assert fresh.drift == pytest.approx(0.0, abs=1e-6)

    def test_what_needs_stored_states_says_so(self, full: Bench) -> None:
        with pytest.raises(RunAborted, match="REFERENCE_STATES_BYTES") as caught:
            full.run(HMK)
        assert caught.value.failure is FailureCode.OUT_OF_MEMORY
        with pytest.raises(RunAborted, match="drift on held-out pairs"):
            measure(full.policy, full.pairs, progress=lambda _done, _total: None)

    def test_bfloat16_computes_in_it_and_keeps_float32(
        self, llama_folder: Path, tmp_path: Path
    ) -> None:
        bench = Bench(
            micro_policy(llama_folder, adaptation="full", precision="bfloat16"), random_pairs(12)
        )
        assert all(p.dtype is torch.float32 for p in bench.policy.adapter().values())
        hooks = Recorder()
        outcome = final(bench.run(PLAIN, total_steps=8), tmp_path, hooks=hooks)
        assert outcome.ended_by is EndedBy.BUDGET
        assert hooks.points[8]["loss"] < 0.6
        assert "bfloat16" in bench.policy.precision


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing_but_memory(
    llama_folder: Path, tmp_path: Path, adaptation: str
) -> None:
    curves = []
    for kept in (True, False):
        policy = micro_policy(llama_folder, adaptation=adaptation, gradient_checkpointing=not kept)
        bench, hooks = Bench(policy, random_pairs(12)), Recorder()
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            final(bench.run(PLAIN, total_steps=3), tmp_path, hooks=hooks)
        curves.append(([v["loss"] for v in hooks.points.values()], saved))
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)
    assert 0 < curves[1][1] < 0.8 * curves[0][1]


def test_what_a_run_held_is_given_back(bench: Bench, tmp_path: Path) -> None:
    store = MemoryStore()
    run = bench.run(PLAIN, total_steps=2)
    optimizer = weakref.ref(run.optimizer)
    gc.disable()
    try:
        final(run, tmp_path, hooks=Recorder(), store=store)
        assert all(p.grad is None for p in bench.policy.adapter().values())
        del run
        assert optimizer() is None, "something refers to it still"
    finally:
        gc.enable()


def test_an_ended_run_is_read_back_without_its_moments(bench: Bench, tmp_path: Path) -> None:
    store = MemoryStore()
    final(bench.run(PLAIN, total_steps=2), tmp_path, hooks=Recorder(), store=store)
    weights = bench.weights()
    run = bench.run(PLAIN, total_steps=2)
    assert store.saved is not None
    assert any(name.endswith("exp_avg") for name in store.saved.tensors)
    final(run, tmp_path, hooks=Recorder(), store=store)
    assert_same(bench.weights(), weights)
    assert not run.optimizer.state
    run.restore(replace(store.saved, ended=False))
    assert run.optimizer.state


def test_memory_that_ends_in_the_optimizer_is_not_blamed_on_the_pairs(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_device(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("moments")

    monkeypatch.setattr(torch.optim.AdamW, "step", full_device)
    outcome = final(bench.run(PLAIN), tmp_path, hooks=Recorder())
    trial = bench.train(PLAIN, hooks=Recorder())
    for found in (outcome, trial):
        assert found.ended_by is EndedBy.OOM
        assert "optimizer" in found.message
        assert "pair" not in found.message


def test_four_bits_are_refused_where_they_cannot_be_had(llama_folder: Path) -> None:
    with pytest.raises(RunAborted, match="4bit` needs a CUDA device") as caught:
        micro_policy(llama_folder, quantization="4bit")
    assert caught.value.failure is FailureCode.DEPENDENCY_ERROR


def test_trackers_that_are_not_installed_are_refused() -> None:
    check_trackers(())
    with pytest.raises(RunAborted, match="TRACKERS names no-such-tracker; installed") as caught:
        check_trackers(("no-such-tracker",))
    assert caught.value.failure is FailureCode.DEPENDENCY_ERROR


def test_plans_of_watched_runs() -> None:
    spec = TrainSpec(eval_every=0.25, early_stopping_patience=3, batch_size=10)
    plan = resolve_plan(spec, num_pairs=400, hidden_size=64, seed=1, watched=True)
    assert (plan.total_steps, plan.eval_steps, plan.patience) == (40, 10, 3)
    trial = resolve_plan(spec, num_pairs=400, hidden_size=64, seed=1)
    assert (trial.eval_steps, trial.patience) == (None, None)
    by_steps = resolve_plan(
        TrainSpec(eval_every=7), num_pairs=400, hidden_size=64, seed=1, watched=True
    )
    assert by_steps.eval_steps == 7
    rate = resolve_plan(TrainSpec(adaptation="full"), num_pairs=9, hidden_size=512, seed=1)
    assert rate.learning_rate == pytest.approx(auto_learning_rate(512) / 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"early_stopping_patience": 2}, "eval_every is not set"),
        ({"eval_every": 2.5}, "neither a fraction below 1 nor a whole number"),
        ({"adaptation": "full", "quantization": "4bit"}, "drop one of the two"),
        ({"adaptation": "full", "lora": {"r": 4}}, "adaptation `full` has none"),
    ],
)
def test_combinations_that_would_be_ignored_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSpec.model_validate(values)
