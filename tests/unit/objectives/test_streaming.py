"""Streamed scores against the plain functions: values, gradients, extremes, cost, surroundings."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.spec import (
    HellingerSpec,
    KernelTerm,
    KlSpec,
    MixtureKernelSpec,
    ObjectiveSpec,
    PenaltyTerm,
    WassersteinSpec,
)
from objectives import (
    Divergence,
    Head,
    PairEmbeddings,
    PreferenceBatch,
    StreamedScores,
    build_divergence,
    build_objective,
    per_pair_mean,
    segment_sum,
    stream_scores,
    streamed_divergence,
    token_log_probs,
)
from objectives.divergences.closed_forms import RUN
from tests.unit.objectives.samples import generator, geometry64, seeds
from tests.unit.objectives.test_divergences import CASES, HEAD, Case
from tests.unit.objectives.tolerances import STREAMED_SMALL_DRIFT, close

ROOT = Path(__file__).parents[3]
RANK = """
import faulthandler, sys
faulthandler.dump_traceback_later(120, exit=True)
from tests.unit.objectives.test_streaming import run_rank
run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""

VOCABULARY, WIDTH = HEAD.shape
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@dataclass(frozen=True)
class Tokens:
    """States (N, H) of policy and reference, labels (N,), an output layer and loss weights (N,)."""

    states: Tensor
    reference: Tensor
    labels: Tensor
    head: Head
    to_log_prob: Tensor
    to_divergence: Tensor


def tokens(
    seed: int = 0,
    *,
    count: int = 11,
    vocabulary: int = VOCABULARY,
    width: int = WIDTH,
    spread: float = 1.0,
    drift: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> Tokens:
    rng = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    states = normal(count, width)
    return Tokens(
        states=states.to(dtype).requires_grad_(),
        reference=(states + drift * normal(count, width)).to(dtype),
        labels=torch.randint(vocabulary, (count,), generator=rng),
        head=Head((spread * normal(vocabulary, width)).to(dtype), normal(vocabulary).to(dtype)),
        to_log_prob=normal(count).to(dtype),
        to_divergence=normal(count).to(dtype),
    )


def logits(states: Tensor, head: Head) -> Tensor:
    return nn.functional.linear(states, head.weight, head.bias)


def plain(t: Tokens, exact: Divergence, reference_head: Head | None = None) -> StreamedScores:
    """The same scores from whole logits."""
    scores = logits(t.states, t.head)
    log_p = scores.log_softmax(-1)
    log_q = logits(t.reference, reference_head or t.head).log_softmax(-1)
    return StreamedScores(
        log_prob=token_log_probs(scores, t.labels),
        divergence=exact(log_p, log_q.detach()),
        entropy=torch.special.entr(log_p.exp()).sum(-1).detach(),
    )


def streamed(
    t: Tokens,
    case: Case,
    exact: Divergence,
    *,
    tile: int | None = 40,
    reference_head: Head | None = None,
) -> StreamedScores:
    return stream_scores(
        t.states,
        t.labels,
        t.head,
        divergence=streamed_divergence(case.spec, exact),
        reference_states=t.reference,
        reference_head=reference_head,
        entropy=True,
        tile_elements=tile,
    )


def loss(t: Tokens, scores: StreamedScores) -> Tensor:
    assert scores.divergence is not None
    return (t.to_log_prob * scores.log_prob + t.to_divergence * scores.divergence).sum()


def assert_same(
    t: Tokens, actual: StreamedScores, expected: StreamedScores, *leaves: Tensor
) -> None:
    dtype = t.states.dtype
    assert actual.divergence is not None
    assert actual.entropy is not None
    close(actual.log_prob, expected.log_prob.detach(), dtype=dtype)
    close(actual.divergence, expected.divergence.detach(), dtype=dtype)
    close(actual.entropy, expected.entropy, dtype=dtype)
    of_actual = torch.autograd.grad(loss(t, actual), leaves)
    of_expected = torch.autograd.grad(loss(t, expected), leaves)
    for one, other in zip(of_actual, of_expected, strict=True):
        close(one, other, dtype=dtype)


@every_case
class TestEveryDivergence:
    @given(
        seed=seeds,
        spread=st.floats(min_value=0.1, max_value=30.0),
        drift=st.floats(min_value=0.01, max_value=3.0),
        tile=st.integers(min_value=1, max_value=100),
    )
    @settings(deadline=None, max_examples=12)
    def test_is_the_plain_function_and_its_gradient(
        self, case: Case, seed: int, spread: float, drift: float, tile: int
    ) -> None:
        """Whatever the tile; spreads of 30 reach floors and knees."""
        t = tokens(seed, spread=spread, drift=drift)
        exact = build_divergence(case.spec, head=HEAD)
        scores = streamed(t, case, exact, tile=tile)
        expected = plain(t, exact)
        assert scores.divergence is not None
        assert expected.divergence is not None
        scale = float(expected.divergence.detach().abs().max()) + 1.0
        smaller = replace(t, to_divergence=t.to_divergence / scale)
        tight = (1e-9, 1e-9 * scale)
        torch.testing.assert_close(scores.divergence, expected.divergence, rtol=1e-9, atol=tight[1])
        close(scores.log_prob, expected.log_prob.detach(), dtype=torch.float64)
        one, other = (
            torch.autograd.grad(loss(smaller, s), t.states)[0] for s in (scores, expected)
        )
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * (1 + spread))

    def test_gradient_matches_finite_differences(self, case: Case) -> None:
        t = tokens(3, count=4, width=3)
        exact = build_divergence(case.spec, head=HEAD)

        def scores(states: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            out = streamed(
                replace(t, states=states, head=Head(weight, bias)),
                case,
                exact,
                reference_head=t.head,
                tile=14,
            )
            assert out.divergence is not None
            return out.log_prob, out.divergence

        bias = t.head.bias
        assert bias is not None
        frozen = (t.states, t.head.weight, bias)
        trained = (t.states, t.head.weight.clone().requires_grad_(), bias.clone().requires_grad_())
        assert torch.autograd.gradcheck(scores, frozen)
        assert torch.autograd.gradcheck(scores, trained)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("row", "value"),
        [(0, -math.inf), (2, 1e4), (2, -1e4), (3, -9e3), (5, 300.0)],
        ids=["impossible", "up", "down", "near the floor", "knee"],
    )
    def test_extreme_logits_keep_tails_and_floors(
        self, case: Case, dtype: torch.dtype, row: int, value: float
    ) -> None:
        """One token impossible, certain or hopeless: under both, under one of them."""
        t = tokens(4, dtype=dtype)
        exact = build_divergence(case.spec, head=HEAD.to(dtype))
        assert t.head.bias is not None
        extreme = t.head.bias.clone()
        extreme[row] = value
        labels = torch.where(t.labels == row, (row + 1) % VOCABULARY, t.labels)
        odd = Head(t.head.weight, extreme)
        for head, base in ((odd, None), (odd, t.head), (t.head, odd)):
            case_tokens = replace(t, head=head, labels=labels)
            actual = streamed(case_tokens, case, exact, reference_head=base)
            expected = plain(case_tokens, exact, base)
            one, other = (
                torch.autograd.grad(loss(case_tokens, s), t.states)[0] for s in (actual, expected)
            )
            assert bool(torch.isfinite(actual.divergence).all())
            assert bool(torch.isfinite(one).all())
            rtol = 1e-9 if dtype == torch.float64 else 2e-4
            size = float(other.abs().max())
            torch.testing.assert_close(actual.divergence, expected.divergence, rtol=rtol, atol=rtol)
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * size)

    def test_an_extreme_token_leaves_its_neighbours_alone(self, case: Case) -> None:
        """In one block: rows that need the plain functions and rows that do not."""
        t = tokens(19, dtype=torch.float32)
        far = torch.zeros(11, 1)
        far[4], far[9] = 400.0, -60.0
        with torch.no_grad():
            t.states.add_(far)
        exact = build_divergence(case.spec, head=HEAD.float())
        actual, expected = streamed(t, case, exact, tile=None), plain(t, exact)
        assert actual.divergence is not None
        # Two roundings of the logits of the extreme tokens, which reach 2,000.
        torch.testing.assert_close(actual.divergence, expected.divergence, rtol=2e-3, atol=1e-5)
        near = [i for i in range(11) if i not in (4, 9)]
        alone = replace(
            t, states=t.states[near], reference=t.reference[near], labels=t.labels[near]
        )
        without = streamed(alone, case, exact, tile=None)
        close(actual.divergence[near], without.divergence.detach(), dtype=torch.float32)
        close(actual.log_prob[near], without.log_prob.detach(), dtype=torch.float32)
        close(actual.entropy[near], without.entropy, dtype=torch.float32)
        (whole,) = torch.autograd.grad(actual.divergence.sum(), t.states)
        (part,) = torch.autograd.grad(without.divergence.sum(), t.states)
        close(whole[near], part[near], dtype=torch.float32)
        assert bool(torch.isfinite(whole).all())

    def test_equal_states_are_no_drift_and_no_gradient(self, case: Case) -> None:
        t = tokens(5, dtype=torch.float32)
        t = replace(t, reference=t.states.detach(), to_log_prob=torch.zeros(11))
        out = streamed(t, case, build_divergence(case.spec, head=HEAD))
        assert out.divergence is not None
        assert out.divergence.tolist() == [0.0] * 11
        (gradient,) = torch.autograd.grad(loss(t, out), t.states)
        assert float(gradient.abs().max()) <= 1e-6

    def test_float32_agrees_with_float64(self, case: Case) -> None:
        """Relative to float64 arithmetic on the same float32 inputs."""
        t = tokens(6, count=24, vocabulary=4000, width=32, spread=0.5, dtype=torch.float32)
        rows = torch.randn(4000, 4, generator=generator(1))
        single = streamed(t, case, build_divergence(case.spec, head=rows), tile=20_000)
        wide = replace(
            t,
            states=t.states.detach().double().requires_grad_(),
            reference=t.reference.double(),
            head=Head(t.head.weight.double(), t.head.bias.double()),
        )
        double = plain(wide, build_divergence(case.spec, head=rows.double()))
        assert single.divergence is not None
        assert double.divergence is not None
        error = (single.divergence - double.divergence).abs() / double.divergence
        assert float(error.detach().max()) <= 1e-5
        (one,) = torch.autograd.grad(single.divergence.sum(), t.states)
        (other,) = torch.autograd.grad(double.divergence.sum(), wide.states)
        assert float((one - other).norm() / other.norm()) <= 1e-5

    def test_small_drift_keeps_more_digits_than_whole_logits(self, case: Case) -> None:
        """D of 1e-5 and less: logits of policy and reference differ in their last digits."""
        t = tokens(
            7, count=8, vocabulary=4000, width=32, spread=0.5, drift=1e-3, dtype=torch.float32
        )
        rows = torch.randn(4000, 4, generator=generator(1))
        exact = build_divergence(case.spec, head=rows)
        wide = replace(
            t,
            states=t.states.double(),
            reference=t.reference.double(),
            head=Head(t.head.weight.double(), t.head.bias.double()),
        )
        truth = plain(wide, build_divergence(case.spec, head=rows.double())).divergence
        tiled, whole = streamed(t, case, exact).divergence, plain(t, exact).divergence
        assert truth is not None
        assert tiled is not None
        assert whole is not None
        tiled_error, whole_error = (
            float(((x - truth).abs() / truth).detach().max()) for x in (tiled, whole)
        )
        assert tiled_error <= STREAMED_SMALL_DRIFT
        assert tiled_error < whole_error

    def test_a_reference_with_its_own_head_and_width(self, case: Case) -> None:
        t = tokens(8)
        other = tokens(9, width=3)
        t = replace(t, reference=other.reference)
        exact = build_divergence(case.spec, head=HEAD)
        actual = streamed(t, case, exact, reference_head=other.head)
        assert_same(t, actual, plain(t, exact, other.head), t.states)

    def test_a_trained_head_gets_its_gradient(self, case: Case) -> None:
        t = tokens(10)
        frozen = t.head
        assert frozen.bias is not None
        weight, bias = frozen.weight.clone().requires_grad_(), frozen.bias.clone().requires_grad_()
        t = replace(t, head=Head(weight, bias))
        exact = build_divergence(case.spec, head=HEAD)
        actual = streamed(t, case, exact, reference_head=frozen)
        assert_same(t, actual, plain(t, exact, frozen), t.states, weight, bias)

    def test_low_precision_states_are_computed_in_float32(self, case: Case) -> None:
        t = tokens(11, dtype=torch.bfloat16)
        exact = build_divergence(case.spec, head=HEAD)
        out = streamed(t, case, exact)
        assert out.divergence is not None
        assert out.divergence.dtype == out.log_prob.dtype == torch.float32
        wide = replace(
            t,
            states=t.states.detach().double().requires_grad_(),
            reference=t.reference.double(),
            head=Head(t.head.weight.double(), t.head.bias.double()),
            to_log_prob=t.to_log_prob.double(),
            to_divergence=t.to_divergence.double(),
        )
        expected = plain(wide, exact)
        close(out.divergence, expected.divergence.detach(), dtype=torch.float32)
        (one,) = torch.autograd.grad(loss(t, out), t.states)
        (other,) = torch.autograd.grad(loss(wide, expected), wide.states)
        assert one.dtype == torch.bfloat16
        close(one.float(), other, dtype=torch.bfloat16)

    def test_autocast_around_it_changes_nothing(self, case: Case) -> None:
        t = tokens(12, dtype=torch.float32)
        exact = build_divergence(case.spec, head=HEAD.float())
        expected = streamed(t, case, exact)
        (wanted,) = torch.autograd.grad(loss(t, expected), t.states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = streamed(t, case, exact)
            (given_back,) = torch.autograd.grad(loss(t, actual), t.states)
        assert torch.equal(actual.divergence, expected.divergence)
        assert torch.equal(given_back, wanted)

    @pytest.mark.gpu
    @cuda
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_cuda_agrees_with_cpu(self, case: Case, dtype: torch.dtype) -> None:
        t = tokens(13, count=40, vocabulary=500, width=64, spread=0.3, dtype=dtype)
        rows = torch.randn(500, 4, generator=generator(1))
        there = replace(
            t,
            states=t.states.detach().cuda().requires_grad_(),
            reference=t.reference.cuda(),
            labels=t.labels.cuda(),
            head=Head(t.head.weight.cuda(), t.head.bias.cuda()),
            to_log_prob=t.to_log_prob.cuda(),
            to_divergence=t.to_divergence.cuda(),
        )
        here = streamed(t, case, build_divergence(case.spec, head=rows))
        out = streamed(there, case, build_divergence(case.spec, head=rows.cuda()))
        rtol = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.divergence.cpu(), here.divergence, rtol=rtol, atol=rtol)
        (one,) = torch.autograd.grad(loss(there, out), there.states)
        (other,) = torch.autograd.grad(loss(t, here), t.states)
        torch.testing.assert_close(one.cpu(), other, rtol=rtol, atol=rtol)


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation returned, and how many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            assert isinstance(out, Tensor)
            self.products.append(tuple(out.shape))
        return out


@every_case
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_no_tensor_grows_with_tokens_times_vocabulary(case: Case, trained: bool) -> None:
    t = tokens(14, count=600, vocabulary=50)
    t = replace(t, head=Head(t.head.weight.requires_grad_(trained), t.head.bias))
    exact = build_divergence(case.spec, head=torch.randn(50, 3, generator=generator(2)))
    with Recorder() as recorder:
        loss(t, streamed(t, case, exact, tile=1000, reference_head=t.head)).backward()
    assert recorder.largest <= max(2 * 1000, t.states.numel())
    assert 2 * 1000 < 600 * 50


def test_a_frozen_head_costs_three_products_and_backward_none() -> None:
    """Policy and reference in one product, both gradients in another; weighing is no product."""
    t = tokens(15, count=20)
    case = CASES["kl"]
    with Recorder() as recorder:
        scores = streamed(t, case, build_divergence(case.spec, head=None), tile=VOCABULARY * 10)
    assert recorder.products == [(20, VOCABULARY), (20, WIDTH)] * 2
    with Recorder() as recorder:
        loss(t, scores).backward()
    assert recorder.products == []
    assert t.head.weight.grad is None


def test_without_gradients_only_the_logits_are_computed() -> None:
    t = tokens(16, count=20)
    case = CASES["kl"]
    with torch.no_grad(), Recorder() as recorder:
        scores = streamed(t, case, build_divergence(case.spec, head=None), tile=None)
    assert recorder.products == [(40, VOCABULARY)]
    assert not scores.log_prob.requires_grad


def test_log_probabilities_alone() -> None:
    t = tokens(17)
    scores = stream_scores(t.states, t.labels, t.head, tile_elements=20)
    assert scores.divergence is None
    assert scores.entropy is None
    expected = token_log_probs(logits(t.states, t.head), t.labels)
    close(scores.log_prob, expected.detach(), dtype=torch.float64)
    weighed = [(t.to_log_prob * s).sum() for s in (scores.log_prob, expected)]
    one, other = (torch.autograd.grad(total, t.states)[0] for total in weighed)
    close(one, other, dtype=torch.float64)


def test_no_tokens_are_no_scores() -> None:
    t = tokens(18, count=0)
    case = CASES["kl"]
    scores = streamed(t, case, build_divergence(case.spec, head=None))
    loss(t, scores).backward()
    assert scores.log_prob.shape == (0,)
    assert t.states.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("vocabulary", [1, 2, RUN - 1, RUN, RUN + 1, 2 * RUN, 5 * RUN + 3])
def test_wasserstein_whatever_the_vocabulary_leaves_of_its_last_run(vocabulary: int) -> None:
    t = tokens(22, vocabulary=vocabulary)
    case = CASES["wasserstein"]
    head = torch.randn(vocabulary, 3, generator=generator(3), dtype=torch.float64)
    exact = build_divergence(case.spec, head=head)
    assert_same(t, streamed(t, case, exact, tile=None), plain(t, exact), t.states)


def test_disjoint_distributions_keep_the_digits_of_the_affinity() -> None:
    """Bhattacharyya of distributions that share e^-15 of their mass, in float32."""
    head = Head(torch.eye(2), None)
    states = torch.tensor([[15.0, -15.0]], requires_grad=True)
    case = CASES["bhattacharyya"]
    scores = stream_scores(
        states,
        torch.tensor([0]),
        head,
        divergence=streamed_divergence(case.spec, build_divergence(case.spec, head=None)),
        reference_states=torch.tensor([[-15.0, 15.0]]),
    )
    assert scores.divergence is not None
    close(scores.divergence, [4 * (15 - math.log(2.0))], dtype=torch.float32)
    (gradient,) = torch.autograd.grad(scores.divergence.sum(), states)
    close(gradient, [[1.0, -1.0]], dtype=torch.float32)


class TestSurroundings:
    """Batch-coupled losses, accumulation, compilation, several processes."""

    @staticmethod
    def objective_loss(rows: slice) -> Callable[[nn.Module], Tensor]:
        """Summed loss of some of 6 pairs: HMK on pooled states, a streamed penalty, log-ratios."""
        spec = ObjectiveSpec(
            kernel_term=KernelTerm(kernel=MixtureKernelSpec(), gamma=0.5),
            divergence_term=PenaltyTerm(divergence=HellingerSpec(), alpha=2.0),
        )
        objective = build_objective(spec, geometry=geometry64(), head=None)
        t = tokens(20, count=6 * 2 * 4, width=12)
        inputs = t.states.detach().view(6, 2, 4, 12)[rows]
        labels = t.labels.view(6, 2, 4)[rows].reshape(-1)
        base = t.reference.view(6, 2, 4, 12)[rows].reshape(-1, 12)
        pairs = inputs.shape[0]
        index = torch.arange(pairs).repeat_interleave(8)

        def run(trunk: nn.Module) -> Tensor:
            states = trunk(inputs)
            assert objective.divergence is not None
            divergence = streamed_divergence(HellingerSpec(), objective.divergence)
            scores = stream_scores(
                states.reshape(-1, 12),
                labels,
                t.head,
                divergence=divergence,
                reference_states=base,
                tile_elements=30,
            )
            assert scores.divergence is not None
            answers = torch.arange(2 * pairs).repeat_interleave(4)
            sums = segment_sum(scores.log_prob, answers, 2 * pairs).view(pairs, 2)
            pooled = states.mean(2)
            batch = PreferenceBatch(
                log_ratio_chosen=sums[:, 0],
                log_ratio_rejected=sums[:, 1],
                embeddings=PairEmbeddings(states[:, 0, 0], pooled[:, 0], pooled[:, 1]),
                token_divergence=per_pair_mean(scores.divergence, index, pairs),
            )
            return objective(batch).loss.sum()

        return run

    @staticmethod
    def trunk() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double()

    def gradients(self, trunk: nn.Module) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in trunk.parameters()]

    def test_micro_batches_add_up_to_the_batch(self) -> None:
        whole, parts = self.trunk(), self.trunk()
        self.objective_loss(slice(None))(whole).backward()
        for start in (0, 2, 4):
            self.objective_loss(slice(start, start + 2))(parts).backward()
        for one, other in zip(self.gradients(parts), self.gradients(whole), strict=True):
            close(one, other, dtype=torch.float64)

    def test_a_compiled_model_around_it(self) -> None:
        plain_trunk, compiled = self.trunk(), self.trunk()
        self.objective_loss(slice(None))(plain_trunk).backward()
        step = torch.compile(compiled, backend="aot_eager")
        assert isinstance(step, nn.Module)
        self.objective_loss(slice(None))(step).backward()
        for one, other in zip(self.gradients(compiled), self.gradients(plain_trunk), strict=True):
            close(one, other, dtype=torch.float64)

    def test_a_compiled_step_breaks_at_it_and_goes_on(self) -> None:
        t = tokens(21)

        def step(states: Tensor) -> Tensor:
            return stream_scores(2.0 * states, t.labels, t.head).log_prob * 3.0

        compiled = torch.compile(step, backend="aot_eager")(t.states)
        expected = step(t.states)
        close(compiled, expected.detach(), dtype=torch.float64)
        one, other = (torch.autograd.grad(x.sum(), t.states)[0] for x in (compiled, expected))
        close(one, other, dtype=torch.float64)

    def test_two_processes_give_the_gradient_of_the_batch(self, tmp_path: Path) -> None:
        whole = self.trunk()
        self.objective_loss(slice(None))(whole).backward()
        # The store lives here and not in a rank, which could end while the other still asks it.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        logs = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                command = [sys.executable, "-c", RANK, str(rank), str(store.port), str(tmp_path)]
                ranks.append(subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT))
        try:
            codes = [process.wait(timeout=150) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
        shared = torch.load(f"{tmp_path}/gradients.pt")
        for one, other in zip(shared, self.gradients(whole), strict=True):
            # DistributedDataParallel takes the mean over its two processes.
            close(2.0 * one, other, dtype=torch.float64)


def run_rank(rank: int, port: int, folder: str) -> NoReturn:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(TestSurroundings.trunk())
    TestSurroundings.objective_loss(slice(3 * rank, 3 * rank + 3))(model).backward()
    if rank == 0:
        gradients = [parameter.grad for parameter in model.parameters()]
        torch.save(gradients, f"{folder}/gradients.pt")
    torch.distributed.barrier()
    # What is tested is done; how gloo's threads wind down is not ours and has been seen to hang.
    os._exit(0)


class TestMessages:
    def test_labels_of_another_length(self) -> None:
        t = tokens()
        with pytest.raises(ValueError, match="give one label for each hidden state"):
            stream_scores(t.states, t.labels[1:], t.head)

    def test_a_divergence_without_reference_states(self) -> None:
        t = tokens()
        kl = streamed_divergence(KlSpec(), build_divergence(KlSpec(), head=None))
        with pytest.raises(ValueError, match="pass both or none"):
            stream_scores(t.states, t.labels, t.head, divergence=kl)
        with pytest.raises(ValueError, match="pass both or none"):
            stream_scores(t.states, t.labels, t.head, reference_states=t.reference)

    def test_a_reference_head_without_states(self) -> None:
        t = tokens()
        with pytest.raises(ValueError, match="would be ignored"):
            stream_scores(t.states, t.labels, t.head, reference_head=t.head)

    def test_states_that_do_not_fit_the_head(self) -> None:
        t = tokens()
        with pytest.raises(ValueError, match=r"policy states have shape \(11, 4\), expected"):
            stream_scores(t.states[:, :4], t.labels, t.head)

    def test_heads_over_two_vocabularies(self) -> None:
        t = tokens()
        kl = streamed_divergence(KlSpec(), build_divergence(KlSpec(), head=None))
        with pytest.raises(ValueError, match="must be over one vocabulary"):
            stream_scores(
                t.states,
                t.labels,
                t.head,
                divergence=kl,
                reference_states=t.reference,
                reference_head=Head(t.head.weight[:3]),
            )

    def test_wasserstein_needs_its_directions(self) -> None:
        with pytest.raises(ValueError, match="pass what build_divergence returned"):
            streamed_divergence(WassersteinSpec(), build_divergence(KlSpec(), head=None))
