"""The variants of `bench.kernel_term`: what each makes of a preference function, and one run of it.

Every run is the product's own training loop from the reference's weights. Validation is scored
under the trained adapter and under the same adapter scaled down, a straight way back to the
reference on which drift falls: so runs of equal length can be compared at equal drift.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from bench.kernel_encoder import WEIGHTS_SHA256, Encoded
from bench.kernel_function import (
    LEXICAL_DIM,
    PreferenceFunction,
    Texts,
    learn,
    lexical_embeddings,
)
from bench.selection_cases import HELD_OUT, OpenCase
from core.lifecycle import EndedBy
from core.spec import KernelTerm, KlSpec, ObjectiveSpec, RbfKernelSpec
from objectives import (
    HybridObjective,
    ObjectiveOutput,
    PairEmbeddings,
    PreferenceBatch,
    build_objective,
    link,
)
from selection.features import ReferenceFeatures
from worker.training.evaluate import measure
from worker.training.loop import train
from worker.training.model import Policy
from worker.training.step import TrainingData
from worker.training.tokenize import TokenizedPair

PLAIN = "γ = 0"
SCALES = (0.6, 1.0)
NOISE = 0.2
BUDGET: dict[str, Any] = {
    "model": "tiny-lm", "steps": 32, "batch_size": 16,
    "learning_rate": "auto, constant", "max_length": 512, "train_pairs": 512,
    "validation_pairs": 200, "held_out": HELD_OUT, "beta": 0.1, "noise": NOISE,
}  # fmt: skip
"""What every run has, an epoch of at most so many pairs; rows of another are not looked at."""

Use = Literal["plain", "kernel", "offset", "target", "soft", "weight"]
Source = Literal["none", "reference", "lexical", "sentence", "by lot"]


@dataclass(frozen=True)
class Variant:
    """How a preference function enters the loss, and which; `gamma` is the strength of terms."""

    use: Use
    source: Source = "none"
    gamma: float = 1.0


VARIANTS: Mapping[str, Variant] = {
    PLAIN: Variant("plain"),
    "kernel term, γ = 0.1": Variant("kernel", gamma=0.1),
    "kernel term, γ = 1": Variant("kernel", gamma=1.0),
    "f as offset": Variant("offset", "reference"),
    "f as target margin": Variant("target", "reference"),
    "f as soft label": Variant("soft", "reference"),
    "f as weight": Variant("weight", "reference"),
    "lexical f as soft label": Variant("soft", "lexical"),
    "f by lot as soft label": Variant("soft", "by lot"),
    "sentence f as soft label": Variant("soft", "sentence"),
    "sentence f as target margin": Variant("target", "sentence"),
    "sentence kernel term, γ = 1": Variant("kernel", "sentence", gamma=1.0),
}
"""By lot: the same numbers, dealt to other pairs; what it does is not what f knows."""
FUNCTIONS = ("reference", "lexical", "sentence")
SENTENCE = tuple(name for name, variant in VARIANTS.items() if variant.source == "sentence")
"""What needs the sentence encoder."""


def versions() -> dict[str, str]:
    """Hash of what the variants are: rows of others are measured anew."""
    told = {name: f"{v.use} {v.source} {v.gamma}" for name, v in VARIANTS.items()}
    told |= {name: f"{told[name]} {WEIGHTS_SHA256}" for name in SENTENCE}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:8] for name, text in told.items()}


class FunctionObjective(HybridObjective):
    """DPO with z = beta [rho(y+) - rho(y-)] + gamma s, s a constant of each pair.

    The constants come where frozen embeddings do, as chosen minus rejected of width 1.
    """

    def __init__(self, *, beta: float, gamma: float) -> None:
        term = KernelTerm(kernel=RbfKernelSpec(), gamma=gamma, embedding="encoder")
        super().__init__(
            ObjectiveSpec(beta=beta, kernel_term=term),
            link=link(KlSpec()), kernel=None, geometry=None, divergence=None,
        )  # fmt: skip

    def kernel_log_ratio(self, embeddings: PairEmbeddings) -> Tensor:
        """s, (B,)."""
        return (embeddings.chosen - embeddings.rejected).squeeze(-1)


class SoftLabelObjective(HybridObjective):
    """DPO with labels q: L = -q log sigma(z) - (1 - q) log sigma(-z) = -log sigma(z) + (1 - q) z.

    The q of each pair comes where frozen embeddings do, as the chosen one of width 1.
    """

    def __init__(self, *, beta: float) -> None:
        super().__init__(
            ObjectiveSpec(beta=beta),
            link=link(KlSpec()), kernel=None, geometry=None, divergence=None,
        )  # fmt: skip

    def forward(self, batch: PreferenceBatch) -> ObjectiveOutput:
        """Losses of B pairs; needs their q."""
        if batch.embeddings is None:
            raise ValueError("soft labels come as frozen embeddings; the batch has none")
        output = super().forward(batch)
        z = self.spec.beta * (batch.log_ratio_chosen - batch.log_ratio_rejected)
        wrong = 1.0 - batch.embeddings.chosen.squeeze(-1)
        return replace(output, loss=output.loss + wrong * z)


def label_posterior(log_odds: Tensor, *, noise: float = NOISE) -> Tensor:
    """P(the label is right) of pairs whose prior log-odds are s, when labels flip with `noise`.

    q = (1-e) p / ((1-e) p + e (1-p)), p = sigma(s): sigma(s + log((1-e)/e)).
    """
    return torch.sigmoid(log_odds + math.log((1.0 - noise) / noise))


def functions(case: OpenCase, encoded: Encoded | None) -> dict[str, PreferenceFunction]:
    """What can be learned from the embeddings of the reference, the words and the encoder."""
    group = case.features.group
    words, new_words = lexical_embeddings(
        _texts(case, case.data.pairs), _texts(case, case.validation)
    )
    found = {
        "reference": learn(
            _embeddings(case.features), group, _embeddings(case.validation_features), seed=case.seed
        ),
        "lexical": learn(words, group, new_words, seed=case.seed, max_dim=LEXICAL_DIM),
    }
    if encoded is not None:
        found["sentence"] = learn(encoded.train, group, encoded.new, seed=case.seed)
    return found


def about(case: OpenCase, found: Mapping[str, PreferenceFunction]) -> dict[str, Any]:
    """What the report needs of a case: its prompts, and what each function says of validation.

    A prompt has the same number in the splits of all seeds.
    """
    return {
        "plan": case.plan.as_dict(),
        "train_pairs": len(case.data.pairs),
        "tokens_a_pair": case.about["tokens_a_pair"],
        "prompt": [int(pair.group_id[:12], 16) for pair in case.validation],
        "functions": {
            name: {
                "temperature": f.temperature,
                "held_out_accuracy": f.held_out_accuracy(),
                "held_out_log_loss": f.held_out_log_loss(),
                "log_odds": _rounded(f.new_log_odds.tolist()),
            }
            for name, f in found.items()
        },
    }


def prepared(
    case: OpenCase,
    variant: Variant,
    found: Mapping[str, PreferenceFunction],
    encoded: Encoded | None,
) -> tuple[HybridObjective, TrainingData]:
    """Objective and data of a variant: what f says of each pair is a constant, label or weight.

    Raises ValueError for a kernel term on an encoder that is not there.
    """
    beta = BUDGET["beta"]
    match variant.use:
        case "plain":
            return _built(case, ObjectiveSpec(beta=beta)), case.data
        case "kernel" if variant.source == "sentence":
            if encoded is None:
                raise ValueError("the sentence kernel term needs the encoder's embeddings")
            term = KernelTerm(kernel=RbfKernelSpec(), gamma=variant.gamma, embedding="encoder")
            spec = ObjectiveSpec(beta=beta, kernel_term=term)
            objective = build_objective(spec, geometry=encoded.geometry, head=None)
            return objective, replace(case.data, frozen_embeddings=encoded.train)
        case "kernel":
            term = KernelTerm(kernel=RbfKernelSpec(), gamma=variant.gamma)
            return _built(case, ObjectiveSpec(beta=beta, kernel_term=term)), case.data
        case "offset" | "target":
            # Offset: f explains its part, the policy learns the rest. Target: the policy has to
            # reach a margin that grows with what f says (Amini et al. 2024, arXiv 2402.10571).
            sign = 1.0 if variant.use == "offset" else -1.0
            constant = _constant(sign * _log_odds(case, variant, found))
            return (
                FunctionObjective(beta=beta, gamma=variant.gamma),
                replace(case.data, frozen_embeddings=constant),
            )
        case "soft":
            labels = _constant(label_posterior(_log_odds(case, variant, found)))
            return SoftLabelObjective(beta=beta), replace(case.data, frozen_embeddings=labels)
        case "weight":
            weights = label_posterior(_log_odds(case, variant, found))
            shares = (weights / weights.mean()).tolist()
            pairs = [
                replace(pair, weight=share)
                for pair, share in zip(case.data.pairs, shares, strict=True)
            ]
            return _built(case, ObjectiveSpec(beta=beta)), replace(case.data, pairs=pairs)
        case _:
            assert_never(variant.use)


def run(
    case: OpenCase,
    variant: Variant,
    found: Mapping[str, PreferenceFunction],
    encoded: Encoded | None,
) -> dict[str, Any]:
    """Train a variant and score validation at each scale of its adapter.

    A run that meets NaN has no points; `ended_by` says so.
    """
    started = time.perf_counter()
    objective, data = prepared(case, variant, found, encoded)
    outcome = train(
        case.policy, objective, data, plan=case.plan, weights_learning_rate=0.0, hooks=_Unwatched()
    )
    points: list[dict[str, Any]] = []
    ended_by = outcome.ended_by
    if ended_by is EndedBy.BUDGET:
        points = [_point(case, scale) for scale in SCALES]
        if not all(math.isfinite(point["drift"]) for point in points):
            points, ended_by = [], EndedBy.NAN
    return {
        "ended_by": ended_by.value, "points": points, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _point(case: OpenCase, scale: float) -> dict[str, Any]:
    """Drift and margins of validation under the adapter times a scale; not finite: NaN drift."""
    with scaled(case.policy, scale):
        measured = measure(
            case.policy, case.validation, reference=case.validation_states,
            progress=lambda done, total: None,
        )  # fmt: skip
    if not measured.is_finite:
        return {"scale": scale, "drift": math.nan, "margins": []}
    margins = _rounded(measured.margins.tolist())
    return {"scale": scale, "drift": measured.drift, "margins": margins}


@contextmanager
def scaled(policy: Policy, scale: float) -> Iterator[None]:
    """The policy with what low-rank adapters add to each weight times `scale`; put back after.

    An adapter adds B A; B alone is scaled. 0 is the reference.
    """
    factors = [p for name, p in policy.adapter().items() if ".lora_B." in name]
    if not factors:
        raise ValueError("the policy has no low-rank adapter to scale: load it with `lora`")
    kept = [factor.detach().clone() for factor in factors]
    with torch.no_grad():
        for factor in factors:
            factor.mul_(scale)
        try:
            yield
        finally:
            for factor, before in zip(factors, kept, strict=True):
                factor.copy_(before)


class _Unwatched:
    """Hooks of a run that nobody watches and nobody stops."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def stepped(self, step: int, total: int) -> None: ...

    def stopping(self) -> bool:
        return False

    def raise_if_stopped(self) -> None:
        raise AssertionError("never asked to stop")


def _built(case: OpenCase, spec: ObjectiveSpec) -> HybridObjective:
    return build_objective(spec, geometry=case.geometry, head=None)


def _log_odds(case: OpenCase, variant: Variant, found: Mapping[str, PreferenceFunction]) -> Tensor:
    """Log-odds of the training pairs' labels, (N,), float32."""
    if variant.source == "by lot":
        dealt = found["reference"].train_log_odds.float()
        generator = torch.Generator().manual_seed(case.seed)
        return dealt[torch.randperm(dealt.shape[0], generator=generator)]
    return found[variant.source].train_log_odds.float()


def _constant(values: Tensor) -> PairEmbeddings:
    """Numbers of pairs (N,) in the place of frozen embeddings: chosen minus rejected is them."""
    zeros = torch.zeros_like(values).unsqueeze(-1)
    return PairEmbeddings(prompt=zeros, chosen=values.unsqueeze(-1), rejected=zeros)


def _embeddings(features: ReferenceFeatures) -> PairEmbeddings:
    return PairEmbeddings(
        features.prompt_embedding, features.chosen_embedding, features.rejected_embedding
    )


def _texts(case: OpenCase, pairs: Sequence[TokenizedPair]) -> Texts:
    def text(ids: tuple[int, ...]) -> str:
        return str(case.policy.tokenizer.decode(list(ids), skip_special_tokens=True))

    return Texts(
        [text(pair.prompt) for pair in pairs],
        [text(pair.chosen) for pair in pairs],
        [text(pair.rejected) for pair in pairs],
    )


def _rounded(values: Sequence[float]) -> list[float]:
    """Four digits: the table is kept."""
    return [float(f"{value:.4g}") for value in values]
