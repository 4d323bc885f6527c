"""The DPO-Kernels objective: preference loss, kernel term, divergence term, mixture entropy."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from core.spec import MixtureKernelSpec, ObjectiveSpec, PenaltyTerm
from objectives.geometry import Geometry, project
from objectives.kernels.base import KernelModule
from objectives.mixture import MixtureKernel
from objectives.numerics import upcast
from objectives.types import Divergence, ObjectiveOutput, PairEmbeddings, PreferenceBatch

SEPARATE_SLOPE = 1.0
"""kappa of the separate kernel loss -gamma log sigma(kappa s)."""


class HybridObjective(nn.Module):
    """z = beta [g(rho+) - g(rho-)] + gamma s, s = log K(e_x, e+) - log K(e_x, e-) (joint mode).

    L = -(1-eps) log sigma(z) - eps log sigma(-z) + alpha D - eta H(mixture weights). In separate
    mode s leaves z and adds -gamma log sigma(s). Without terms this is exactly DPO. Everything is
    computed in float32 at least, whatever autocast says. Its only state are learned mixture
    logits. Built by `objectives.build.build_objective`.
    """

    kernel: KernelModule | None
    divergence: Divergence | None
    mean: Tensor | None
    projection: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        spec: ObjectiveSpec,
        *,
        link: Callable[[Tensor], Tensor],
        kernel: KernelModule | None,
        geometry: Geometry | None,
        divergence: Divergence | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.link = link
        self.kernel = kernel
        self.divergence = divergence
        for name in ("mean", "projection", "scale"):
            tensor = None if geometry is None else geometry.tensors()[name]
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, batch: PreferenceBatch) -> ObjectiveOutput:
        """Losses of B pairs, unreduced; ValueError when an input that the spec needs is missing.

        Inputs that the spec has no use for are ignored, so one batch can serve several objectives.
        """
        self._check(batch)
        with torch.autocast(device_type=batch.log_ratio_chosen.device.type, enabled=False):
            return self._evaluate(batch)

    def mixture_weights(self) -> dict[str, float] | None:
        """tau_local, tau_global and each kernel's share of its group; None without a mixture."""
        if not isinstance(self.kernel, MixtureKernel):
            return None
        return {name: float(weight) for name, weight in self.kernel.weights().items()}

    def kernel_log_ratio(self, embeddings: PairEmbeddings) -> Tensor:
        """The similarity s = log K(e_x, e+) - log K(e_x, e-) for raw embeddings (B, H), shape (B,).

        Raises ValueError when the objective has no kernel term.
        """
        if (
            self.kernel is None
            or self.mean is None
            or self.projection is None
            or self.scale is None
        ):
            raise ValueError(f"objective {self.spec.label} has no kernel term")
        prompt, chosen, rejected = (
            project(e, mean=self.mean, projection=self.projection, scale=self.scale)
            for e in (embeddings.prompt, embeddings.chosen, embeddings.rejected)
        )
        return self.kernel.log_k(prompt, chosen) - self.kernel.log_k(prompt, rejected)

    def _evaluate(self, batch: PreferenceBatch) -> ObjectiveOutput:
        spec = self.spec
        chosen, rejected = upcast(batch.log_ratio_chosen), upcast(batch.log_ratio_rejected)
        rewards = (spec.beta * chosen.detach(), spec.beta * rejected.detach())
        metrics = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).to(chosen.dtype),
        }
        margin = spec.beta * (self.link(chosen) - self.link(rejected))
        extra = torch.zeros_like(margin)
        if spec.kernel_term is not None and batch.embeddings is not None:
            similarity = self.kernel_log_ratio(batch.embeddings)
            metrics["kernel/log_ratio"] = similarity.detach()
            if spec.kernel_term.mode == "joint":
                margin = margin + spec.kernel_term.gamma * similarity
            else:
                extra = extra - spec.kernel_term.gamma * nn.functional.logsigmoid(
                    SEPARATE_SLOPE * similarity
                )
        if isinstance(spec.divergence_term, PenaltyTerm) and batch.token_divergence is not None:
            divergence = upcast(batch.token_divergence)
            metrics["divergence/token"] = divergence.detach()
            extra = extra + spec.divergence_term.alpha * divergence
        smoothing = spec.label_smoothing
        loss = (
            extra
            - (1.0 - smoothing) * nn.functional.logsigmoid(margin)
            - smoothing * nn.functional.logsigmoid(-margin)
        )
        if batch.weight is not None:
            loss = loss * upcast(batch.weight)
        if isinstance(self.kernel, MixtureKernel):
            metrics |= {f"hmk/{name}": share for name, share in self.kernel.weights().items()}
        return ObjectiveOutput(loss=loss, regularizer=self._regularizer(loss), metrics=metrics)

    def _regularizer(self, loss: Tensor) -> Tensor:
        term = self.spec.kernel_term
        if isinstance(self.kernel, MixtureKernel) and term is not None:
            assert isinstance(term.kernel, MixtureKernelSpec)
            return -term.kernel.eta * self.kernel.entropy()
        return loss.new_zeros(())

    def _check(self, batch: PreferenceBatch) -> None:
        spec, shape = self.spec, batch.log_ratio_chosen.shape
        if spec.kernel_term is not None and batch.embeddings is None:
            raise ValueError(
                f"objective {spec.label} has a kernel term and the batch has no embeddings: "
                f"pass those of the {spec.kernel_term.embedding}"
            )
        if isinstance(spec.divergence_term, PenaltyTerm) and batch.token_divergence is None:
            raise ValueError(
                f"objective {spec.label} has a penalty and the batch has no token_divergence: "
                "pass the mean of objective.divergence over the response tokens of each pair"
            )
        per_pair = {
            "log_ratio_chosen": batch.log_ratio_chosen,
            "log_ratio_rejected": batch.log_ratio_rejected,
            "token_divergence": batch.token_divergence,
            "weight": batch.weight,
        }
        for name, tensor in per_pair.items():
            if tensor is not None and (tensor.shape != shape or tensor.ndim != 1):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected (B,) as log_ratio_chosen, "
                    f"which has {tuple(shape)}"
                )
        if spec.kernel_term is not None and batch.embeddings is not None:
            for name in ("prompt", "chosen", "rejected"):
                embedding: Tensor = getattr(batch.embeddings, name)
                if embedding.ndim != 2 or embedding.shape[0] != shape[0]:
                    raise ValueError(
                        f"{name} embeddings have shape {tuple(embedding.shape)}, expected "
                        f"({shape[0]}, H)"
                    )
