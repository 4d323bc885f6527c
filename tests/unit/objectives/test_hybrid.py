"""The whole objective: DPO at the neutral setting, its terms by hand, signs, extremes, messages."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.spec import (
    DivergenceSpec,
    FAlpha,
    FDivergenceSpec,
    FForwardKl,
    HellingerSpec,
    JensenShannonSpec,
    KernelSpec,
    KernelTerm,
    KlSpec,
    LinkTerm,
    MahalanobisKernelSpec,
    MixtureKernelSpec,
    ObjectiveSpec,
    PenaltyTerm,
    PolynomialKernelSpec,
    RbfKernelSpec,
    RenyiSpec,
    SpectralKernelSpec,
)
from objectives import (
    HybridObjective,
    PairEmbeddings,
    PreferenceBatch,
    build_kernel,
    build_objective,
)
from tests.unit.objectives.samples import embeddings, generator, geometry64
from tests.unit.objectives.tolerances import close

GEOMETRY = geometry64()
KERNELS: list[KernelSpec] = [
    RbfKernelSpec(),
    PolynomialKernelSpec(),
    MahalanobisKernelSpec(),
    SpectralKernelSpec(landmarks=32, rank=8),
    MixtureKernelSpec(),
]
LINKS: list[DivergenceSpec] = [
    KlSpec(),
    JensenShannonSpec(),
    HellingerSpec(),
    RenyiSpec(order=0.5),
    RenyiSpec(order=3.0),
    FDivergenceSpec(f=FForwardKl()),
    FDivergenceSpec(f=FAlpha(order=0.3)),
]
ratios = st.floats(min_value=-50.0, max_value=50.0)


def by_type(spec: DivergenceSpec | KernelSpec) -> str:
    return spec.type


def build(spec: ObjectiveSpec) -> HybridObjective:
    return build_objective(spec, geometry=GEOMETRY, head=None)


def pairs(
    chosen: list[float],
    rejected: list[float],
    *,
    dtype: torch.dtype = torch.float64,
    with_embeddings: PairEmbeddings | None = None,
    divergence: list[float] | None = None,
    weight: list[float] | None = None,
) -> PreferenceBatch:
    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return PreferenceBatch(
        log_ratio_chosen=tensor(chosen).requires_grad_(),
        log_ratio_rejected=tensor(rejected).requires_grad_(),
        embeddings=with_embeddings,
        token_divergence=None if divergence is None else tensor(divergence).requires_grad_(),
        weight=None if weight is None else tensor(weight),
    )


def few(count: int = 2) -> PairEmbeddings:
    batch = embeddings()
    return PairEmbeddings(batch.prompt[:count], batch.chosen[:count], batch.rejected[:count])


class TestDpo:
    @given(chosen=ratios, rejected=ratios, beta=st.floats(0.01, 5.0), eps=st.floats(0.0, 0.49))
    @settings(deadline=None, max_examples=40)
    def test_without_terms_it_is_dpo(
        self, chosen: float, rejected: float, beta: float, eps: float
    ) -> None:
        objective = build(ObjectiveSpec(beta=beta, label_smoothing=eps))
        out = objective(pairs([chosen], [rejected]))
        z = beta * (chosen - rejected)
        log_sigma = -max(-z, 0.0) - math.log1p(math.exp(-abs(z)))
        log_minus = -max(z, 0.0) - math.log1p(math.exp(-abs(z)))
        close(out.loss, [-(1 - eps) * log_sigma - eps * log_minus], dtype=torch.float64)
        assert float(out.regularizer) == 0.0

    @pytest.mark.parametrize("eps", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_at_the_start_the_loss_is_log_two_and_margins_are_zero(
        self, dtype: torch.dtype, eps: float
    ) -> None:
        objective = build(ObjectiveSpec(label_smoothing=eps))
        out = objective(pairs([0.0, 0.0], [0.0, 0.0], dtype=dtype))
        close(out.loss, [math.log(2.0)] * 2, dtype=dtype)
        assert out.metrics["rewards/margins"].tolist() == [0.0, 0.0]
        assert out.metrics["rewards/accuracies"].tolist() == [0.0, 0.0]

    def test_the_kl_link_is_dpo_too(self) -> None:
        batch = pairs([1.0, -200.0], [0.5, -100.0])
        linked = build(ObjectiveSpec(divergence_term=LinkTerm(divergence=KlSpec())))
        assert torch.equal(linked(batch).loss, build(ObjectiveSpec())(batch).loss)

    @pytest.mark.parametrize("term", LINKS, ids=by_type)
    def test_links_start_at_log_two(self, term: DivergenceSpec) -> None:
        objective = build(ObjectiveSpec(divergence_term=LinkTerm(divergence=term)))
        close(objective(pairs([0.0], [0.0])).loss, [math.log(2.0)], dtype=torch.float64)

    def test_metrics_are_raw_rewards_and_detached(self) -> None:
        objective = build(
            ObjectiveSpec(beta=0.5, divergence_term=LinkTerm(divergence=HellingerSpec()))
        )
        metrics = objective(pairs([2.0, -1.0], [1.0, 3.0])).metrics
        assert metrics["rewards/chosen"].tolist() == [1.0, -0.5]
        assert metrics["rewards/rejected"].tolist() == [0.5, 1.5]
        assert metrics["rewards/margins"].tolist() == [0.5, -2.0]
        assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]
        assert not any(value.requires_grad for value in metrics.values())


class TestTerms:
    @pytest.mark.parametrize("kernel", KERNELS, ids=by_type)
    def test_joint_kernel_term_by_hand(self, kernel: KernelSpec) -> None:
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=kernel, gamma=0.7)))
        raw = few()
        out = objective(pairs([1.0, 0.0], [0.5, 2.0], with_embeddings=raw))
        reference = build_kernel(kernel, GEOMETRY)
        prompt, chosen, rejected = (
            GEOMETRY.prepare(e) for e in (raw.prompt, raw.chosen, raw.rejected)
        )
        similarity = reference.log_k(prompt, chosen) - reference.log_k(prompt, rejected)
        z = 0.1 * torch.tensor([0.5, -2.0]).double() + 0.7 * similarity
        close(out.loss, torch.log1p(torch.exp(-z)), dtype=torch.float64)
        close(out.metrics["kernel/log_ratio"], similarity, dtype=torch.float64)

    def test_separate_kernel_term_by_hand(self) -> None:
        term = KernelTerm(kernel=RbfKernelSpec(), gamma=0.7, mode="separate")
        batch = pairs([1.0, 0.0], [0.5, 2.0], with_embeddings=few())
        out = build(ObjectiveSpec(kernel_term=term))(batch)
        similarity = out.metrics["kernel/log_ratio"]
        dpo = build(ObjectiveSpec())(batch).loss
        close(out.loss, dpo + 0.7 * torch.log1p(torch.exp(-similarity)), dtype=torch.float64)

    def test_penalty_by_hand(self) -> None:
        spec = ObjectiveSpec(divergence_term=PenaltyTerm(divergence=JensenShannonSpec(), alpha=3.0))
        batch = pairs([1.0, 0.0], [0.5, 2.0], divergence=[0.25, 0.0])
        out = build(spec)(batch)
        dpo = build(ObjectiveSpec())(batch).loss
        close(out.loss, dpo + torch.tensor([0.75, 0.0]), dtype=torch.float64)
        assert out.metrics["divergence/token"].tolist() == [0.25, 0.0]
        out.loss.sum().backward()
        assert batch.token_divergence is not None
        assert batch.token_divergence.grad.tolist() == [3.0, 3.0]

    def test_link_by_hand(self) -> None:
        term = LinkTerm(divergence=HellingerSpec())
        out = build(ObjectiveSpec(beta=0.5, divergence_term=term))(pairs([1.0], [-2.0]))
        z = 0.5 * ((1 - math.exp(-0.5)) - (1 - math.exp(1.0)))
        close(out.loss, [math.log1p(math.exp(-z))], dtype=torch.float64)

    def test_weight_multiplies_all_of_a_pairs_loss(self) -> None:
        spec = ObjectiveSpec(
            kernel_term=KernelTerm(kernel=RbfKernelSpec(), mode="separate"),
            divergence_term=PenaltyTerm(divergence=KlSpec()),
        )
        batch = pairs([1.0, 0.0], [0.5, 2.0], with_embeddings=few(), divergence=[0.1, 0.2])
        weighted = replace(batch, weight=torch.tensor([0.0, 2.5]))
        objective = build(spec)
        expected = objective(batch).loss * torch.tensor([0.0, 2.5])
        close(objective(weighted).loss, expected, dtype=torch.float64)

    def test_entropy_bonus_is_the_regularizer(self) -> None:
        kernel = MixtureKernelSpec(entropy=0.4)
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=kernel)))
        out = objective(pairs([0.0, 0.0], [0.0, 0.0], with_embeddings=few()))
        close(out.regularizer, -0.4 * math.log(4.0), dtype=torch.float64)

    def test_regularizer_pulls_uneven_weights_together(self) -> None:
        kernel = MixtureKernelSpec(weights={"tau_local": 0.9}, entropy=1.0)
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=kernel)))
        out = objective(pairs([0.0, 0.0], [0.0, 0.0], with_embeddings=few()))
        out.regularizer.backward()
        gradient = dict(objective.named_parameters())["kernel.raw_tau"].grad
        assert float(gradient[0]) > 0.0 > float(gradient[1])

    def test_losses_of_micro_batches_are_those_of_the_batch(self) -> None:
        spec = ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec()))
        objective, raw = build(spec), few(6)
        rho = torch.randn(2, 6, generator=generator(0), dtype=torch.float64)
        whole = objective(PreferenceBatch(rho[0], rho[1], raw, None)).loss
        parts = []
        for start in (0, 2, 4):
            rows = slice(start, start + 2)
            part = PairEmbeddings(raw.prompt[rows], raw.chosen[rows], raw.rejected[rows])
            parts.append(objective(PreferenceBatch(rho[0, rows], rho[1, rows], part, None)).loss)
        close(torch.cat(parts), whole, dtype=torch.float64)


class TestGradients:
    @pytest.mark.parametrize("kernel", KERNELS, ids=by_type)
    @pytest.mark.parametrize("mode", ["joint", "separate"])
    def test_match_finite_differences(self, kernel: KernelSpec, mode: str) -> None:
        spec = ObjectiveSpec(
            beta=0.5,
            label_smoothing=0.1,
            kernel_term=KernelTerm(kernel=kernel, gamma=0.5, mode=mode),
            divergence_term=PenaltyTerm(divergence=KlSpec()),
        )
        objective, raw = build(spec), few()
        leaves = (
            torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True),
            torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True),
            *(e.clone().requires_grad_() for e in (raw.prompt, raw.chosen, raw.rejected)),
            torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True),
        )

        def loss(w: Tensor, v: Tensor, x: Tensor, yw: Tensor, yl: Tensor, d: Tensor) -> Tensor:
            return objective(PreferenceBatch(w, v, PairEmbeddings(x, yw, yl), d)).loss

        assert torch.autograd.gradcheck(loss, leaves)

    @pytest.mark.parametrize("term", LINKS, ids=by_type)
    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [(0.0, 0.0), (-95.0, -89.0), (-200.0, -170.0), (-1e4, 1e4), (-1e4, -1e4), (3.0, 5.0)],
    )
    def test_a_misordered_pair_is_pushed_the_right_way(
        self, term: DivergenceSpec, chosen: float, rejected: float
    ) -> None:
        """The values at which f-DPO in plain form gives NaN, infinity or nothing, in float32."""
        objective = build(ObjectiveSpec(divergence_term=LinkTerm(divergence=term)))
        batch = pairs([chosen], [rejected], dtype=torch.float32)
        out = objective(batch)
        out.loss.sum().backward()
        assert bool(torch.isfinite(out.loss).all())
        grads = (batch.log_ratio_chosen.grad, batch.log_ratio_rejected.grad)
        assert all(bool(torch.isfinite(g).all()) for g in grads)
        assert float(grads[0]) < 0.0
        # A bounded link saturates where the rejected answer is at its highest.
        assert float(grads[1]) >= 0.0
        if rejected <= 5.0:
            assert float(grads[1]) > 0.0

    @pytest.mark.parametrize("chosen", [-1e4, 1e4])
    def test_dpo_at_extremes(self, chosen: float) -> None:
        batch = pairs([chosen], [-chosen], dtype=torch.float32)
        out = build(ObjectiveSpec())(batch)
        out.loss.sum().backward()
        assert float(out.loss.detach()) == pytest.approx(max(0.0, -0.2 * chosen), abs=1e-6)
        assert float(batch.log_ratio_chosen.grad) == pytest.approx(-0.1 if chosen < 0 else 0.0)

    @pytest.mark.parametrize("kernel", KERNELS, ids=by_type)
    @pytest.mark.parametrize("mode", ["joint", "separate"])
    def test_embeddings_of_chosen_and_rejected_move_apart(
        self, kernel: KernelSpec, mode: str
    ) -> None:
        """A step against the gradient raises the kernel log-ratio."""
        spec = ObjectiveSpec(kernel_term=KernelTerm(kernel=kernel, gamma=1.0, mode=mode))
        objective, raw = build(spec), few()
        leaves = [e.clone().requires_grad_() for e in (raw.prompt, raw.chosen, raw.rejected)]
        out = objective(pairs([0.0, 0.0], [0.0, 0.0], with_embeddings=PairEmbeddings(*leaves)))
        gradients = torch.autograd.grad(out.loss.sum(), leaves)
        stepped = PairEmbeddings(
            *((leaf - 1e-2 * g).detach() for leaf, g in zip(leaves, gradients, strict=True))
        )
        before, after = objective.kernel_log_ratio(raw), objective.kernel_log_ratio(stepped)
        assert bool((after > before).all())

    @pytest.mark.parametrize("kernel", KERNELS, ids=by_type)
    def test_identical_responses_carry_no_signal(self, kernel: KernelSpec) -> None:
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=kernel, gamma=1.0)))
        raw = few()
        same = raw.chosen.clone().requires_grad_()
        twins = PairEmbeddings(raw.prompt, same, same)
        out = objective(pairs([0.0, 0.0], [0.0, 0.0], with_embeddings=twins))
        (gradient,) = torch.autograd.grad(out.loss.sum(), same)
        close(out.loss, [math.log(2.0)] * 2, dtype=torch.float64)
        assert float(gradient.abs().max()) <= 1e-12

    @pytest.mark.parametrize("kernel", KERNELS, ids=by_type)
    @pytest.mark.parametrize("scale", [0.0, 1e4])
    def test_extreme_embeddings_stay_finite_in_float32(
        self, kernel: KernelSpec, scale: float
    ) -> None:
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=kernel))).float()
        leaves = [
            (scale * e).float().requires_grad_()
            for e in (few().prompt, few().chosen, few().rejected)
        ]
        batch = pairs(
            [0.0, 0.0], [0.0, 0.0], dtype=torch.float32, with_embeddings=PairEmbeddings(*leaves)
        )
        out = objective(batch)
        gradients = torch.autograd.grad(out.loss.sum(), leaves)
        assert bool(torch.isfinite(out.loss).all())
        assert all(bool(torch.isfinite(g).all()) for g in gradients)

    def test_mixture_logits_learn(self) -> None:
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec())))
        out = objective(pairs([0.0, 0.0], [0.0, 0.0], with_embeddings=few()))
        (out.loss.mean() + out.regularizer).backward()
        assert len(list(objective.parameters())) == 3
        assert all(float(p.grad.abs().sum()) > 0.0 for p in objective.parameters())


class TestModule:
    def test_mixture_weights_by_name_and_in_metrics(self) -> None:
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec())))
        weights = objective.mixture_weights()
        assert weights is not None
        out = objective(pairs([0.0, 0.0], [0.0, 0.0], with_embeddings=few()))
        reported = {k: v for k, v in out.metrics.items() if k.startswith("hmk/")}
        assert {k.removeprefix("hmk/"): float(v) for k, v in reported.items()} == weights
        assert all(value.shape == () for value in reported.values())

    def test_without_a_mixture_there_are_no_weights(self) -> None:
        assert build(ObjectiveSpec()).mixture_weights() is None

    def test_state_is_the_learned_logits_and_restores_them(self) -> None:
        spec = ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec()))
        trained, fresh = build(spec), build(spec)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.tensor([0.3, -0.8]))
        fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
        assert fresh.mixture_weights() == trained.mixture_weights()
        assert set(trained.state_dict()) == {
            "kernel.raw_tau",
            "kernel.raw_local",
            "kernel.raw_global",
        }
        assert build(ObjectiveSpec()).state_dict() == {}

    def test_copies_are_independent(self) -> None:
        original = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec())))
        batch = pairs([0.0, 0.0], [0.0, 0.0], with_embeddings=few())
        before = original(batch).loss
        copied = copy.deepcopy(original)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(torch.tensor([5.0, -5.0]))
        assert torch.equal(original(batch).loss, before)
        assert not torch.equal(copied(batch).loss, before)

    def test_low_precision_inputs_are_computed_in_float32(self) -> None:
        spec = ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec()))
        objective = build_objective(spec, geometry=GEOMETRY.to(dtype=torch.float32), head=None)
        raw = few()
        low = PairEmbeddings(raw.prompt.bfloat16(), raw.chosen.bfloat16(), raw.rejected.bfloat16())
        full = PairEmbeddings(low.prompt.float(), low.chosen.float(), low.rejected.float())
        batch = pairs([-300.5, 2.0], [-301.0, 1.0], dtype=torch.float32, with_embeddings=full)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = objective(replace(batch, embeddings=low))
        assert out.loss.dtype == torch.float32
        exact = build(spec).kernel_log_ratio(
            PairEmbeddings(low.prompt.double(), low.chosen.double(), low.rejected.double())
        )
        torch.testing.assert_close(
            out.metrics["kernel/log_ratio"].double(), exact, rtol=1e-3, atol=1e-4
        )
        assert torch.equal(out.loss, objective(batch).loss)

    def test_low_precision_log_ratios_are_computed_in_float32(self) -> None:
        out = build(ObjectiveSpec())(pairs([1.0], [0.5], dtype=torch.bfloat16))
        assert {out.loss.dtype, *(m.dtype for m in out.metrics.values())} == {torch.float32}
        close(out.loss, [math.log1p(math.exp(-0.05))], dtype=torch.float32)

    def test_one_batch_serves_objectives_that_need_less(self) -> None:
        full = pairs([1.0, 0.0], [0.5, 2.0], with_embeddings=few(), divergence=[0.1, 0.2])
        objective = build(ObjectiveSpec())
        out = objective(full)
        assert torch.equal(out.loss, objective(pairs([1.0, 0.0], [0.5, 2.0])).loss)
        assert not {"kernel/log_ratio", "divergence/token"} & set(out.metrics)


class TestMessages:
    def test_kernel_term_without_embeddings(self) -> None:
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=RbfKernelSpec())))
        with pytest.raises(ValueError, match="has a kernel term and the batch has no embeddings"):
            objective(pairs([0.0], [0.0]))

    def test_penalty_without_token_divergence(self) -> None:
        objective = build(ObjectiveSpec(divergence_term=PenaltyTerm(divergence=KlSpec())))
        with pytest.raises(ValueError, match="has a penalty and the batch has no token_diverg"):
            objective(pairs([0.0], [0.0]))

    def test_ragged_batch(self) -> None:
        objective = build(ObjectiveSpec())
        with pytest.raises(ValueError, match=r"log_ratio_rejected has shape \(1,\)"):
            objective(pairs([0.0, 0.0], [0.0]))
        with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
            objective(pairs([0.0], [0.0], weight=[1.0, 1.0, 1.0]))

    def test_embeddings_of_another_batch(self) -> None:
        objective = build(ObjectiveSpec(kernel_term=KernelTerm(kernel=RbfKernelSpec())))
        with pytest.raises(ValueError, match=r"prompt embeddings have shape \(3, 12\)"):
            objective(pairs([0.0], [0.0], with_embeddings=few(3)))

    def test_kernel_log_ratio_without_a_kernel(self) -> None:
        with pytest.raises(ValueError, match="objective dpo has no kernel term"):
            build(ObjectiveSpec()).kernel_log_ratio(few())
